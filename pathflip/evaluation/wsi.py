"""Zero-shot classification of slides by their patches (MI-Zero): means of the top K.

The score of a class on a slide is the mean of its K highest cosines with patches. K is chosen on
the slides of split val, never on those measured, and every K is reported. With several levels, each
has its own top K; softmax of the means over τ, averaged over levels, is the slide's score.

Patches are those of archives that were ingested with the model's base encoder (the level is the one
whose nodes show as much as a patch), or the nodes of an archive's patch trees, all levels of them.

Shapes: n slides, k patches, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.classification import baselines, confusion, measure, scores_of
from pathflip.evaluation.encode import SlideRow, slide_rows
from pathflip.evaluation.patch_text import (
    PatchReader,
    class_weights,
    pool_levels,
    softmax,
)
from pathflip.evaluation.prompts import TEMPLATES
from pathflip.evaluation.tree_vectors import encode_trees
from pathflip.geometry import LEVEL_OF, level_name, nearest_level
from pathflip.interop.tables import is_unknown
from pathflip.progress import Progress, Report

if TYPE_CHECKING:
    from pathflip.archive import Archive

KS = (1, 5, 10, 50, 100)


def top_means(cosines: NDArray[Any], ks: Sequence[int] = KS) -> NDArray[np.float64]:
    """Return the mean of each class's K highest cosines [k, C] -> [K, C]; of all where k < K."""
    falling = -np.sort(-np.asarray(cosines, np.float64), axis=0)
    sums = falling.cumsum(axis=0)
    at = np.minimum(np.asarray(ks), len(falling))
    means: NDArray[np.float64] = sums[at - 1] / at[:, None]
    return means


def patch_level(reader: PatchReader, *, patch_um: float) -> int:
    """Return the level whose nodes show as much as a patch.

    Raises:
        ArchiveError: None does within a quarter (``encoder_scale``).
    """
    fields = {one: reader.field_um(one) for one in reader.levels}
    level = nearest_level(patch_um, fields)
    if level is None:
        shown = ", ".join(f"{field:g}" for field in fields.values())
        field = min(fields.values(), key=lambda one: abs(math.log(patch_um / one)))
        raise ArchiveError(
            f"The archive's patches show {patch_um:g} µm; nodes of the model show {shown} µm.",
            hint=f"Ingest with -o tiling.patch_um={field:g}, or use the patch trees: --trees.",
            code="encoder_scale",
        )
    return level


def evaluate_wsi(
    archives: Sequence[Archive],
    reader: PatchReader,
    classes: Mapping[str, Sequence[str]],
    *,
    label: str,
    trees: bool = False,
    split: str = "test",
    templates: Sequence[str] = TEMPLATES,
    ks: Sequence[int] = KS,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure zero-shot classification of slides.

    Args:
        archives: Archives of the same slides, one for each level (by its patches), or with
            ``trees`` one whose patch trees are read.
        reader: The model.
        classes: {label value: names}.
        label: Label of the slides.
        trees: Whether patches are the nodes of patch trees.
        split: Split of the slides; ``all`` for every slide, and then K is not chosen.
        templates: Templates of the prompts.
        ks: Values of K.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the resamples.
        progress: Called while slides are read.

    Returns:
        {"topk": {"1": {"weighted_f1", "balanced_accuracy", "ci", …}}, "k": the K best on val by
        balanced accuracy (the smallest of equals), or None without val; "chosen": the measures at
        that K; "levels": {"20x": the same K by that level alone}, "majority", "chance", "n"}.

    Raises:
        ConfigError: No slide of the split has one of the label values (``no_labels``).
        ArchiveError: An archive does not fit the model.
    """
    names = list(classes)
    splits = None if split == "all" else (split, "val")
    weights = class_weights(reader, classes, templates=templates).astype(np.float64)
    rows: dict[str, SlideRow] = {}
    found: list[tuple[str, int, NDArray[np.float64]]] = []
    for archive in archives:
        read = _tree_patches if trees else _patches
        for slide, level, vectors in read(archive, reader, splits, progress):
            rows.setdefault(slide.slide_id, slide)
            found.append((slide.slide_id, level, top_means(vectors @ weights.T, ks)))
    index = {name: i for i, name in enumerate(names)}
    known = {
        slide_id: index[row.labels[label]]
        for slide_id, row in sorted(rows.items())
        if row.labels.get(label) in index
    }
    ids = list(known)
    measured = np.array([split in ("all", rows[one].split) for one in ids], np.bool_)
    if not measured.any():
        values = sorted({row.labels.get(label, "") for row in rows.values()})
        raise ConfigError(
            f"No slide of split {split} has a label {label} among {', '.join(names)}.",
            hint=f"Its values are: {', '.join(filter(None, values)) or '(none)'}; see --label.",
            code="no_labels",
        )
    at = {slide_id: i for i, slide_id in enumerate(ids)}
    kept = [one for one in found if one[0] in at]
    item = np.array([at[slide_id] for slide_id, _, _ in kept])
    level_of = np.array([level for _, level, _ in kept])
    tops = np.stack([means for _, _, means in kept])  # [rows, K, C]
    scores = {
        k: pool_levels(softmax(tops[:, j], tau=reader.tau), item, count=len(ids))
        for j, k in enumerate(ks)
    }
    truth = np.array([known[one] for one in ids])
    patients = [rows[one].patient_id or one for one in ids]
    best = None
    val = np.array([rows[one].split == "val" for one in ids], np.bool_) & (
        split not in ("all", "val")
    )
    if val.any():
        balanced = {
            k: _balanced(truth[val], one[val].argmax(axis=1), len(names))
            for k, one in scores.items()
        }
        best = max(ks, key=lambda k: (balanced[k], -k))

    def of(mask: NDArray[np.bool_], values: NDArray[np.float64]) -> dict[str, Any]:
        return measure(
            truth[mask], values[mask].argmax(axis=1), names,
            groups=[patients[i] for i in np.flatnonzero(mask)], resamples=resamples, seed=seed,
        )  # fmt: skip

    document: dict[str, Any] = {
        "model": reader.name,
        "split": split,
        "label": label,
        "n": int(measured.sum()),
        "topk": {str(k): of(measured, one) for k, one in scores.items()},
        "k": best,
        "chosen": None if best is None else of(measured, scores[best]),
        "levels": {},
    }
    if best is not None:
        j = list(ks).index(best)
        for level in np.unique(level_of).tolist():
            on = level_of == level
            alone = pool_levels(softmax(tops[on, j], tau=reader.tau), item[on], count=len(ids))
            there = measured & ~np.isnan(alone).any(axis=1)
            if there.any():
                document["levels"][level_name(reader.level_mpp[level])] = of(there, alone)
    unknown = sum(
        split in ("all", row.split) and is_unknown(row.labels.get(label, ""))
        for row in rows.values()
    )
    others = sum(split in ("all", row.split) for row in rows.values()) - document["n"] - unknown
    return document | baselines(truth[measured], classes=len(names)) | {
        "unlabelled": unknown,
        "other_labels": others,
    }  # fmt: skip


def _balanced(truth: NDArray[np.int64], said: NDArray[np.int64], classes: int) -> float:
    return float(scores_of(confusion(truth, said, classes=classes))["balanced_accuracy"])


_Patches = Iterator[tuple[SlideRow, int, NDArray[np.float32]]]


def _patches(
    archive: Archive,
    reader: PatchReader,
    splits: Sequence[str] | None,
    progress: Report | None,
) -> _Patches:
    """Yield (slide, level, unit vectors [k, d]) of an archive's patches."""
    name, held = str(reader.base["name"]), archive.encoders()
    if name not in held or any(
        reader.base.get(key) != held[name][key] for key in ("revision", "dim")
    ):
        raise ArchiveError(
            f"Model {reader.name} reads features of {name} {reader.base.get('revision')}; the "
            f"archive {archive.uri} holds {', '.join(held) or 'none'}.",
            hint=f"Run: pathflip ingest SLIDES --archive {archive.uri} --encoder {name} "
            "--add-encoder",
            code="other_encoder",
        )
    level = patch_level(reader, patch_um=float(archive.tiling()["patch_um"]))
    slides = slide_rows(archive, usable=archive.ready_ids(name), drawn=reader.drawn, splits=splits)
    started = time.monotonic()
    for number, slide in enumerate(slides, start=1):
        features, mask, _ = archive.features_array(slide.slide_id, name)
        there = features[mask]
        if len(there):
            yield slide, level, reader.of_features(there, np.full(len(there), level))
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Progress(what="read", done=number, total=len(slides), seconds=seconds))


def _tree_patches(
    archive: Archive,
    reader: PatchReader,
    splits: Sequence[str] | None,
    progress: Report | None,
) -> _Patches:
    """Yield (slide, level, unit vectors [k, d]) of the nodes of a slide's trees, by level."""
    trees = encode_trees(archive, reader, splits=splits, progress=progress)
    ids = np.array([slide.slide_id for slide in trees.slides])
    for slide_id in dict.fromkeys(ids.tolist()):
        rows = np.flatnonzero(ids == slide_id)
        for level in reader.levels:
            on = trees.mask[rows] & (level == LEVEL_OF)
            if on.any():
                yield trees.slides[rows[0]], level, trees.vectors[rows][on]
