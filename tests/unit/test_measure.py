"""Lengths and areas against OpenCV, crossings against a polygon drawn without any."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip.measure import area, crosses, length


@st.composite
def stars(draw):
    """Corners of a polygon around a point, in order, so that no two sides cross."""
    count = draw(st.integers(3, 40))
    radii = draw(st.lists(st.integers(5, 400), min_size=count, max_size=count))
    x0, y0 = draw(st.tuples(st.integers(0, 90_000), st.integers(0, 90_000)))
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (x0 + r * math.cos(a), y0 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)
    ]


@given(stars())
def test_areas_are_opencvs(corners):
    # float32 there: seen from the first corner.
    moved = np.float32(np.array(corners) - corners[0])
    expected = cv2.contourArea(moved[:, None])
    assert area(corners) == pytest.approx(expected, rel=1e-4, abs=0.05)
    assert area(corners[::-1]) == pytest.approx(area(corners), rel=1e-9)
    closed = [*corners, corners[0]]
    around = cv2.arcLength(moved[:, None], True)
    assert length(closed) == pytest.approx(around, rel=1e-4)


@given(stars())
def test_a_star_crosses_nowhere_and_with_two_corners_changed_it_does(corners):
    assert not crosses(corners)
    if len(corners) == 4:
        corners[0], corners[1] = corners[1], corners[0]
        assert crosses(corners)


def test_closed_forms_far_from_the_origin():
    square = [(1e5, 1e5), (1e5 + 3, 1e5), (1e5 + 3, 1e5 + 4), (1e5, 1e5 + 4)]
    assert area(square) == 12
    assert length(square) == 10
    assert not crosses(square)
    assert not crosses(square[:3])
    for bow in (
        [(0, 0), (2, 2), (2, 0), (0, 2)],
        [(0, 0), (4, 0), (4, 4), (2, 0), (0, 4)],  # a corner on another side
        [(0, 0), (4, 0), (1, 0), (1, 3)],  # sides upon each other
    ):
        assert crosses(bow)
