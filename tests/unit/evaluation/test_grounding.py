"""Grounding: planted heat has known values, random heat gives chance, outlines are cut exactly."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn import config_context
from sklearn.metrics import average_precision_score

from pathflip.errors import ConfigError
from pathflip.evaluation.encode import list_slides
from pathflip.evaluation.grounding import (
    Pair,
    chance_ap,
    grounding,
    inside,
    measure,
    point,
    read_outlines,
    summarise,
)
from pathflip.heatmap import slide_rects
from tests.unit.evaluation.planted import TILING

QUERIES = {"tumour": "tumour", "necrosis": "necrosis"}


def test_points_in_polygons_are_opencvs() -> None:
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
    radius = rng.uniform(20, 100, 40)
    outer = np.stack([150 + radius * np.cos(angles), 150 + radius * np.sin(angles)], axis=1)
    hole = np.array([[140, 140], [165, 140], [150, 165]], np.float64)
    far = np.array([[300, 300], [340, 300], [340, 310], [300, 310]], np.float64)
    points = rng.uniform(0, 360, (4000, 2))
    found = inside(points, [(outer, [hole]), (far, [])])

    def opencv(ring: np.ndarray) -> np.ndarray:
        contour = ring.astype(np.float32)[:, None]
        return np.array(
            [cv2.pointPolygonTest(contour, (float(x), float(y)), False) > 0 for x, y in points]
        )

    expected = (opencv(outer) & ~opencv(hole)) | opencv(far)
    assert (found == expected).mean() > 0.9995  # a point may lie on a float32 edge
    assert found.sum() > 300


def test_points_in_a_rectangle_in_closed_form() -> None:
    ring = np.array([[10, 20], [30, 20], [30, 50], [10, 50]], np.float64)
    x, y = np.meshgrid(np.arange(0.5, 40), np.arange(0.5, 60))
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    expected = (points[:, 0] > 10) & (points[:, 0] < 30) & (points[:, 1] > 20) & (points[:, 1] < 50)
    for turned in (ring, ring[::-1], np.roll(ring, 1, axis=0)):
        assert (inside(points, [(turned, [])]) == expected).all()
    assert inside(points, []).sum() == 0


def test_chance_ap_is_the_mean_over_all_orders() -> None:
    for right, patches in ((1, 4), (2, 5), (3, 6), (6, 6), (3, 9)):
        # As many orders as any other have the right patches in these places.
        places = [list(chosen) for chosen in combinations(range(patches), right)]
        truths = [np.isin(np.arange(patches), chosen) for chosen in places]
        heat = np.arange(patches, 0, -1, dtype=np.float64)
        mean = np.mean([average_precision_score(truth, heat) for truth in truths])
        assert chance_ap(right, patches) == pytest.approx(mean, abs=1e-12)
    assert chance_ap(1, 1) == 1


def test_measure_has_known_values() -> None:
    right = np.array([0, 1, 1, 0, 0], np.bool_)
    assert measure([0, 2, 1, 0, 0], right) == (1, 1)
    assert measure([9, 2, 1, 0, 0], right) == (0, pytest.approx((1 / 2 + 2 / 3) / 2))
    assert measure([1, 1, 1, 1, 1], right) == (pytest.approx(0.4), pytest.approx(0.4))
    assert point([np.nan, 1, 0, 0, 0], right) == 1


def test_random_heat_gives_chance() -> None:
    rng = np.random.default_rng(1)
    pairs = []
    for i in range(1500):
        patches = int(rng.integers(30, 60))
        right = rng.permutation(patches) < rng.integers(1, 12)
        with config_context(assume_finite=True, skip_parameter_validation=True):  # twice as fast
            pointing, patch_ap = measure(rng.uniform(size=patches), right)
        pairs.append(
            Pair(
                slide_id=f"s{i}", patient_id=f"p{i // 2}", finding=("a", "b")[i % 2],
                patches=patches, right=int(right.sum()), pointing=pointing, patch_ap=patch_ap,
                smooth_pointing=pointing, smooth_patch_ap=patch_ap,
            )
        )  # fmt: skip
    found = summarise(pairs)
    assert found["pointing"] == pytest.approx(found["pointing_chance"], abs=0.025)
    assert found["patch_ap"] == pytest.approx(found["patch_ap_chance"], abs=0.012)
    for key in ("pointing", "patch_ap"):
        low, high = found["ci"][key]
        assert low < found[key] < high
    halves = found["findings"]
    assert halves["a"]["n"] == halves["b"]["n"] == 750
    assert found["patch_ap"] == pytest.approx(
        (halves["a"]["patch_ap"] + halves["b"]["patch_ap"]) / 2
    )


def test_planted_lesions_are_found_at_any_resolution(archive, run, planted_slides) -> None:  # type: ignore[no-untyped-def]
    found = grounding(archive, run, QUERIES, split="all", variants=("attn", "cosine"), resamples=50)
    assert found["pointing"] == found["patch_ap"] == 1
    for low, high in found["ci"].values():
        assert 0.3 < low < high == 1
    assert found["variants"]["cosine"]["pointing"] == 1
    assert found["smoothed"] == {"pointing": 1, "patch_ap": 1}  # a square stays the hottest
    # The share of patches in a lesion, counted on the patch grid instead of in pixels.
    shares, skipped = [], 0
    for slide in planted_slides:
        _, mask, _ = archive.features_array(slide.name)
        regions = archive.regions(slide.name, columns=["region_id", "rx", "ry"]).to_pylist()
        slot = np.arange(16)
        column = np.array([[4 * r["rx"] + slot % 4] for r in regions])[:, 0]
        line = np.array([[4 * r["ry"] + slot // 4] for r in regions])[:, 0]
        for x, y, w, h in slide.lesions.values():
            hit = (column >= x) & (column < x + w) & (line >= y) & (line < y + h) & mask
            if hit.any():
                shares.append(hit.sum() / mask.sum())
            else:
                skipped += 1
    assert (found["n"], found["skipped"]) == (len(shares), skipped)
    assert found["pointing_chance"] == pytest.approx(np.mean(shares))
    assert {slide.mpp for slide in planted_slides if slide.lesions} == {0.5, 0.25, 0.2738}


def test_a_text_of_something_else_is_no_better_than_chance(archive, run) -> None:  # type: ignore[no-untyped-def]
    swapped = {"tumour": "lung", "necrosis": "colon"}  # says nothing about where
    found = grounding(archive, run, swapped, split="all", resamples=0)
    assert found["pointing"] == pytest.approx(found["pointing_chance"], abs=1e-6)
    with_contrast = grounding(archive, run, QUERIES, split="all", contrast="tissue", resamples=0)
    assert with_contrast["pointing"] == 1
    assert with_contrast["contrast"] == "tissue"


def test_outlines_are_looked_for_beside_the_slides(archive, run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    slides = list_slides(archive, run)
    found = read_outlines(archive, slides, findings={"tumour"})
    assert found
    assert all(set(outlines) == {"tumour"} for outlines in found.values())
    with pytest.raises(ConfigError, match="No outline of tumour"):
        read_outlines(archive, slides, findings={"tumour"}, truth=tmp_path)
    with pytest.raises(ConfigError, match="no grounding variant"):
        grounding(archive, run, QUERIES, variants=("saliency",))


def test_outlines_without_a_patch_are_no_measurement(
    archive, run, planted_slides, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    """A sliver between the corner of a slide and the middle of its first patch."""
    finding = next(iter(QUERIES))
    for slide in planted_slides:
        ring = [[0, 0], [3, 0], [3, 3], [0, 0]]
        feature = {
            "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": finding}},
        }  # fmt: skip
        (tmp_path / f"{slide.name}.geojson").write_text(json.dumps([feature]))
    number = len(planted_slides)
    with pytest.raises(ConfigError, match=f"None of the {number} outlines") as error:
        grounding(archive, run, QUERIES, truth=tmp_path, split="all")
    assert error.value.code == "no_truth"


def test_patches_of_regions_lie_on_their_lines() -> None:
    rects = slide_rects(np.array([[1, 2]]), TILING, mpp=0.37)
    assert rects.shape == (1, 16, 4)
    x = np.floor(np.arange(4, 9) * 32 / 0.37 + 0.5)
    assert rects[0, :4, 0].tolist() == x[:4].tolist()
    assert (rects[0, :4, 0] + rects[0, :4, 2]).tolist() == x[1:].tolist()


def test_outlines_go_by_every_name_of_their_slide(archive, run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    slides = list_slides(archive, run)
    found = read_outlines(archive, slides, findings={"tumour"})
    first = next(slide for slide in slides if slide.slide_id in found)
    drawn = (Path(first.uri).parent.parent / "lesions" / f"{first.stem}.geojson").read_bytes()
    for name in (f"{first.slide_id}.geojson", f"{first.stem}.JSON", f"{first.stem}.svs.geojson"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(drawn)
        (folder / "of nobody.geojson").write_text("not read")
        assert list(read_outlines(archive, slides, findings={"tumour"}, truth=folder)) == [
            first.slide_id
        ]
