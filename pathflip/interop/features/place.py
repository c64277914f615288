"""Places patches of other tools on the archive's grid. Pure functions.

A patch belongs to the slot that holds its centre. Other tools cut in whole pixels at a nominal
magnification, or from the corner of each piece of tissue, so their patches rarely lie exactly on
the grid, which is laid out in µm: how far off they are is said, not mended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathflip.geometry import Tiling, edge, patch_at, patch_rects

ALIGNED = 0.05
"""Largest distance between the centres of a patch and of its slot, as a share of the slot's side,
at which the patch counts as aligned."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Patches of one slide on the grid: R regions, ordered by (ry, rx).

    Attributes:
        rx: Grid column [R].
        ry: Grid row [R].
        source: Number of the patch in each slot [R, slots]; -1 where there is none.
        doubled: Patches left out because a nearer one has their slot.
        outside: Patches left out because their centre is beyond the slide's edge.
        aligned: Patches placed whose centre is that of their slot, within :data:`ALIGNED`.
    """

    rx: NDArray[np.int32]
    ry: NDArray[np.int32]
    source: NDArray[np.int64]
    doubled: int
    outside: int
    aligned: int

    @property
    def placed(self) -> int:
        """Number of patches placed."""
        return int((self.source >= 0).sum())


def place(
    tiling: Tiling,
    centres: NDArray[np.float64],
    *,
    mpp: float,
    extent: tuple[int, int] | None = None,
) -> Placement:
    """Give every patch the slot that holds its centre.

    Args:
        tiling: The archive's grid.
        centres: (x, y) of the patches' centres, level-0 px [n, 2].
        mpp: Level-0 µm/px.
        extent: Width and height of the slide, level-0 px, where known.

    Returns:
        The placement. Of patches with one slot the nearest to its centre has it; of equally near
        ones the first.
    """
    inside = (centres >= 0).all(axis=1) & np.isfinite(centres).all(axis=1)
    if extent is not None:
        inside &= (centres < np.asarray(extent)).all(axis=1)
    number = np.flatnonzero(inside)
    x, y = centres[number, 0], centres[number, 1]
    rx, ry, slot = patch_at(tiling, x0=x, y0=y, mpp=mpp)
    side = tiling.side
    column, row = rx * side + slot % side, ry * side + slot // side
    off = np.maximum(_off(x, column, tiling, mpp), _off(y, row, tiling, mpp))
    # Row by row of regions, then slots; in a slot the nearest first, then the first in the file.
    order = np.lexsort((number, off, slot, rx, ry))
    rx, ry, slot, off, number = rx[order], ry[order], slot[order], off[order], number[order]
    new_region = _changes(ry) | _changes(rx)
    first = new_region | _changes(slot)
    region = np.cumsum(new_region) - 1
    source = np.full((int(new_region.sum()), tiling.slots), -1, np.int64)
    source[region[first], slot[first]] = number[first]
    return Placement(
        rx=rx[new_region].astype(np.int32),
        ry=ry[new_region].astype(np.int32),
        source=source,
        doubled=int((~first).sum()),
        outside=len(centres) - len(number),
        aligned=int((off[first] <= ALIGNED).sum()),
    )


def place_consecutively(tiling: Tiling, n: int) -> Placement:
    """Fill regions with patches that have no places, in the order of the file.

    The regions lie in one row, which says nothing about where on the slide they were.
    """
    count = -(-n // tiling.slots)
    source = np.full(count * tiling.slots, -1, np.int64)
    source[:n] = np.arange(n)
    return Placement(
        rx=np.arange(count, dtype=np.int32),
        ry=np.zeros(count, np.int32),
        source=source.reshape(count, tiling.slots),
        doubled=0,
        outside=0,
        aligned=n,
    )


def corners(
    tiling: Tiling, *, rx: NDArray[np.int32], ry: NDArray[np.int32], mpp: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return left and top edges of regions, level-0 px."""
    side = tiling.side
    return (
        edge(rx.astype(np.int64) * side, unit_um=tiling.patch_um, mpp=mpp),
        edge(ry.astype(np.int64) * side, unit_um=tiling.patch_um, mpp=mpp),
    )


def patch_corners(
    tiling: Tiling,
    *,
    rx: NDArray[np.int32],
    ry: NDArray[np.int32],
    mask: NDArray[np.bool_],
    mpp: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the patches of regions row by row of the whole slide.

    Args:
        tiling: The archive's grid.
        rx: Grid columns of the regions [R].
        ry: Grid rows of the regions [R].
        mask: Patches there are [R, slots].
        mpp: Level-0 µm/px.

    Returns:
        Top left corners (x, y), level-0 px [n, 2]; the region [n] and the slot [n] of each.
    """
    rects = [
        patch_rects(tiling, rx=int(x), ry=int(y), mpp=mpp)[:, :2]
        for x, y in zip(rx, ry, strict=True)
    ]
    every = np.stack(rects) if rects else np.zeros((0, tiling.slots, 2), np.int64)
    region, slot = np.nonzero(mask)
    places = every[region, slot]
    order = np.lexsort((places[:, 0], places[:, 1]))
    return places[order], region[order], slot[order]


def spacing(places: NDArray[np.float64]) -> float | None:
    """Return the distance between neighbouring patches of a row; None where no two are in one.

    It is the commonest one: pieces of tissue that are cut from corners of their own meet anyhow.
    """
    order = np.lexsort((places[:, 0], places[:, 1]))
    x, y = places[order, 0], places[order, 1]
    steps = np.diff(x)[(np.diff(y) == 0) & (np.diff(x) > 0)]
    if not len(steps):
        return None
    values, counts = np.unique(steps, return_counts=True)
    return float(values[counts.argmax()])


def _off(
    centre: NDArray[np.float64], cell: NDArray[np.int64], tiling: Tiling, mpp: float
) -> NDArray[np.float64]:
    """Return how far centres lie from the middle of their cell, as a share of its side."""
    pitch = tiling.patch_um / mpp
    return np.asarray(np.abs(centre / pitch - (cell + 0.5)))


def _changes(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where a sorted column has another value than before [n]; True at its start."""
    changed = np.ones(len(values), np.bool_)
    changed[1:] = values[1:] != values[:-1]
    return changed
