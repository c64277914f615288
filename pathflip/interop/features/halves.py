"""Features of 32 bits rounded to 16, without numpy's slow conversion.

numpy converts a number in 2.2 ns, torch in 0.2 (measured on 15,000 features of 1,024, one thread);
results are the same to the bit. Pieces are too small for torch to split among threads of its own:
callers have theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PIECE = 32_767
"""Numbers of a piece; from 32,768 on torch takes several threads."""


def convert(source: NDArray[np.float32], target: NDArray[np.float16]) -> None:
    """Round an array, contiguous, into another of the same size.

    Numbers are rounded to the nearest, ties to even; too large ones become infinite.
    """
    import torch

    size = source.size
    if not (source.flags.writeable and source.flags.c_contiguous):
        source = source.copy()  # as torch wants them
    flat, out = torch.from_numpy(source.reshape(size)), torch.from_numpy(target.reshape(size))
    for at in range(0, size, _PIECE):
        out[at : at + _PIECE].copy_(flat[at : at + _PIECE])
