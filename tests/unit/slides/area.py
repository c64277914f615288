"""Area averages by their definition: the truth that exact reads are held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def averages(
    pixels: NDArray[np.uint8], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Area averages of [h, w, 3] between the lines ``y`` and ``x``, by their definition."""

    def weights(edges: NDArray[np.float64], length: int) -> NDArray[np.float64]:
        low = np.maximum(edges[:-1, None], np.arange(length))
        high = np.minimum(edges[1:, None], np.arange(length) + 1)
        return np.maximum(0, high - low) / np.diff(edges)[:, None]

    rows, columns = weights(y, pixels.shape[0]), weights(x, pixels.shape[1])
    return np.einsum("iy,yxc,jx->ijc", rows, pixels.astype(np.float64), columns, optimize=True)


def by_area(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """The same on a grid of ``side`` cells each way."""
    height, width = pixels.shape[:2]
    return averages(
        pixels, np.arange(side + 1) * (height / side), np.arange(side + 1) * (width / side)
    )
