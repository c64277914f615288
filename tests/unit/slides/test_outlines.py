"""Outlines of masks and their inverse, against a slow reference and OpenCV."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.evaluation.grounding import inside
from pathflip.interop.annotation_files import read_tissue
from pathflip.slides.tissue import TissueMask

masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def collection(tissue: TissueMask) -> dict[str, object]:
    return {
        "type": "MultiPolygon",
        "coordinates": [
            [[*ring.tolist(), ring[0].tolist()] for ring in (outer, *holes)]
            for outer, holes in tissue.polygons()
        ],
    }


@settings(max_examples=300, deadline=None)
@given(mask=masks, slide_mpp=st.sampled_from([0.25, 0.2738, 0.499]))
def test_polygons_filled_again_are_the_mask(
    tmp_path_factory: pytest.TempPathFactory, mask: NDArray[np.bool_], slide_mpp: float
) -> None:
    tissue = TissueMask(mask, 8.0, slide_mpp)
    polygons = tissue.polygons()
    pieces, _ = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    assert len(polygons) == pieces - 1
    area = 0.0
    for outer, holes in polygons:
        for ring, sign in ((outer, 1), *((hole, -1) for hole in holes)):
            assert len(np.unique(ring, axis=0)) == len(ring), "a ring meets itself"
            x, y = ring.T
            signed = (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 * (slide_mpp / 8) ** 2
            assert signed * sign > 0
            area += signed
    assert area == pytest.approx(np.count_nonzero(mask))
    if not polygons:
        return
    path = tmp_path_factory.getbasetemp() / "mask.geojson"
    path.write_text(json.dumps(collection(tissue)))
    # The largest whole slide that needs this many mask pixels.
    h, w = (math.floor(n * 8 / slide_mpp) for n in mask.shape)
    back = read_tissue(path, width=w, height=h, slide_mpp=slide_mpp)
    assert np.array_equal(back.mask, mask)


def test_polygons_agree_with_opencv_on_a_ring_with_an_island() -> None:
    mask = np.zeros((30, 30), np.bool_)
    mask[2:28, 2:28] = True
    mask[8:22, 8:22] = False
    mask[12:18, 12:18] = True
    polygons = TissueMask(mask, 8.0, 8.0).polygons()
    _, tree = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    assert len(polygons) == np.count_nonzero(tree[0, :, 3] < 0) == 2
    assert sum(len(holes) for _, holes in polygons) == np.count_nonzero(tree[0, :, 3] >= 0) == 1
    ring, island = polygons
    assert sorted(map(tuple, ring[0])) == [(2, 2), (2, 28), (28, 2), (28, 28)]
    assert sorted(map(tuple, ring[1][0])) == [(8, 8), (8, 22), (22, 8), (22, 22)]
    assert sorted(map(tuple, island[0])) == [(12, 12), (12, 18), (18, 12), (18, 18)]


def test_annotation_is_filled_where_pixel_centres_are_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    triangle = [[100.0, 40.0], [1900.5, 300.0], [700.0, 1500.0]]
    hole = [[600.0, 400.0], [900.0, 400.0], [900.0, 700.0], [600.0, 700.0]]
    geometry = {"type": "Polygon", "coordinates": [[*r, r[0]] for r in (triangle, hole)]}
    path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    tissue = read_tissue(path, width=2000, height=1600, slide_mpp=0.499)
    assert tissue.mask.shape == (100, 125)
    yy, xx = (np.mgrid[:100, :125] + 0.5) * 8 / 0.499
    expected = np.ones((100, 125), np.bool_)
    for a, b in zip(triangle, triangle[1:] + triangle[:1], strict=True):
        expected &= (b[0] - a[0]) * (yy - a[1]) - (b[1] - a[1]) * (xx - a[0]) > 0
    expected &= ~((xx > 600) & (xx < 900) & (yy > 400) & (yy < 700))
    assert np.array_equal(tissue.mask, expected)

    shifted = read_tissue(
        path, width=2000, height=1600, slide_mpp=0.499, bounds_x0=160, bounds_y0=320
    )
    assert np.count_nonzero(shifted.mask) != np.count_nonzero(tissue.mask)
    assert np.array_equal(
        shifted.mask,
        read_tissue(
            _moved(path, tmp_path / "b.geojson", dx=160, dy=320),
            width=2000,
            height=1600,
            slide_mpp=0.499,
        ).mask,
    )


@settings(max_examples=100, deadline=None)
@given(
    corners=st.lists(
        st.tuples(st.floats(-300, 1300), st.floats(-300, 1300)), min_size=3, max_size=7
    )
)
def test_any_polygon_holds_what_it_goes_round(
    tmp_path_factory: pytest.TempPathFactory, corners: list[tuple[float, float]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.geojson"
    box = [[-9, -9], [-9, 0.1], [0.1, 0.1], [0.1, -9]]  # keeps the file on the slide
    path.write_text(
        json.dumps({"type": "MultiPolygon", "coordinates": [[[*corners, corners[0]]], [box]]})
    )
    mask = read_tissue(path, width=1000, height=800, slide_mpp=0.2738).mask
    for i, j in np.ndindex(mask.shape):
        x, y, turned = (j + 0.5) * 8 / 0.2738, (i + 0.5) * 8 / 0.2738, 0.0
        margin = math.inf
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            margin = min(margin, abs(y1 - y))
            if (y1 > y) != (y2 > y):
                at = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
                margin = min(margin, abs(at - x))
            # The angle under which the edge is seen; all of them are whole turns.
            ax, ay, bx, by = x1 - x, y1 - y, x2 - x, y2 - y
            turned += math.atan2(ax * by - ay * bx, ax * bx + ay * by)
        if margin > 1e-6:  # on the line either answer is right
            assert mask[i, j] == (abs(turned) > math.pi)


def test_a_ring_that_overlaps_itself_keeps_the_overlap(tmp_path: Path) -> None:
    """A second lap over the first, of the outer ring and of a hole: both are unions of boxes."""

    def laps(x: int, y: int, unit: int) -> list[list[int]]:
        corners = [(1, 1), (4, 1), (4, 4), (1, 4), (1, 0), (3, 0), (3, 3), (0, 3), (0, 0), (1, 0)]
        return [[x + unit * a, y + unit * b] for a, b in [*corners, corners[0]]]

    def boxes(x: int, y: int, unit: int) -> np.ndarray:
        yy, xx = (np.mgrid[:100, :100] + 0.5) * 16
        xx, yy = (xx - x) / unit, (yy - y) / unit
        first = (xx > 1) & (xx < 4) & (yy > 1) & (yy < 4)
        return first | ((xx > 0) & (xx < 3) & (yy > 0) & (yy < 3))

    path = tmp_path / "a.geojson"
    rings = [laps(160, 160, 320), laps(640, 640, 64)]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": rings}))
    mask = read_tissue(path, width=1600, height=1600, slide_mpp=0.5).mask
    assert np.array_equal(mask, boxes(160, 160, 320) & ~boxes(640, 640, 64))
    outer, hole = (np.array(ring[:-1], np.float64) for ring in rings)
    centres = (np.stack(np.mgrid[:100, :100][::-1], -1).reshape(-1, 2) + 0.5) * 16
    assert np.array_equal(inside(centres, [(outer, [hole])]), mask.ravel())


def _moved(source: Path, target: Path, *, dx: float, dy: float) -> Path:
    feature = json.loads(source.read_text())
    rings = feature["geometry"]["coordinates"]
    feature["geometry"]["coordinates"] = [[[x + dx, y + dy] for x, y in r] for r in rings]
    target.write_text(json.dumps(feature))
    return target


def test_overlapping_annotations_add_up_and_reach_beyond_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    boxes = [(-500, -500, 400, 400), (160, 160, 9000, 9000)]
    path.write_text(
        json.dumps(
            [
                {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]}
                for a, b, c, d in boxes
            ]
        )
    )
    mask = read_tissue(path, width=800, height=640, slide_mpp=0.5).mask
    expected = np.zeros((40, 50), np.bool_)
    expected[:25, :25] = True
    expected[10:, 10:] = True
    assert np.array_equal(mask, expected)


def test_annotation_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.geojson"
    far = [[5000, 0], [6000, 0], [6000, 900], [5000, 0]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [far]}))
    with pytest.raises(ConfigError, match=r"other\.geojson"):
        read_tissue(path, width=800, height=640, slide_mpp=0.5)
