"""Outlines of masks: polygons along pixel edges, and their inverse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Polygon = tuple[NDArray[np.float64], list[NDArray[np.float64]]]
"""Outer ring and hole rings, (x, y) [k, 2] each, first point not repeated."""

_AT_ONCE = 1 << 21  # pairs of points and edges that are compared at once
OVERLAP_WORK = 1 << 26
"""Pairs of points and edges above which rings overlap as soon as their boxes do."""


def trace(mask: NDArray[np.bool_]) -> list[Polygon]:
    """Trace rings along the pixel edges of each 4-connected piece, in pixels of the mask.

    Every straight run of boundary is one arrow with tissue on its right. Where two pieces meet at
    a corner each arrow turns back along its own pixel, so a ring belongs to one piece only.
    """
    w = mask.shape[1]
    padded = np.pad(mask, 1).view(np.int8)
    _, labels = cv2.connectedComponents(np.ascontiguousarray(mask).view(np.uint8), connectivity=4)
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]

    # Kinds in the order an arrow turns round a single pixel: top, right, bottom, left.
    runs = []
    for kind, steps in enumerate((down == 1, across.T == -1, down == -1, across.T == 1)):
        line, first, last = _runs(steps)
        if kind == 0:
            start, end, pixel = (first, line), (last, line), (line, first)
        elif kind == 1:
            start, end, pixel = (line, first), (line, last), (first, line - 1)
        elif kind == 2:
            start, end, pixel = (last, line), (first, line), (line - 1, first)
        else:
            start, end, pixel = (line, last), (line, first), (first, line)
        runs.append(np.stack([*start, *end, labels[pixel], np.full(len(line), kind)], axis=1))
    arrows = np.concatenate(runs).astype(np.int64)
    if not len(arrows):
        return []
    point, kind = arrows[:, :2], arrows[:, 5]
    key = (point[:, 1] * (w + 1) + point[:, 0]) * 4 + kind
    order = np.argsort(key)
    end = (arrows[:, 3] * (w + 1) + arrows[:, 2]) * 4
    following = np.zeros(len(arrows), np.int64)
    for turn in (3, 1):  # a right turn, where there is one, is the arrow's own pixel
        wanted = end + (kind + turn) % 4
        at = np.minimum(np.searchsorted(key[order], wanted), len(order) - 1)
        found = key[order[at]] == wanted
        following[found] = order[at][found]

    outer: dict[int, NDArray[np.float64]] = {}
    holes: dict[int, list[NDArray[np.float64]]] = {}
    successor, corners = following.tolist(), [tuple(xy) for xy in point.tolist()]
    piece = arrows[:, 4].tolist()
    seen = bytearray(len(successor))
    for begin in range(len(successor)):
        if seen[begin]:
            continue
        ring, current = [], begin
        while not seen[current]:
            seen[current] = 1
            ring.append(corners[current])
            current = successor[current]
        for simple in _split(ring):
            xy = np.array(simple, np.float64)
            x, y = (xy - xy[0]).T
            if x @ np.roll(y, -1) - y @ np.roll(x, -1) > 0:
                outer[piece[begin]] = xy
            else:
                holes.setdefault(piece[begin], []).append(xy)
    return [(outer[label], holes.get(label, [])) for label in sorted(outer)]


def _runs(
    steps: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Stretches of True along axis 1: (row, first column, column after the last)."""
    change = np.diff(np.pad(steps, ((0, 0), (1, 1))).view(np.int8), axis=1)
    row, first = np.nonzero(change == 1)
    _, last = np.nonzero(change == -1)
    return row, first, last


def _split(ring: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut a ring that meets itself at points into rings that do not."""
    if len(set(ring)) == len(ring):
        return [ring]
    rings: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in place:
            cut = place[corner]
            rings.append(path[cut:])
            for left in path[cut + 1 :]:
                del place[left]
            del path[cut:]
        place[corner] = len(path)
        path.append(corner)
    return [*rings, path]


def fill(polygons: Iterable[Polygon], *, scale: float, h: int, w: int) -> NDArray[np.bool_]:
    """Rasterise the union of polygons; a pixel is in if its centre is in the outer ring alone.

    A ring holds what it goes round (non-zero rule), so where one drawn by hand overlaps itself, the
    overlap counts.

    Args:
        polygons: In level-0 px.
        scale: Level-0 px per pixel of the result.
        h: Rows.
        w: Columns.

    Returns:
        bool [h, w].
    """
    mask = np.zeros((h, w), np.bool_)
    for outer, holes in polygons:
        (top, left), within = _fill_ring(outer / scale, h=h, w=w)
        for hole in holes:
            (y, x), cut = _fill_ring(hole / scale, h=h, w=w)
            # Of the hole, what lies in the box of the outer ring.
            y0, x0 = max(y, top), max(x, left)
            y1 = min(y + cut.shape[0], top + within.shape[0])
            x1 = min(x + cut.shape[1], left + within.shape[1])
            if y0 < y1 and x0 < x1:
                within[y0 - top : y1 - top, x0 - left : x1 - left] &= ~cut[
                    y0 - y : y1 - y, x0 - x : x1 - x
                ]
        mask[top : top + within.shape[0], left : left + within.shape[1]] |= within
    return mask


def _fill_ring(
    ring: NDArray[np.float64], *, h: int, w: int
) -> tuple[tuple[int, int], NDArray[np.bool_]]:
    """Return (row, column) of the corner of a ring's box, and which of its pixels are in the ring.

    Pixels off the grid of h x w are left out.
    """
    a, b = ring, np.roll(ring, -1, axis=0)
    upper = np.clip(np.ceil(np.minimum(a[:, 1], b[:, 1]) - 0.5), 0, h).astype(np.int64)
    lower = np.clip(np.ceil(np.maximum(a[:, 1], b[:, 1]) - 0.5), 0, h).astype(np.int64)
    crossed = lower - upper
    if not crossed.any():
        return (0, 0), np.zeros((0, 0), np.bool_)
    # One entry for each pixel row whose centre line an edge crosses.
    which = np.repeat(np.arange(len(a)), crossed)
    row = np.arange(len(which)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
    row += upper[which]
    slope = (b[which, 0] - a[which, 0]) / (b[which, 1] - a[which, 1])
    x = a[which, 0] + (row + 0.5 - a[which, 1]) * slope
    col = np.clip(np.ceil(x - 0.5), 0, w).astype(np.int64)
    top, left, right = int(row.min()), int(col.min()), int(col.max())
    turns = np.zeros((int(row.max()) + 1 - top, right - left + 1), np.int32)
    down = np.where(b[which, 1] > a[which, 1], 1, -1).astype(np.int32)
    np.add.at(turns, (row - top, col - left), down)
    np.cumsum(turns, axis=1, out=turns)  # how often the ring goes round each pixel
    return (top, left), turns[:, :-1] != 0


# -- points in rings ------------------------------------------------------------------------------


def inside(points: ArrayLike, polygons: Sequence[Polygon]) -> NDArray[np.bool_]:
    """Return the mask of points that lie in any of the polygons and in no hole of it.

    A ring holds what it goes round (non-zero rule), as :func:`fill` has it; exact in floating
    point, and a point on an edge may fall either way.

    Args:
        points: (x, y) [k, 2], in the polygons' frame.
        polygons: Polygons, each an outer ring and hole rings.
    """
    points = np.asarray(points, np.float64).reshape(-1, 2)
    found = np.zeros(len(points), np.bool_)
    for outer, holes in polygons:
        within = _in_ring(points, outer)
        for hole in holes:
            within &= ~_in_ring(points, hole)
        found |= within
    return found


def overlaps(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Return whether two rings have some area in common, by their points and the edges that cross.

    Rings of very many points count as overlapping where their boxes do.

    Args:
        one: Ring, (x, y) [k, 2].
        other: Ring in the same frame.
    """
    if (one.max(axis=0) <= other.min(axis=0)).any() or (other.max(axis=0) <= one.min(axis=0)).any():
        return False
    if len(one) * len(other) > OVERLAP_WORK:
        return True
    return bool(_in_ring(other, one).any() or _in_ring(one, other).any() or _cross(one, other))


def _in_ring(points: NDArray[np.float64], ring: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Test points [k, 2] against one ring [e, 2] by the non-zero rule."""
    lows, highs = ring.min(axis=0), ring.max(axis=0)
    found: NDArray[np.bool_] = ((points >= lows) & (points <= highs)).all(axis=1)
    near = np.flatnonzero(found)
    x1, y1 = ring.T
    x2, y2 = np.roll(x1, -1), np.roll(y1, -1)
    step = max(1, _AT_ONCE // len(ring))
    for start in range(0, len(near), step):
        here = near[start : start + step]
        x, y = points[here, 0, None], points[here, 1, None]
        crosses = (y1 > y) != (y2 > y)  # [k, e]; a vertex belongs to the edge above it
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
        turns = np.where(crosses & (x < at), np.sign(y2 - y1), 0)
        found[here] = turns.sum(axis=1) != 0
    return found


def _cross(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Return whether an edge of one ring crosses one of another, away from its ends."""
    c, d = other, np.roll(other, -1, axis=0)
    step = max(1, _AT_ONCE // len(other))
    starts, ends = one, np.roll(one, -1, axis=0)
    for begin in range(0, len(one), step):
        a, b = starts[begin : begin + step, None], ends[begin : begin + step, None]
        sides = _side(a, b, c) * _side(a, b, d)
        if ((sides < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).any():
            return True
    return False


def _side(
    a: NDArray[np.float64], b: NDArray[np.float64], point: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return on which side of the line from a to b a point lies: the sign of the cross product."""
    along, to = b - a, point - a
    return np.sign(along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])
