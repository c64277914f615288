"""Floats of 16 bits, against numpy's own conversion."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pathflip.archive.halves import convert, patch_sums


@pytest.mark.parametrize("size", [0, 1, 32_766, 32_767, 32_768, 100_003])
def test_numbers_are_rounded_as_numpy_does(size: int) -> None:
    bits = np.random.default_rng(size).integers(0, 1 << 32, size, dtype=np.uint32)
    wide = bits.view(np.float32)
    wide[np.isnan(wide)] = 65_520  # the first that is infinite in 16 bits
    half = np.empty(size, np.float16)
    convert(wide, half)
    with np.errstate(over="ignore"):
        assert (half.view(np.uint16) == wide.astype(np.float16).view(np.uint16)).all()


def test_numbers_that_may_not_be_written_to_are_rounded_too() -> None:
    wide = np.frombuffer(np.linspace(-9, 9, 1000, dtype=np.float32).tobytes(), np.float32)
    half = np.empty(1000, np.float16)
    convert(wide, half)
    assert (half == wide.astype(np.float16)).all()


@pytest.mark.parametrize(
    "shape", [(0, 4, 3), (3, 256, 1024), (2, 1, 40_000), (4, 7, 1), (2, 40, 999)]
)
def test_sums_over_patches_are_exact(shape: tuple[int, int, int]) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    features = bits.view(np.float16)
    features[~np.isfinite(features)] = 65_504
    features.flags.writeable = False  # as it comes from Arrow
    sums = patch_sums(features)
    assert (sums.shape, sums.dtype) == ((shape[0], shape[2]), np.float64)
    for region, own in zip(features.astype(np.float64), sums, strict=True):
        exact = [math.fsum(column) for column in region.T[:50]]
        assert own[:50].tolist() == exact
    assert (sums == features.sum(axis=1, dtype=np.float64)).all()
