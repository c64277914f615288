"""Segmentation from stored features: labels by hand, outlines against the cells they enclose."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.evaluation.segment_stored import outline, segment_stored
from tests.archives import make_archive

TAU = 0.1


def inside(rings: list[list[tuple[int, int]]], x: float, y: float) -> bool:
    """Even-odd rule: a ray to the right crosses an odd number of upright sides."""
    crossed = 0
    for ring in rings:
        for (ax, ay), (bx, by) in itertools.pairwise(ring):
            if ax == bx > x and min(ay, by) < y < max(ay, by):
                crossed += 1
    return crossed % 2 == 1


def area(ring: list[tuple[int, int]]) -> float:
    """Shoelace: positive for a ring with its inside on the right, y pointing down."""
    return sum(ax * by - bx * ay for (ax, ay), (bx, by) in itertools.pairwise(ring)) / 2


def grown(rng: np.random.Generator, *, h: int, w: int, count: int) -> np.ndarray:
    """Cells that touch by sides, with holes and corners that meet."""
    cells = np.zeros((h, w), np.bool_)
    cells[h // 2, w // 2] = True
    for _ in range(count):
        near = np.zeros_like(cells)
        near[1:] |= cells[:-1]
        near[:-1] |= cells[1:]
        near[:, 1:] |= cells[:, :-1]
        near[:, :-1] |= cells[:, 1:]
        choice = np.argwhere(near & ~cells)
        cells[tuple(choice[rng.integers(len(choice))])] = True
    return cells


@pytest.mark.parametrize("seed", range(12))
def test_outlines_enclose_their_cells(seed: int) -> None:
    cells = grown(np.random.default_rng(seed), h=9, w=11, count=10 + 4 * seed)
    rings = outline(cells)
    assert all(ring[0] == ring[-1] for ring in rings)
    for row in range(cells.shape[0]):
        for column in range(cells.shape[1]):
            assert inside(rings, column + 0.5, row + 0.5) == cells[row, column]
    areas = [area(ring) for ring in rings]
    assert sum(areas) == cells.sum()
    assert areas[0] > 0  # the outer ring, then holes
    assert all(one < 0 for one in areas[1:])
    for ring in rings:  # only corners: no three in a line
        for a, b, c in zip(ring, ring[1:], ring[2:], strict=False):
            assert (a[0] == b[0]) != (b[0] == c[0])


def test_an_outline_by_hand() -> None:
    assert outline(np.ones((1, 2), np.bool_)) == [[(0, 0), (2, 0), (2, 1), (0, 1), (0, 0)]]
    ring = np.ones((3, 3), np.bool_)
    ring[1, 1] = False
    assert outline(ring) == [
        [(0, 0), (3, 0), (3, 3), (0, 3), (0, 0)],
        [(1, 1), (1, 2), (2, 2), (2, 1), (1, 1)],
    ]


def test_labels_are_the_nearest_classes_and_areas_their_parts(tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "archive", slides=3, captions=False))
    weights = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 3)))[0].T
    names, slide = ["a", "b", "c"], "slide001"
    found = segment_stored(
        archive, slide, names, weights.astype(np.float32), tau=TAU, encoder="tex", min_patches=1
    )
    features, mask, _ = archive.features_array(slide)
    regions = archive.regions(slide).to_pylist()
    seen = {name: 0 for name in names}
    best = {}
    for number, region in enumerate(regions):
        for slot in np.flatnonzero(mask[number]).tolist():
            value = features[number, slot].astype(np.float64)
            cosines = weights @ value / np.linalg.norm(value)
            odds = np.exp(cosines / TAU)
            label = int(cosines.argmax())
            row, column = region["ry"] * 4 + slot // 4, region["rx"] * 4 + slot % 4
            assert found.labels[row - found.row0, column - found.column0] == label
            seen[names[label]] += 1
            best[row, column] = label, odds[label] / odds.sum()
    assert (found.labels != 255).sum() == mask.sum()
    document = found.as_json()
    assert document["shares"] == pytest.approx({k: v / mask.sum() for k, v in seen.items()})
    # Every patch is in one area, on lines of 64 µm = 128 px.
    assert sum(one["patches"] for one in document["areas"]) == mask.sum()
    for one in found.areas:
        rings = [[(x // 128, y // 128) for x, y in ring] for ring in one.rings]
        mine = [at for at in best if inside(rings, at[1] + 0.5, at[0] + 0.5)]
        assert len(mine) == one.box.patches
        assert {best[at][0] for at in mine} == {names.index(one.label)}
        assert one.box.score == pytest.approx(np.mean([best[at][1] for at in mine]), abs=1e-5)
        rows, columns = zip(*mine, strict=True)
        assert (one.box.x0, one.box.y0) == (128 * min(columns), 128 * min(rows))
        assert (one.box.w0, one.box.h0) == (
            128 * (max(columns) - min(columns) + 1), 128 * (max(rows) - min(rows) + 1),
        )  # fmt: skip
    shapes = found.geojson()["features"]
    assert [one["properties"]["name"] for one in shapes] == [one.label for one in found.areas]
    assert len({one["id"] for one in shapes}) == len(shapes)
    larger = segment_stored(
        archive, slide, names, weights.astype(np.float32), tau=TAU, encoder="tex", min_patches=3
    )
    assert [one.rings for one in larger.areas] == [
        one.rings for one in found.areas if one.box.patches >= 3
    ]
