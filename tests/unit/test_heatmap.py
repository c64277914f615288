"""Heat on the grid, as a map and as boxes: closed forms, and files that read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathflip.geometry import Tiling, edge
from pathflip.heatmap import (
    Box,
    HeatmapGrid,
    find_boxes,
    heat_map,
    heatmap_grid,
    normalise,
    otsu,
    overlay,
    patch_heat,
    patch_list,
    resample,
    slide_rects,
    smooth,
    to_geojson,
    write_geojson,
    write_png,
)
from pathflip.interop.annotation_files import read_objects

TILING = Tiling(region_um=128.0, patch_um=32.0, mpp=0.5)


def grid_of(heat: np.ndarray, tissue: np.ndarray | None = None, **at: float) -> HeatmapGrid:
    tissue = np.ones(heat.shape, np.bool_) if tissue is None else tissue
    settings = {"column0": 0, "row0": 0, "patch_um": 32.0, "mpp": 0.5} | at
    return HeatmapGrid(heat=np.where(tissue, heat, 0.0), tissue=tissue, **settings)  # type: ignore[arg-type]


def test_slots_go_to_their_cells() -> None:
    xy = np.array([[2, 1], [3, 1], [2, 3]])
    heat = np.arange(48, dtype=np.float64).reshape(3, 16) + 1
    mask = np.ones((3, 16), np.bool_)
    mask[0, :4] = False
    found = heatmap_grid(heat, mask, xy, TILING, mpp=0.37)
    assert (found.column0, found.row0) == (8, 4)
    assert found.heat.shape == (12, 8)
    assert found.tissue.sum() == 44
    for n, (rx, ry) in enumerate(xy):
        for slot in range(16):
            row, column = 4 * ry + slot // 4 - 4, 4 * rx + slot % 4 - 8
            assert found.heat[row, column] == (heat[n, slot] if mask[n, slot] else 0)
            assert found.tissue[row, column] == mask[n, slot]
    np.testing.assert_array_equal(patch_heat(found, mask, xy, TILING), heat[mask])


def test_smoothing_stays_inside_the_tissue_and_keeps_constants() -> None:
    rng = np.random.default_rng(0)
    tissue = rng.uniform(size=(12, 15)) < 0.7
    flat = smooth(grid_of(np.full((12, 15), 3.0), tissue))
    assert flat.heat[tissue] == pytest.approx(3.0)
    assert not flat.heat[~tissue].any()
    heat = rng.uniform(size=(12, 15))
    found = smooth(grid_of(heat, tissue), sigma=1.3)
    y, x = np.nonzero(tissue)
    for i in (0, len(x) // 2, len(x) - 1):  # the mean, patch by patch
        near = (x - x[i]) ** 2 + (y - y[i]) ** 2
        weight = np.exp(-near / (2 * 1.3**2)) * (np.abs(x - x[i]) <= 5) * (np.abs(y - y[i]) <= 5)
        expected = (weight * heat[y, x]).sum() / weight.sum()
        assert found.heat[y[i], x[i]] == pytest.approx(expected, rel=1e-9)
    assert smooth(grid_of(heat, tissue), sigma=0).heat is not None


def test_normalise_clips_at_the_percentile() -> None:
    heat = np.arange(200, dtype=np.float64).reshape(10, 20)
    found = normalise(grid_of(heat))
    top = np.percentile(heat, 99)
    assert found.heat == pytest.approx(np.minimum(heat / top, 1))
    one = np.zeros((10, 20))
    one[3, 3] = 5  # the percentile is 0: the maximum is taken instead
    assert normalise(grid_of(one)).heat.sum() == 1
    assert not normalise(grid_of(np.full((4, 4), -1.0))).heat.any()


def test_a_picture_is_bilinear_between_patch_centres_and_off_tissue_untouched() -> None:
    tissue = np.ones((6, 5), np.bool_)
    tissue[0, :] = tissue[3, 3] = False
    y, x = np.mgrid[0:6, 0:5]
    ramp = grid_of(0.1 * x + 0.05 * y, tissue, column0=2, row0=1)
    heat, cover = resample(ramp, width=300, height=280, mpp=1.0)
    for px, py in ((2.5, 3.5), (3.7, 5.2), (4.1, 4.0), (6.4, 2.6)):  # patches from the corner
        i, j = round(py * 32 - 0.5), round(px * 32 - 0.5)
        u, v = (j + 0.5) / 32 - 2 - 0.5, (i + 0.5) / 32 - 1 - 0.5
        assert cover[i, j] == 1
        if tissue[max(0, int(v)) : int(v) + 2, max(0, int(u)) : int(u) + 2].all():
            assert heat[i, j] == pytest.approx(0.1 * u + 0.05 * v, abs=4e-3)
    on = np.repeat(np.repeat(tissue, 32, axis=0), 32, axis=1)
    assert (cover[32:224, 64:224] == on).all()
    assert cover.sum() == on.sum()
    picture = np.full((280, 300, 3), 200, np.uint8)
    drawn = overlay(picture, ramp, mpp=1.0)
    assert (drawn[cover == 0] == 200).all()
    assert (drawn[heat > 0.1] != 200).any(axis=-1).all()
    solid = overlay(picture, replace(ramp, heat=np.where(tissue, 1.0, 0.0)), mpp=1.0, opacity=1.0)
    red = cv2.applyColorMap(np.full((1, 1), 255, np.uint8), cv2.COLORMAP_TURBO)[0, 0, ::-1]
    assert (solid[cover == 1] == red).all()


def test_the_map_lies_where_the_patches_are() -> None:
    """One hot patch of a slide at 0.37 µm/px is hottest at its own centre in the thumbnail."""
    xy = np.array([[1, 2]])
    heat = np.zeros((1, 16))
    heat[0, 6] = 1
    found = heatmap_grid(heat, np.ones((1, 16)), xy, TILING, mpp=0.37)
    pixels, _ = resample(found, width=600, height=800, mpp=0.8)
    row, column = np.unravel_index(int(pixels.argmax()), pixels.shape)
    x0, y0, w0, h0 = slide_rects(xy, TILING, mpp=0.37)[0, 6]
    assert (column + 0.5) * 0.8 == pytest.approx((x0 + w0 / 2) * 0.37, abs=0.8)
    assert (row + 0.5) * 0.8 == pytest.approx((y0 + h0 / 2) * 0.37, abs=0.8)


def test_otsu_is_opencvs() -> None:
    rng = np.random.default_rng(1)
    for low, high in ((0.2, 0.7), (0.1, 0.4), (0.45, 0.55)):
        values = np.concatenate([rng.normal(low, 0.04, 700), rng.normal(high, 0.06, 200)])
        levels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
        theirs, _ = cv2.threshold(levels[None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        split = levels > theirs
        assert ((levels / 255 >= otsu(levels / 255)) == split).mean() > 0.995
    assert otsu(np.full(9, 0.5)) == 0


def test_boxes_are_where_heat_is() -> None:
    heat = np.full((20, 30), 0.05)
    heat[2:5, 3:7] = 1.0  # 12 patches
    heat[10:12, 10:12] = 0.9  # 4, and one more that touches by a corner
    heat[12, 12] = 0.9
    heat[16, 20:23] = 1.0  # 3: too few
    heat[18, 2:8] = 0.4  # below half of the maximum
    grid = grid_of(heat, column0=8, row0=4, mpp=0.37)
    boxes = find_boxes(grid)
    assert [box.patches for box in boxes] == [12, 5]
    first, second = boxes
    lines = edge(np.array([8 + 3, 8 + 7, 4 + 2, 4 + 5]), unit_um=32.0, mpp=0.37).tolist()
    assert (first.x0, first.x0 + first.w0, first.y0, first.y0 + first.h0) == tuple(lines)
    assert first.score == pytest.approx(12)
    assert second.score == pytest.approx(4.5)
    um = first.as_json()
    assert um["x_um"] == pytest.approx(11 * 32, abs=0.37)
    assert um["w_um"] == pytest.approx(4 * 32, abs=0.37)
    assert [box.patches for box in find_boxes(grid, min_patches=1)] == [12, 5, 3]
    assert len(find_boxes(grid, max_boxes=1)) == 1
    assert find_boxes(grid_of(np.zeros((4, 4)))) == []
    shares = grid_of(heat / heat.sum())
    assert find_boxes(grid, heat=shares)[0].score == pytest.approx(12 / heat.sum())


def test_heat_of_a_lesion_becomes_its_box() -> None:
    rng = np.random.default_rng(2)
    heat = rng.uniform(0, 0.2, (24, 24))
    heat[6:11, 14:18] += 1
    (box,) = find_boxes(heat_map(grid_of(heat)))
    left, top = box.x0 / 64, box.y0 / 64  # patches of 64 px
    assert abs(left - 14) <= 1
    assert abs(top - 6) <= 1
    assert abs(box.w0 / 64 - 4) <= 2
    assert abs(box.h0 / 64 - 5) <= 2


def test_files_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = write_png(tmp_path / "new" / "a.png", picture)
    assert (cv2.imread(str(path))[..., ::-1] == picture).all()
    box = Box(x0=100, y0=50, w0=640, h0=320, mpp=0.5, score=0.25, patches=8)
    rects = slide_rects(np.array([[1, 1]]), TILING, mpp=0.37)[0]
    heat = rng.uniform(size=16)
    file = tmp_path / "a.geojson"
    options = {"slide_id": "s", "text": "necrosis", "boxes": [box], "rects": rects, "heat": heat}
    document = to_geojson(bounds_x0=10, bounds_y0=20, **options)  # type: ignore[arg-type]
    first = write_geojson(file, document).read_bytes()
    document = to_geojson(bounds_x0=10, bounds_y0=20, **options)  # type: ignore[arg-type]
    write_geojson(file, document)
    assert file.read_bytes() == first
    assert json.loads(first)["type"] == "FeatureCollection"
    objects = read_objects(file, bounds_x0=10, bounds_y0=20)
    assert [item.object_type for item in objects] == ["annotation", *["tile"] * 16]
    assert {item.classification for item in objects} == {"necrosis"}
    corners = objects[0].polygons[0][0]
    assert corners.min(axis=0).tolist() == [100, 50]
    assert corners.max(axis=0).tolist() == [740, 370]
    assert objects[0].measurements["score"] == 0.25
    assert objects[0].measurements["area_mm2"] == pytest.approx(0.32 * 0.16)
    for item, (x, y, w, h), value in zip(objects[1:], rects.tolist(), heat, strict=True):
        ring = item.polygons[0][0]
        assert [*ring.min(axis=0), *(ring.max(axis=0) - ring.min(axis=0))] == [x, y, w, h]
        assert item.measurements["heat"] == pytest.approx(value)


def test_patch_list_has_only_what_is_kept() -> None:
    rects = slide_rects(np.array([[0, 0]]), TILING, mpp=0.5)
    mask = np.zeros((1, 16), np.bool_)
    mask[0, 5] = True
    assert patch_list(np.full((1, 16), 0.5), mask, rects) == [
        {"x0": 64, "y0": 64, "size0": 64, "heat": 0.5}
    ]
