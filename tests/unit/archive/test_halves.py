"""Floats of 16 bits, against numpy's own conversion."""

from __future__ import annotations

import numpy as np
import pytest

from pathflip.archive.halves import convert
from pathflip.archive.slide_rows import patch_sums

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("size", [0, 1, 32_766, 32_767, 32_768, 100_003])
def test_numbers_are_rounded_as_numpy_does(size: int) -> None:
    bits = np.random.default_rng(size).integers(0, 1 << 32, size, dtype=np.uint32)
    wide = bits.view(np.float32)
    wide[np.isnan(wide)] = 65_520  # the first that is infinite in 16 bits
    half = np.empty(size, np.float16)
    convert(wide, half)
    with np.errstate(over="ignore"):
        assert (half.view(np.uint16) == wide.astype(np.float16).view(np.uint16)).all()


def test_every_half_is_widened_exactly_also_where_it_may_not_be_written_to() -> None:
    finite = EVERY[np.isfinite(EVERY)]
    for source in (finite, np.frombuffer(finite.tobytes(), np.float16)):
        wide = np.empty(len(source), np.float32)
        convert(source, wide)
        assert (wide == source.astype(np.float32)).all()


def test_sums_of_patches_are_those_of_doubles() -> None:
    features = np.random.default_rng(3).standard_normal((3, 64, 50)).astype(np.float16)
    features[1, :40] = 0
    slow = np.zeros((3, 50))
    for patch in range(64):
        slow += features[:, patch].astype(np.float64)
    assert (patch_sums(features) == slow).all()
