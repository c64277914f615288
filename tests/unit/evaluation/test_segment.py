"""Sliding segmentation against a plain loop over windows, and its measures in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from pathflip.archive import Archive, schema
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.errors import ConfigError, SlideError
from pathflip.evaluation.patch_text import class_weights, softmax
from pathflip.evaluation.segment import confusion_of, evaluate_segment, measure, overlap, truth_map
from pathflip.evaluation.sliding import GRID_UM, NONE, segment_slide, slide_reader
from pathflip.slides.tissue import TissueMask
from tests.unit.archive.cohort import filled
from tests.unit.evaluation.planted_patches import ColourModel, colour_reader

MPP = 0.5
CLASSES = {"tumour": ("red",), "stroma": ("green",), "fat": ("blue",)}
PAINT = {"tumour": (230, 100, 100), "stroma": (100, 230, 100), "fat": (100, 100, 230)}


def wide(model: ColourModel | None = None, **changed: Any) -> Any:
    return colour_reader(model, node_px=64, **changed)


def painted(*, side: tuple[int, int] = (384, 512), seed: int = 0) -> np.ndarray[Any, Any]:
    """Stroma on the left, tumour on the right, a strip of fat below; noisy."""
    h, w = side
    rgb = np.empty((h, w, 3))
    rgb[:, : w // 2], rgb[:, w // 2 :] = PAINT["stroma"], PAINT["tumour"]
    rgb[3 * h // 4 :] = PAINT["fat"]
    noise = np.random.default_rng(seed).normal(0, 12, rgb.shape)
    return np.clip(rgb + noise, 0, 255).astype(np.uint8)


def write_slide(path: Path, rgb: np.ndarray[Any, Any], mpp: float = MPP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path, rgb, tile=(256, 256), photometric="rgb", resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def tissue(rgb: np.ndarray[Any, Any], *, glass_um: float = 48.0) -> TissueMask:
    """Everything is tissue but a strip at the top."""
    mask = np.ones((rgb.shape[0] // 8, rgb.shape[1] // 8), np.bool_)  # 4 µm
    mask[: int(glass_um // 4)] = False
    return TissueMask(mask=mask, mpp=4.0, slide_mpp=MPP)


def plain(rgb: np.ndarray[Any, Any], mask: TissueMask, reader: Any, steps: int) -> Any:
    """Class scores [C, H, W] on the 4 µm grid by a loop over every window of every level."""
    weights = class_weights(reader, CLASSES)
    cells = int(GRID_UM / MPP)
    shape = (rgb.shape[0] // cells, rgb.shape[1] // cells)
    levels = []
    for level in (0, 1, 2):
        factor = round(reader.level_mpp[level] / MPP)
        small = cv2.resize(rgb, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
        step, side = 64 // steps, 64
        total, count = np.zeros((len(CLASSES), *shape)), np.zeros(shape)
        um = reader.level_mpp[level]
        for top in range(0, small.shape[0] - side + 1, step):
            for left in range(0, small.shape[1] - side + 1, step):
                rows = slice(round(top * um / GRID_UM), round((top + side) * um / GRID_UM))
                columns = slice(round(left * um / GRID_UM), round((left + side) * um / GRID_UM))
                if mask.mask[rows, columns].mean() < 0.05:
                    continue
                window = small[top : top + side, left : left + side]
                vector = reader.vectors(window[None], np.array([level]))[0]
                total[:, rows, columns] += softmax(weights @ vector, tau=reader.tau)[:, None, None]
                count[rows, columns] += 1
        levels.append((total / np.maximum(count, 1), count > 0))
    covered = sum(there for _, there in levels)
    return sum(scores for scores, _ in levels) / np.maximum(covered, 1), covered > 0


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_scores_are_those_of_a_loop_over_all_windows(tmp_path: Path, steps: int) -> None:
    rgb = painted()
    path, mask, reader = write_slide(tmp_path / "s.tif", rgb), tissue(rgb), wide()
    with slide_reader(reader, steps=steps) as slides:
        found = segment_slide(
            str(path), reader, class_weights(reader, CLASSES), tissue=mask, width=512, height=384,
            slides=slides, steps=steps,
        )  # fmt: skip
    expected, covered = plain(rgb, mask, reader, steps)
    got = np.stack([found.scores(i) for i in range(3)])
    assert [one.level for one in found.maps] == [0, 1, 2]  # no 40x in a slide of 20x
    assert found.tissue.shape == (48, 64)
    assert np.abs(got - expected).max() < 0.02  # grey levels are rounded once more in the loop
    assert ((found.labels() != NONE) == (covered & mask.mask)).all()


def test_only_steps_under_windows_with_tissue_are_read(tmp_path: Path) -> None:
    rgb = painted(side=(256, 512))
    path, reader = write_slide(tmp_path / "s.tif", rgb), wide(levels=(2,))
    spot = np.zeros((32, 64), np.bool_)
    spot[10:12, 10:12] = True
    mask = TissueMask(mask=spot, mpp=4.0, slide_mpp=MPP)
    with slide_reader(reader) as slides:
        asked = []
        start = slides.start_read
        slides.start_read = lambda path, rects, **how: (  # type: ignore[method-assign]
            asked.extend(map(tuple, rects.tolist())), start(path, rects, **how)
        )[1]  # fmt: skip
        found = segment_slide(
            str(path), reader, class_weights(reader, CLASSES), tissue=mask, width=512, height=256,
            slides=slides,
        )  # fmt: skip
    # The spot is one step, a sixteenth of the 4 x 4 windows over it.
    assert found.maps[0].windows == 16
    assert len(asked) == len(set(asked)) == 49  # each step once: 7 x 7 of them
    assert (found.labels() != NONE).sum() == 4


def test_a_slide_too_small_or_too_coarse_is_refused(tmp_path: Path) -> None:
    reader = wide()
    weights = class_weights(reader, CLASSES)
    for side, mpp in ((24, 0.5), (64, 4.0)):
        mask = TissueMask(mask=np.ones((side, side), np.bool_), mpp=mpp, slide_mpp=mpp)
        with slide_reader(reader) as slides, pytest.raises(SlideError) as refused:
            segment_slide("gone.tif", reader, weights, tissue=mask, width=side, height=side,
                          slides=slides)  # fmt: skip
        assert refused.value.code == "empty"
    for steps in (5, 8):  # no whole number of pixels; too few
        with pytest.raises(ConfigError, match=f"{steps} steps"):
            slide_reader(reader, steps=steps)


# -- measures -------------------------------------------------------------------------------------


def test_overlap_is_that_of_sets_of_cells() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    labels = np.where(rng.uniform(size=truth.shape) < 0.6, truth, rng.integers(0, 3, truth.shape))
    labels = labels.astype(np.uint8)
    truth[0], labels[1] = NONE, NONE
    found = overlap(confusion_of(labels, truth, classes=3))
    seen = (truth != NONE) & (labels != NONE)
    for index in range(3):
        a, b = (truth == index) & seen, (labels == index) & seen
        both, either = (a & b).sum(), (a | b).sum()
        assert found["dice"][index] == pytest.approx(2 * both / (a.sum() + b.sum()))
        assert found["iou"][index] == pytest.approx(both / either)
        assert found["precision"][index] == pytest.approx(both / b.sum())
        assert found["recall"][index] == pytest.approx(both / a.sum())


def test_a_class_without_cells_is_in_no_mean() -> None:
    counts = np.array([[[8, 2, 0], [0, 10, 0], [0, 0, 0]]])
    found = measure(counts, ["a", "b", "c"], ["p"])
    assert found["dice"] == pytest.approx((16 / 18 + 20 / 22) / 2)
    assert found["classes"]["c"]["dice"] is None
    assert found["classes"]["c"]["ci"]["dice"] is None
    assert found["ci"]["dice"] is None  # one patient


def test_intervals_are_of_patients() -> None:
    good, bad = np.array([[9, 1], [1, 9]]), np.array([[1, 9], [9, 1]])
    two = measure(np.stack([good, good, bad, bad]), ["a", "b"], ["p", "p", "q", "q"])
    four = measure(np.stack([good, good, bad, bad]), ["a", "b"], ["p", "q", "r", "s"])
    assert two["ci"]["accuracy"] == pytest.approx([0, 1], abs=0.02)  # two patients say nothing
    assert four["accuracy"] == 0.5
    low, high = four["ci"]["accuracy"]
    assert 0.05 < low < 0.35 < 0.65 < high < 0.95


def test_truth_is_drawn_in_the_order_of_classes_on_tissue_only() -> None:
    on = np.ones((10, 10), np.bool_)
    on[0] = False
    square = np.array([[0.0, 0], [40, 0], [40, 40], [0, 40]]) / 0.5 * 1.0
    whole: Any = [(square, [])]
    part: Any = [(square / 2, [])]
    found = truth_map({"a": whole, "b": part}, ["a", "b", "c"], tissue=on, mpp=0.5)
    assert (found[1:5, :5] == 1).all()
    assert (found[5:] == 0).all()
    assert (found[0] == NONE).all()
    rest = truth_map({"b": part}, ["a", "b", "c"], tissue=on, mpp=0.5, rest="c")
    assert (rest[5:] == 2).all()


# -- a cohort -------------------------------------------------------------------------------------


def cohort(folder: Path) -> Archive:
    """Two slides of two patients with outlines of tumour and fat; the second is gone."""
    uri = folder / "archive"
    create_archive(uri, tiling={"region_um": 128.0, "patch_um": 32.0, "mpp": 0.5,
                                "min_patch_tissue": 0.5, "min_region_patches": 0.1})  # fmt: skip
    rows = []
    for number in range(2):
        rgb = painted(seed=number)
        path = folder / "slides" / f"s{number}.tif"
        if number == 0:
            write_slide(path, rgb)
        rows.append(
            {"slide_id": f"s{number}", "uri": str(path), "aliases": [], "status": "ready",
             "fingerprint": f"s{number}", "encoders": [], "patient_id": f"P{number}",
             "split": "test", "labels": "{}", "mpp": MPP, "width": 512, "height": 384,
             "bounds_x0": 0, "bounds_y0": 0, "n_regions": 0, "n_patches": 0,
             "tissue_png": tissue(rgb).to_png(), "tissue_mpp": 4.0,
             "thumbnail": cv2.imencode(".jpg", rgb[..., ::-1])[1].tobytes(),
             "thumbnail_mpp": MPP}
        )  # fmt: skip
        boxes = {"tumour": (256, 0, 512, 288), "fat": (0, 288, 512, 384)}
        features = [
            {"type": "Feature", "properties": {"classification": {"name": name}},
             "geometry": {"type": "Polygon",
                          "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}}
            for name, (x0, y0, x1, y1) in boxes.items()
        ]  # fmt: skip
        outlines = folder / "lesions" / f"s{number}.geojson"
        outlines.parent.mkdir(exist_ok=True)
        outlines.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with Committer(uri) as committer:
        committer.commit(slides=filled(schema.slides_schema(), rows))
    return Archive(uri)


def test_a_planted_cohort_is_segmented_measured_and_drawn(tmp_path: Path) -> None:
    archive = cohort(tmp_path)
    found = evaluate_segment(
        archive, wide(), CLASSES, rest="stroma", out=tmp_path / "out", resamples=20
    )
    assert (found["slides"], found["patients"]) == (1, 1)
    assert found["failed"][0]["slide"] == "s1"
    assert found["covered"] == 1
    assert found["dice"] > 0.9  # windows blur the borders
    assert found["levels"]["20x"]["dice"] > found["levels"]["5x"]["dice"]
    assert found["classes"]["fat"]["cells"] == 64 * 12
    assert found["majority"]["dice"] < 0.3
    assert found["chance"]["accuracy"] == pytest.approx(1 / 3)
    picture = cv2.imread(str(tmp_path / "out" / "s0.png"))
    assert picture is not None
    assert picture.shape[1] > picture.shape[0]


def test_a_blind_model_is_no_better_than_chance(tmp_path: Path) -> None:
    model = ColourModel(blind={level: (0, 1, 2) for level in range(4)})
    found = evaluate_segment(cohort(tmp_path), wide(model), CLASSES, rest="stroma", resamples=0)
    assert found["dice"] <= 0.3


def test_wrong_requests_say_what_is_wrong(tmp_path: Path) -> None:
    archive = cohort(tmp_path)
    with pytest.raises(ConfigError, match="'rest' is none of"):
        evaluate_segment(archive, wide(), CLASSES, rest="rest")
    with pytest.raises(ConfigError, match="No outline"):
        evaluate_segment(archive, wide(), {"a": ("red",), "b": ("blue",)})
    (tmp_path / "slides" / "s0.tif").unlink()
    with pytest.raises(ConfigError, match="None of 2 slides"):
        evaluate_segment(archive, wide(), CLASSES)
