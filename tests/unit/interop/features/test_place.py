"""Patches on the grid, against a loop over rectangles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip.geometry import Tiling, patch_rects
from pathflip.interop.features.place import (
    ALIGNED,
    patch_corners,
    place,
    place_consecutively,
    spacing,
)

GRID = Tiling(region_um=256, patch_um=64, mpp=0.5)


def slowly(centres, *, mpp, extent=None):
    """{(rx, ry, slot): patch}, and the counts, by looking at every rectangle there may be."""
    limit = int(max(centres.max(initial=0), 0) * mpp / GRID.region_um) + 2
    best, doubled, outside = {}, 0, 0
    for number, (x, y) in enumerate(centres):
        if x < 0 or y < 0 or (extent and (x >= extent[0] or y >= extent[1])):
            outside += 1
            continue
        found = [
            (rx, ry, slot)
            for rx in range(limit)
            for ry in range(limit)
            for slot, (x0, y0, w, h) in enumerate(patch_rects(GRID, rx=rx, ry=ry, mpp=mpp))
            if x0 <= x < x0 + w and y0 <= y < y0 + h
        ]
        assert len(found) == 1
        rx, ry, slot = found[0]
        pitch = GRID.patch_um / mpp
        off = max(
            abs(x / pitch - (rx * GRID.side + slot % GRID.side + 0.5)),
            abs(y / pitch - (ry * GRID.side + slot // GRID.side + 0.5)),
        )
        if found[0] in best:
            doubled += 1
        if found[0] not in best or off < best[found[0]][0]:
            best[found[0]] = (off, number)
    aligned = sum(off <= ALIGNED for off, _ in best.values())
    return {cell: number for cell, (_, number) in best.items()}, doubled, outside, aligned


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-300, 1400), st.integers(-300, 1400)), max_size=12),
    st.sampled_from([0.25, 0.2738, 0.5, 0.91]),
    st.booleans(),
)
def test_every_patch_goes_to_the_slot_of_its_centre(corner, mpp, bounded) -> None:
    size = round(64 / mpp)
    centres = np.array(corner, float).reshape(-1, 2) + size / 2
    extent = (1000, 900) if bounded else None

    placed = place(GRID, centres, mpp=mpp, extent=extent)

    cells, doubled, outside, aligned = slowly(centres, mpp=mpp, extent=extent)
    found = {
        (int(placed.rx[at]), int(placed.ry[at]), int(slot)): int(placed.source[at, slot])
        for at, slot in np.argwhere(placed.source >= 0)
    }
    assert found == cells
    assert (placed.doubled, placed.outside, placed.aligned) == (doubled, outside, aligned)
    order = list(zip(placed.ry.tolist(), placed.rx.tolist(), strict=True))
    assert order == sorted(set(order))
    assert placed.placed + doubled + outside == len(centres)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.2738, 0.5, 0.77]))
def test_patches_of_the_grid_come_back_to_their_slots(seed, mpp) -> None:
    rng = np.random.default_rng(seed)
    cells = sorted({(int(ry), int(rx)) for rx, ry in rng.integers(0, 6, (3, 2))})
    ry, rx = (np.array(column, np.int32) for column in zip(*cells, strict=True))
    mask = rng.random((len(cells), GRID.slots)) < 0.6
    mask[:, 3] = True

    places, region, slot = patch_corners(GRID, rx=rx, ry=ry, mask=mask, mpp=mpp)
    back = place(GRID, places + GRID.patch_um / mpp / 2, mpp=mpp)

    assert back.rx.tolist() == rx.tolist()
    assert back.ry.tolist() == ry.tolist()
    assert ((back.source >= 0) == mask).all()
    assert (back.source[region, slot] == np.arange(len(places))).all()
    assert back.aligned == len(places)
    assert not back.doubled
    assert (np.lexsort((places[:, 0], places[:, 1])) == np.arange(len(places))).all()


@pytest.mark.parametrize(("n", "regions"), [(1, 1), (16, 1), (17, 2), (0, 0)])
def test_patches_without_places_fill_regions_in_order(n: int, regions: int) -> None:
    placed = place_consecutively(GRID, n)
    assert placed.source.shape == (regions, 16)
    assert placed.source[placed.source >= 0].tolist() == list(range(n))
    assert placed.rx.tolist() == list(range(regions))


def test_the_spacing_is_the_commonest_step() -> None:
    rows = [[0, 0], [100, 0], [200, 0], [450, 0], [30, 100], [130, 100]]
    assert spacing(np.array(rows, float)) == 100
    assert spacing(np.array([[0, 0], [0, 100]], float)) is None
