"""Boxes as truth of grounding: tables of boxes, and the overlap of predicted boxes with them.

Every outline has a bounding box, so these measures are there for outlines and for tables of boxes.
Predicted boxes are those that :func:`pathflip.heatmap.find_boxes` cuts out of the map, the hottest
first. The overlap of two boxes is the area they share, by the area they cover together (IoU).

* ``iou``: overlap of the hottest box with the true box it fits best; 0 where the map has no box.
* ``hit``: share of texts for which that is at least a threshold.
* ``recall``: share of the true boxes that any predicted box fits as well.

Chance is the same boxes moved: each, independently, with its middle to that of a patch of tissue
drawn at random. Over so few places the means are exact, and no sampling is needed.

Shapes: P patches of a slide, T true boxes of a finding on it, B predicted boxes. A box is
(left, top, right, bottom), level-0 px.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.archive.slide_names import SlideNames
from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.heatmap import Box
from pathflip.interop.tables import bad_line, clean, column, is_missing, needed_column, read_rows
from pathflip.slides.outlines import Polygon

logger = logging.getLogger(__name__)

THRESHOLDS = (0.1, 0.3, 0.5)
"""Overlaps from which on a box counts as found."""
SLIDE, FINDING = ("slide", "slide_id"), ("finding", "class", "label")


@dataclass(frozen=True, kw_only=True)
class BoxScore:
    """Overlap of the boxes of one text on one slide with the true ones.

    Attributes:
        iou: Overlap of the hottest box with the true box it fits best.
        hits: 1 for each threshold that it reaches, else 0.
        recalls: Share of true boxes found, for each threshold.
        iou_chance, hits_chance, recalls_chance: The same of boxes moved at random.
        boxes: Number of predicted boxes.
    """

    iou: float
    hits: tuple[float, ...]
    recalls: tuple[float, ...]
    iou_chance: float
    hits_chance: tuple[float, ...]
    recalls_chance: tuple[float, ...]
    boxes: int


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return thresholds in order, each once.

    Raises:
        ConfigError: One is not above 0 and at most 1.
    """
    if not all(0 < value <= 1 for value in thresholds):
        raise ConfigError(
            "A threshold of overlap is above 0 and at most 1.", hint="For example --iou 0.5."
        )
    return tuple(sorted(set(thresholds)))


def iou(one: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Return the overlap of boxes [..., 4] with others [..., 4]; 0 where neither has an area."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    covered = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1)
    covered = covered - shared
    return np.where(covered > 0, shared / np.where(covered > 0, covered, 1), 0.0)


def bounding_boxes(polygons: Sequence[Polygon]) -> NDArray[np.float64]:
    """Return the bounding box of each polygon [T, 4]."""
    found = [np.concatenate([outer.min(axis=0), outer.max(axis=0)]) for outer, _ in polygons]
    return np.array(found, np.float64).reshape(-1, 4)


def score_boxes(
    boxes: Sequence[Box],
    truth: ArrayLike,
    *,
    centres: ArrayLike,
    thresholds: Sequence[float] = THRESHOLDS,
) -> BoxScore:
    """Measure the boxes of one text on one slide.

    Args:
        boxes: Predicted boxes, the hottest first.
        truth: True boxes [T, 4], at least one.
        centres: Middles of the slide's patches [P, 2], level-0 px; where a box may be by chance.
        thresholds: Overlaps from which on a box counts as found.
    """
    true = np.asarray(truth, np.float64).reshape(-1, 4)
    middles = np.asarray(centres, np.float64).reshape(-1, 2)
    levels = np.asarray(thresholds, np.float64)
    if not boxes:
        none = (0.0,) * len(levels)
        return BoxScore(
            iou=0.0, hits=none, recalls=none, iou_chance=0.0, hits_chance=none,
            recalls_chance=none, boxes=0,
        )  # fmt: skip
    predicted = np.array([[b.x0, b.y0, b.x0 + b.w0, b.y0 + b.h0] for b in boxes], np.float64)
    fits = iou(predicted[:, None], true)  # [B, T]
    missed = np.ones((len(levels), len(true)))  # probability that no moved box finds it
    best_by_chance = np.zeros(len(middles))
    for number, box in enumerate(predicted):
        half = (box[2:] - box[:2]) / 2
        moved = np.concatenate([middles - half, middles + half], axis=1)  # [P, 4]
        for column_, other in enumerate(true):
            by_chance = iou(moved, other)
            missed[:, column_] *= 1 - (by_chance >= levels[:, None]).mean(axis=1)
            if number == 0:
                best_by_chance = np.maximum(best_by_chance, by_chance)
    best = float(fits[0].max())
    found = fits.max(axis=0) >= levels[:, None]
    return BoxScore(
        iou=best,
        hits=tuple((best >= levels).astype(np.float64).tolist()),
        recalls=tuple(found.mean(axis=1).tolist()),
        iou_chance=float(best_by_chance.mean()),
        hits_chance=tuple((best_by_chance >= levels[:, None]).mean(axis=1).tolist()),
        recalls_chance=tuple((1 - missed).mean(axis=1).tolist()),
        boxes=len(boxes),
    )


def summarise_boxes(
    scores: Sequence[BoxScore],
    *,
    thresholds: Sequence[float],
    patients: Sequence[str],
    weights: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Average over texts on slides.

    Args:
        scores: Their scores [n].
        thresholds: Thresholds of the scores.
        patients: Patient of each [n].
        weights: Resamples of patients [R, n], see :mod:`pathflip.evaluation.bootstrap`.

    Returns:
        {"iou", "iou_chance", "hit": {threshold: value}, "hit_chance", "recall", "recall_chance",
        "without": number without a box, "ci": {"iou", "hit": {threshold}, "recall": {threshold}}}
    """
    names = [f"{value:g}" for value in thresholds]

    def mean(values: Sequence[Any]) -> Any:
        return np.asarray(values, np.float64).mean(axis=0).tolist()

    def by_threshold(key: str) -> dict[str, float]:
        return dict(zip(names, mean([getattr(one, key) for one in scores]), strict=True))

    found: dict[str, Any] = {
        "iou": mean([one.iou for one in scores]),
        "iou_chance": mean([one.iou_chance for one in scores]),
        "hit": by_threshold("hits"),
        "hit_chance": by_threshold("hits_chance"),
        "recall": by_threshold("recalls"),
        "recall_chance": by_threshold("recalls_chance"),
        "without": sum(not one.boxes for one in scores),
        "ci": None,
    }
    if weights is not None:

        def interval(values: Sequence[float], *, graded: bool) -> list[float] | None:
            return bootstrap.interval(
                bootstrap.weighted_mean(values, weights),
                mean(values),
                bootstrap.support(patients, graded=graded),
            )

        found["ci"] = {"iou": interval([one.iou for one in scores], graded=True)} | {
            key: {
                name: interval([getattr(one, f"{key}s")[n] for one in scores], graded=graded)
                for n, name in enumerate(names)
            }
            for key, graded in (("hit", False), ("recall", True))
        }
    return found


def read_boxes(
    file: str | Path, *, names: SlideNames, slides: set[str], findings: set[str]
) -> dict[str, dict[str, list[Polygon]]]:
    """Read {slide_id: {finding: boxes as polygons}} from a table; warns of slides nobody knows.

    Args:
        file: CSV or TSV with the columns ``slide``, ``finding`` (or ``class``, ``label``), ``x0``,
            ``y0`` and either ``x1``, ``y1`` or ``w0``, ``h0``: a box a line, level-0 px.
        names: Names of all slides of the archive.
        slides: Slides to read.
        findings: Findings to read; boxes of others are ignored.

    Raises:
        ConfigError: The table is wrong, or a name in it is that of several slides.
    """
    rows = read_rows(file)
    first = rows[0][1]
    slide, finding = needed_column(file, first, SLIDE), needed_column(file, first, FINDING)
    left, top = needed_column(file, first, ("x0",)), needed_column(file, first, ("y0",))
    right, bottom = column(file, first, ("x1",)), column(file, first, ("y1",))
    sizes = right is None or bottom is None
    if right is None or bottom is None:
        right = needed_column(file, first, ("w0", "width"))
        bottom = needed_column(file, first, ("h0", "height"))
    found: dict[str, dict[str, list[Polygon]]] = {}
    matches = names.match(rows, lambda row: (row[1][slide], False))
    for (line, row), several in matches.unclear:
        if slides & set(several):
            raise bad_line(
                file, line,
                f"{row[slide]} is the name of several slides, {several[0]} and {several[1]}",
                hint="Write the slide_id.",
            )  # fmt: skip
    if matches.unmatched:
        logger.warning(
            "%d slides of %s are not in the archive, %s for one: their boxes are not measured.",
            len(matches.unmatched), file, matches.unmatched[0],
        )  # fmt: skip
    for (line, row), (slide_id,) in matches.found:
        name = clean(row[finding])
        if slide_id not in slides or name not in findings:
            continue
        at = [_number(file, line, row, name) for name in (left, top, right, bottom)]
        if sizes:
            at[2:] = [at[0] + at[2], at[1] + at[3]]
        if not (at[0] < at[2] and at[1] < at[3]):
            raise bad_line(file, line, "the box has no area", hint="x0 and y0 are its left top.")
        ring = np.array([[at[0], at[1]], [at[2], at[1]], [at[2], at[3]], [at[0], at[3]]])
        found.setdefault(slide_id, {}).setdefault(name, []).append((ring, []))
    return found


def _number(file: str | Path, line: int, row: Mapping[str, str], name: str) -> float:
    try:
        value = math.nan if is_missing(row[name]) else float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 1e9:
        raise bad_line(
            file, line, f"{name} is {row[name]!r}", hint="Boxes are in pixels of level 0."
        )
    return value
