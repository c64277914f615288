"""Measures of zero-shot segmentation against outlines: Dice, IoU, precision, recall.

Cells of the common grid that are tissue and have a class in the outlines are counted by true and
segmented class. Intervals resample patients, each with all its slides.

Shapes: n slides, C classes, [H, W] cells of the common grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.classification import confusion, per_class, resample, scores_of
from pathflip.evaluation.encode import SlideRow, slide_rows
from pathflip.evaluation.grounding import read_outlines
from pathflip.evaluation.patch_text import PatchReader, class_weights
from pathflip.evaluation.sliding import GRID_UM, NONE, STEPS, draw, segment_slide, slide_reader
from pathflip.geometry import level_name
from pathflip.progress import Progress, Report
from pathflip.slides.outlines import Polygon, fill
from pathflip.slides.staging import opened_uri
from pathflip.slides.tissue import TissueMask

if TYPE_CHECKING:
    from pathflip.archive import Archive


def truth_map(
    outlines: Mapping[str, Sequence[Polygon]],
    classes: Sequence[str],
    *,
    tissue: NDArray[np.bool_],
    mpp: float,
    rest: str | None = None,
) -> NDArray[np.uint8]:
    """Return the outlined class of each tissue cell [H, W]; :data:`NONE` where there is none.

    Args:
        outlines: {class: polygons}, level-0 px. Where they overlap, the class named last wins.
        classes: Names of the classes.
        tissue: Tissue on the common grid.
        mpp: The slide's level-0 µm/px.
        rest: Class of tissue without an outline; None leaves it out of the measures.
    """
    found = np.full(tissue.shape, NONE if rest is None else classes.index(rest), np.uint8)
    h, w = tissue.shape
    for index, name in enumerate(classes):
        if polygons := outlines.get(name):
            found[fill(polygons, scale=GRID_UM / mpp, h=h, w=w)] = index
    found[~tissue] = NONE
    return found


def confusion_of(
    labels: NDArray[np.uint8], truth: NDArray[np.uint8], *, classes: int
) -> NDArray[np.int64]:
    """Return counts of cells [C, C] by true class (rows) and segmented one, where both are."""
    on = (labels != NONE) & (truth != NONE)
    return confusion(truth[on], labels[on], classes=classes)


def overlap(counts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return {metric: [..., C]} of confusion matrices [..., C, C]; NaN where it is not defined.

    Dice 2tp/(2tp + fp + fn), IoU tp/(tp + fp + fn), precision and recall, over cells.
    """
    counts = np.asarray(counts, np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    items, said = counts.sum(axis=-1), counts.sum(axis=-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "dice": 2 * right / (items + said),
            "iou": right / (items + said - right),
            "precision": right / said,
            "recall": right / items,
        }


def measure(
    by_slide: NDArray[np.int64],
    names: Sequence[str],
    patients: Sequence[str],
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure segmentations from the confusion matrices of slides [n, C, C].

    Cells of all slides are counted together; intervals resample patients, with all their slides.
    ``dice`` and ``iou`` of the whole are means over the classes that have cells.

    Returns:
        {"dice", "iou", "accuracy", "ci": {…}, "classes": {name: {"cells", "dice", "iou",
        "precision", "recall", "ci"}}}.
    """
    counts = by_slide.sum(axis=0)
    there = counts.sum(axis=1) > 0
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    grouped = np.zeros((int(of.max()) + 1, *counts.shape), np.int64)
    np.add.at(grouped, of, by_slide)
    drawn = (
        np.concatenate(list(resample(grouped, resamples=resamples, seed=seed)))
        if resamples
        else None
    )

    def means(values: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
        found = overlap(values)
        with np.errstate(invalid="ignore"):
            return {
                "dice": np.nanmean(found["dice"][..., there], axis=-1),
                "iou": np.nanmean(found["iou"][..., there], axis=-1),
                "accuracy": scores_of(values)["accuracy"],
            }

    whole, single = means(counts), overlap(counts)
    document: dict[str, Any] = {key: float(value) for key, value in whole.items()}
    classes: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        classes[name] = {"cells": per_class(counts, index)["n"]}
        for key, values in single.items():
            number = float(values[index])
            classes[name][key] = None if np.isnan(number) else number
    if drawn is not None:
        on = bootstrap.support(patients, graded=True)
        document["ci"] = {
            key: bootstrap.interval(value, document[key], on) for key, value in means(drawn).items()
        }
        resampled = overlap(drawn)
        for index, name in enumerate(names):
            # Patients without a cell of the class say nothing about it.
            there_in = grouped[:, index, :].any(axis=1) | grouped[:, :, index].any(axis=1)
            own = bootstrap.Support(math.inf, float(np.count_nonzero(there_in)))
            classes[name]["ci"] = {
                key: bootstrap.interval(values[:, index], classes[name][key], own)
                for key, values in resampled.items()
            }
    return document | {"classes": classes}


def evaluate_segment(
    archive: Archive,
    reader: PatchReader,
    classes: Mapping[str, Sequence[str]],
    *,
    truth: str | Path | None = None,
    rest: str | None = None,
    split: str = "test",
    slides: Sequence[str] = (),
    steps: int = STEPS,
    out: str | Path | None = None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Segment the slides of a split that have outlines, and measure it.

    Args:
        archive: Archive of the slides: their files, tissue masks, patients and splits.
        reader: The model.
        classes: {class: names}; outlines carry the classes' names.
        truth: Folder of outlines, see :func:`pathflip.evaluation.grounding.read_outlines`.
        rest: Class of tissue without an outline; None leaves it out of the measures.
        split: Split of the slides; ``all`` for every slide.
        slides: Only these slides.
        steps: See :func:`segment_slide`.
        out: Folder for a picture of each slide.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the resamples.
        progress: Called after each slide.

    Returns:
        As :func:`measure`, with "levels": the same of each level alone, "majority" and "chance",
        "slides", "windows", "covered" (the share of outlined tissue cells that a window covered)
        and "failed", {"slide", "code", "why"} each.

    Raises:
        ConfigError: ``rest`` is no class, no slide of the split has an outline (``no_truth``), or
            every one failed (``no_slides``).
    """
    names = list(classes)
    if rest is not None and rest not in names:
        raise ConfigError(f"{rest!r} is none of the classes {', '.join(names)}.")
    wanted = {archive.resolve(name) for name in slides}
    rows = slide_rows(
        archive,
        usable=wanted or archive.ready_ids(),
        drawn=reader.drawn,
        splits=None if split == "all" or wanted else (split,),
    )
    outlines = read_outlines(archive, rows, findings=set(names), truth=truth)
    rows = [row for row in rows if row.slide_id in outlines]
    columns = ["slide_id", "width", "height", "tissue_png", "tissue_mpp", "thumbnail"]
    stored = {row["slide_id"]: row for row in archive.slides("ready", columns).to_pylist()}
    weights = class_weights(reader, classes)
    counts: dict[int | None, list[NDArray[np.int64]]] = {None: []}
    measured: list[SlideRow] = []
    failed: list[dict[str, str]] = []
    windows = outlined = covered = 0
    started = time.monotonic()
    with slide_reader(reader, steps=steps) as pixels:
        for number, row in enumerate(rows, start=1):
            about = stored[row.slide_id]
            mask = TissueMask.from_png(
                about["tissue_png"], mpp=about["tissue_mpp"], slide_mpp=row.mpp
            )
            try:
                with opened_uri(row.uri) as path:
                    found = segment_slide(
                        str(path), reader, weights, tissue=mask, width=about["width"],
                        height=about["height"], slides=pixels, steps=steps,
                    )  # fmt: skip
            except SlideError as error:
                failed.append({"slide": row.slide_id, "code": error.code, "why": str(error)})
                continue
            right = truth_map(
                outlines[row.slide_id], names, tissue=found.tissue, mpp=row.mpp, rest=rest
            )
            labels = found.labels()
            measured.append(row)
            windows += sum(one.windows for one in found.maps)
            outlined += int((right != NONE).sum())
            covered += int(((right != NONE) & (labels != NONE)).sum())
            counts[None].append(confusion_of(labels, right, classes=len(names)))
            for one in found.maps:
                # A slide without a level counts with no cells there.
                mine = counts.setdefault(one.level, [])
                mine += [np.zeros_like(counts[None][0])] * (len(measured) - 1 - len(mine))
                alone = found.only(one.level).labels()
                mine.append(confusion_of(alone, right, classes=len(names)))
            if out is not None:
                draw(
                    Path(out) / f"{row.stem}.png", found, names, thumbnail=about["thumbnail"],
                    truth=right,
                )  # fmt: skip
            if progress is not None:
                seconds = time.monotonic() - started
                progress(Progress(what="segment", done=number, total=len(rows), seconds=seconds))
    if not measured:
        why = f" The first: {failed[0]['why']}" if failed else ""
        raise ConfigError(
            f"None of {len(rows)} slides could be segmented.{why}",
            hint="Check that the files lie where they were ingested from.",
            code="no_slides",
        )
    patients = [row.patient_id or row.slide_id for row in measured]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    by_level: dict[str, Any] = {}
    for level in sorted(key for key in counts if key is not None):
        mine = counts[level]
        mine += [np.zeros_like(counts[None][0])] * (len(measured) - len(mine))
        if np.stack(mine).sum():
            name = level_name(reader.level_mpp[level])
            by_level[name] = measure(np.stack(mine), names, patients, **options)
    together = np.stack(counts[None])
    document = measure(together, names, patients, **options)
    return document | {"levels": by_level} | _trivial(together.sum(axis=0)) | {
        "model": reader.name,
        "split": split,
        "slides": len(measured),
        "patients": len(set(patients)),
        "windows": windows,
        "grid_um": GRID_UM,
        "steps": steps,
        "covered": covered / outlined if outlined else None,
        "failed": failed,
    }  # fmt: skip


def _trivial(counts: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Return mean Dice and accuracy of naming the largest class, or any at random, everywhere."""
    cells, classes = counts.sum(axis=1), len(counts)
    majority = np.zeros(counts.shape)
    majority[:, int(cells.argmax())] = cells
    chance = np.repeat(cells[:, None] / classes, classes, axis=1)
    return {
        name: {
            "dice": float(np.nanmean(overlap(one)["dice"][cells > 0])),
            "iou": float(np.nanmean(overlap(one)["iou"][cells > 0])),
            "accuracy": float(scores_of(one)["accuracy"]),
        }
        for name, one in (("majority", majority), ("chance", chance))
    }
