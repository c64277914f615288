"""Area averages against their definition."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from pathflip.slides import resample
from pathflip.slides.resample import Scratch, resize_area
from tests.unit.slides.area import averages, by_area

PX = 256


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


SIZES = [(468, 468), (467, 468), (640, 700), (300, 461), (257, 256), (468, 467)]


@pytest.mark.parametrize("compiled", [True, False])
def test_kept_memory_and_either_sum_change_no_pixel(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that grow and shrink, with memory of the last picture, by SciPy's sum or NumPy's."""
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    alone = [resize_area(pixels, width=PX, height=PX) for pixels in pictures]
    assert resample._weighted_sums() is not resample.weighted_sums
    if not compiled:
        monkeypatch.setattr(resample, "_weighted_sums", lambda: resample.weighted_sums)
    scratch, out = Scratch(), np.empty((PX, PX, 3), np.uint8)
    for pixels, expected in zip(pictures, alone, strict=True):
        resize_area(pixels, width=PX, height=PX, out=out, scratch=scratch)
        assert np.array_equal(out, expected)


def test_pictures_of_one_size_take_no_new_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (468, 468, 3), np.uint8)
    scratch, out = Scratch(), np.empty((PX, PX, 3), np.uint8)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            resize_area(pixels, width=PX, height=PX, out=out, scratch=scratch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(3)) < 20  # a picture alone takes some 1,000 pages
