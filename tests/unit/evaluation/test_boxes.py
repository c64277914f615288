"""Boxes of grounding: overlaps in closed form, exact chance, tables of boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pathflip.archive.slide_names import SlideNames
from pathflip.errors import ConfigError
from pathflip.evaluation.boxes import (
    bounding_boxes,
    check_thresholds,
    iou,
    read_boxes,
    score_boxes,
    summarise_boxes,
)
from pathflip.evaluation.encode import list_slides
from pathflip.evaluation.grounding import grounding, read_outlines
from pathflip.heatmap import Box

GRID = np.stack(np.meshgrid(np.arange(10) + 0.5, np.arange(10) + 0.5), axis=-1).reshape(-1, 2)
"""Middles of 10 x 10 patches of 1 px."""


def box(x0: int, y0: int, x1: int, y1: int) -> Box:
    return Box(x0=x0, y0=y0, w0=x1 - x0, h0=y1 - y0, mpp=1.0, score=1.0, patches=4)


def test_overlaps_in_closed_form() -> None:
    one = [0, 0, 10, 10]
    others = [[0, 0, 10, 10], [5, 0, 15, 10], [5, 5, 15, 15], [10, 0, 20, 10], [2, 2, 4, 4]]
    assert iou(one, others) == pytest.approx([1, 1 / 3, 25 / 175, 0, 4 / 100])
    assert iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0


def test_overlaps_are_those_of_counted_pixels() -> None:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(0.5, 40), np.arange(0.5, 40))
    for _ in range(100):
        a, b = np.sort(rng.integers(0, 40, (2, 2, 2)), axis=1).reshape(2, 4)
        held = [(x > q[0]) & (x < q[2]) & (y > q[1]) & (y < q[3]) for q in (a, b)]
        either = (held[0] | held[1]).sum()
        assert iou(a, b) == pytest.approx((held[0] & held[1]).sum() / max(1, either))


def test_scores_in_closed_form() -> None:
    """The first of two true boxes is hit by a third, the second by the colder box exactly."""
    truth = [[0, 0, 2, 2], [6, 6, 8, 8]]
    boxes = [box(1, 0, 3, 2), box(6, 6, 8, 8)]
    score = score_boxes(boxes, truth, centres=GRID, thresholds=(0.1, 0.5, 1.0))
    assert score.iou == pytest.approx(1 / 3)
    assert score.hits == (1, 0, 0)
    assert score.recalls == (1, 0.5, 0.5)
    empty = score_boxes([], truth, centres=GRID)
    assert (empty.iou, empty.hits, empty.recalls, empty.boxes) == (0, (0,) * 3, (0,) * 3, 0)


def test_chance_in_closed_form() -> None:
    """A box of one patch is on a true one of one patch in 1 of 100 places, on one of two in 2."""
    score = score_boxes([box(9, 9, 10, 10)], [[0, 0, 1, 1]], centres=GRID, thresholds=(0.5,))
    chances = [score.iou_chance, *score.hits_chance, *score.recalls_chance]
    assert chances == pytest.approx([0.01] * 3)
    truth = [[0, 0, 1, 1], [4, 4, 5, 5]]
    score = score_boxes([box(9, 9, 10, 10)], truth, centres=GRID, thresholds=(0.5,))
    assert (score.hits_chance, score.recalls_chance) == ((0.02,), (pytest.approx(0.01),))
    # Two boxes, each 1 of 100: either with 1 - 0.99².
    score = score_boxes([box(9, 9, 10, 10)] * 2, truth, centres=GRID, thresholds=(0.5,))
    assert score.recalls_chance == (pytest.approx(1 - 0.99**2),)


def test_boxes_moved_at_random_give_chance() -> None:
    rng = np.random.default_rng(2)
    truth = np.array([[1, 1, 5, 4], [6, 3, 9, 9]])
    boxes = [box(0, 0, 3, 3), box(0, 0, 4, 2)]
    expected = score_boxes(boxes, truth, centres=GRID, thresholds=(0.1, 0.4))
    found = []
    for _ in range(4000):
        middles = GRID[rng.integers(len(GRID), size=2)]
        halves = np.array([[1.5, 1.5], [2, 1]])
        fits = iou(np.concatenate([middles - halves, middles + halves], axis=1)[:, None], truth)
        levels = np.array([0.1, 0.4])[:, None]
        first = fits[0].max()
        found.append([first, *(first >= levels[:, 0]), *(fits.max(axis=0) >= levels).mean(axis=1)])
    chance = [expected.iou_chance, *expected.hits_chance, *expected.recalls_chance]
    assert np.mean(found, axis=0) == pytest.approx(chance, abs=0.02)


def test_means_are_of_pairs_and_intervals_of_patients() -> None:
    right = score_boxes([box(0, 0, 2, 2)], [[0, 0, 2, 2]], centres=GRID, thresholds=(0.5,))
    wrong = score_boxes([box(4, 4, 6, 6)], [[0, 0, 2, 2]], centres=GRID, thresholds=(0.5,))
    missing = score_boxes([], [[0, 0, 2, 2]], centres=GRID, thresholds=(0.5,))
    scores = [right, right, wrong, missing]
    weights = np.array([[2, 2, 0, 0], [0, 0, 2, 2], [1, 1, 1, 1]], np.float64)
    found = summarise_boxes(
        scores, thresholds=(0.5,), patients=["p", "p", "q", "r"], weights=weights
    )
    assert (found["iou"], found["hit"], found["recall"]) == (0.5, {"0.5": 0.5}, {"0.5": 0.5})
    assert found["without"] == 1
    low, high = found["ci"]["hit"]["0.5"]
    assert 0 <= low < 0.5 < high <= 1
    alone = summarise_boxes(scores, thresholds=(0.5,), patients=["p"] * 4, weights=None)
    assert alone["ci"] is None


def test_a_model_that_points_right_has_the_box(archive, run) -> None:  # type: ignore[no-untyped-def]
    """The map of a planted square is the square; its smoothed rim may cost or add a patch."""
    queries = {"tumour": "tumour", "necrosis": "necrosis"}
    found = grounding(archive, run, queries, split="all", resamples=50, thresholds=(0.3, 0.9))
    boxes = found["boxes"]
    assert boxes["hit"]["0.3"] > 0.7 > 3 * boxes["hit_chance"]["0.3"]
    assert boxes["iou"] > 0.5 > 3 * boxes["iou_chance"]
    assert set(boxes["ci"]) == {"iou", "hit", "recall"}
    assert set(found["findings"]["tumour"]["boxes"]["recall"]) == {"0.3", "0.9"}


def test_a_table_of_boxes_is_truth(archive, run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Boxes of the outlines, as a table, measure the same as the outlines of these squares."""
    outlines = read_outlines(archive, list_slides(archive, run), findings={"tumour", "necrosis"})
    lines = ["slide_id,finding,x0,y0,w0,h0"]
    for slide, found in outlines.items():
        for finding, polygons in found.items():
            for x0, y0, x1, y1 in bounding_boxes(polygons):
                lines.append(f"{slide},{finding},{x0},{y0},{x1 - x0},{y1 - y0}")
    table = tmp_path / "boxes.csv"
    table.write_text("\n".join([*lines, "of nobody,tumour,1,1,2,2", f"{slide},other,1,1,2,2"]))
    queries = {"tumour": "tumour", "necrosis": "necrosis"}
    by_table = grounding(archive, run, queries, split="all", truth=table, resamples=0)
    assert by_table == grounding(archive, run, queries, split="all", resamples=0)


def names() -> SlideNames:
    rows = [
        {"slide_id": "a", "uri": "/x/site1/s.svs", "aliases": None, "patient_id": None},
        {"slide_id": "b", "uri": "/x/site2/s.svs", "aliases": None, "patient_id": None},
    ]
    return SlideNames.from_rows(rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide,class,x0,y0,x1,y1\na,t,1,2,x,4", "line 2: x1 is 'x'"),
        ("slide,class,x0,y0,x1,y1\na,t,1,2,inf,4", "x1 is 'inf'"),
        ("slide,class,x0,y0,x1,y1\na,t,1,2,1,4", "no area"),
        ("slide,class,x0,y0,w0,h0\na,t,1,2,-3,4", "no area"),
        ("slide,class,x0,y0\na,t,1,2", "w0"),
        ("slide,x0,y0,x1,y1\na,1,2,3,4", "finding"),
        ("slide,class,x0,y0,x1,y1\ns,t,1,2,3,4", "name of several slides"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"boxes\.csv") as error:
        read_boxes(file, names=names(), slides={"a", "b"}, findings={"t"})
    assert says in error.value.message + error.value.hint


def test_both_ways_to_write_a_box(tmp_path: Path) -> None:
    corners, sizes = tmp_path / "corners.tsv", tmp_path / "sizes.csv"
    corners.write_text("Slide\tLabel\tx0\ty0\tx1\ty1\nsite1/s.svs\tt\t1\t2\t4\t6\n")
    sizes.write_text("slide,finding,x0,y0,width,height\na,t,1,2,3,4\n")
    for file in (corners, sizes):
        found = read_boxes(file, names=names(), slides={"a", "b"}, findings={"t"})
        assert list(found) == ["a"]
        assert bounding_boxes(found["a"]["t"]).tolist() == [[1, 2, 4, 6]]


def test_a_slide_that_nobody_knows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text("slide,finding,x0,y0,x1,y1\na,t,1,2,3,4\nmisspelt,t,1,2,3,4\n")
    with caplog.at_level("WARNING"):
        assert list(read_boxes(file, names=names(), slides={"a", "b"}, findings={"t"})) == ["a"]
    assert "1 slides of" in caplog.text
    assert "misspelt for one" in caplog.text


def test_thresholds_are_shares() -> None:
    assert check_thresholds([0.5, 0.1, 0.5]) == (0.1, 0.5)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            check_thresholds([wrong])
