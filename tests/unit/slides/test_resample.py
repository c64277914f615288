"""Area averages against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip.slides.resample import resize_area

PX = 256


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


@pytest.mark.parametrize("length", [257, 300, 468, 507, 512, 521, 1000, 1100])
def test_area_averages_of_noise(length: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (length, length, 3), np.uint8)
    averaged = resize_area(pixels, width=PX, height=PX)
    difference = averaged - by_area(pixels, PX)
    assert np.abs(difference).max() < 2
    assert np.abs(difference).mean() < 0.35
    assert abs(difference.mean()) < 0.13  # OpenCV rounds halves up where the ratio is 2


def test_area_averages_of_one_colour_and_of_an_oblong_are_exact() -> None:
    flat = np.full((300, 461, 3), (0, 255, 137), np.uint8)
    assert (resize_area(flat, width=256, height=200) == (0, 255, 137)).all()
    ramp = np.repeat(np.arange(300, dtype=np.float64)[:, None] * 0.8, 461, axis=1)
    pixels = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    y, x = np.arange(201) * 1.5, np.arange(257) * (461 / 256)
    assert np.abs(resize_area(pixels, width=256, height=200) - averages(pixels, y, x)).max() < 2
