"""TorchScript encoders: loading a file, and measuring its output. Imports torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pathflip.encoders.weights import bad_weights


def torchscript_dim(path: Path, *, input_px: int) -> int:
    """Return the length of a TorchScript model's feature.

    Raises:
        EncoderError: ``bad_weights`` when it does not map [n, 3, px, px] to [n, dim].
    """
    with torch.inference_mode():
        try:
            output = load_torchscript(path)(torch.zeros(1, 3, input_px, input_px))
        except RuntimeError as error:
            raise bad_weights(path.stem, str(error).strip().splitlines()[-1]) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise bad_weights(path.stem, "its output is not [n, dim]")
    return int(output.shape[1])


def load_torchscript(path: Path) -> nn.Module:
    """Load a TorchScript file onto the CPU, in evaluation mode.

    Raises:
        EncoderError: ``bad_weights`` when it is not a TorchScript file.
    """
    try:
        model: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise bad_weights(path.stem, "it is not a TorchScript file") from error
    return model.eval()
