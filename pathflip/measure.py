"""Lengths and areas of what is drawn on a slide, in closed form.

Points are (x, y); lengths come in the unit of the points, areas in its square. Times ``mpp`` or
``mpp ** 2`` those of level-0 pixels are µm or µm².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]


def length(points: Sequence[Point]) -> float:
    """Return the length of the line through points in their order."""
    return sum(math.dist(a, b) for a, b in pairwise(points))


def area(corners: Sequence[Point]) -> float:
    """Return the area of a polygon whose sides do not cross, by the shoelace formula."""
    x0, y0 = corners[0]  # seen from a corner, large coordinates lose no digits
    moved = [(x - x0, y - y0) for x, y in corners]
    around = zip(moved, [*moved[1:], moved[0]], strict=True)
    return abs(sum(x * v - u * y for (x, y), (u, v) in around)) / 2


def crosses(corners: Sequence[Point]) -> bool:
    """Return whether two sides of a polygon that are no neighbours share a point."""
    sides = list(zip(corners, [*corners[1:], corners[0]], strict=True))
    last = len(sides) - 1
    return any(
        _meet(*sides[i], *sides[j])
        for i in range(len(sides))
        for j in range(i + 2, len(sides))
        if (i, j) != (0, last)
    )


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Return whether the segments ab and cd share a point."""
    sides = _turn(a, b, c), _turn(a, b, d), _turn(c, d, a), _turn(c, d, b)
    if sides[0] * sides[1] < 0 and sides[2] * sides[3] < 0:
        return True
    ends = ((a, b, c), (a, b, d), (c, d, a), (c, d, b))
    return any(turn == 0 and _between(*end) for turn, end in zip(sides, ends, strict=True))


def _turn(a: Point, b: Point, c: Point) -> float:
    """Return on which side of the line from a to b the point c lies: its sign; 0 is on it."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _between(a: Point, b: Point, c: Point) -> bool:
    """Return whether a point of the line through a and b lies between them."""
    return all(min(a[i], b[i]) <= c[i] <= max(a[i], b[i]) for i in (0, 1))
