"""All measures of a patch and text model that an archive of patch trees has the truth for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.errors import ConfigError
from pathflip.evaluation.pairs import evaluate_pairs
from pathflip.evaluation.patch_text import patch_reader
from pathflip.evaluation.trees import CUES, evaluate_trees
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import TreeRun


def evaluate_patches(
    archive: Archive,
    run: TreeRun,
    *,
    truth: str | None = None,
    split: str = "test",
    resamples: int = 200,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a model on the patch trees of a split: planted truth, and pairs with captions.

    Captions and keywords are of the source that the run was trained on, where it names one.

    Args:
        archive: Archive with trees.
        run: Run of the model.
        truth: ``trees.csv`` of a synthetic cohort; by default that beside the slides, if any.
        split: Split of the trees.
        resamples: Number of bootstrap resamples.
        progress: Called while trees are encoded.

    Returns:
        {"fingerprint", "split", "trees", "pairs", "headline": {metric: [value, chance]}}; trees
        and pairs are as their commands return them, None without truth or captions.
    """
    reader = patch_reader(run, pixels=False)
    options: dict[str, Any] = {
        "split": split, "source": run.config.get("source"), "resamples": resamples,
        "progress": progress,
    }  # fmt: skip
    found: dict[str, Any] = {"trees": None, "pairs": None}
    try:
        found["trees"] = evaluate_trees(archive, reader, truth=truth, **options)
    except ConfigError as error:
        if error.code != "no_truth" or truth is not None:
            raise
    try:
        found["pairs"] = evaluate_pairs(archive, reader, shuffles=0, **options)
    except ConfigError as error:
        if error.code != "no_captions":
            raise
    return {
        "fingerprint": run.fingerprint,
        "split": split,
        **found,
        "headline": headline(found),
    }


def headline(document: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Return {metric: (value, chance)} of :func:`evaluate_patches`, in reading order."""
    found: dict[str, tuple[float | None, float | None]] = {}
    if trees := document["trees"]:
        for task in ("joint", *CUES):
            own = trees[task]
            found[task] = (own["pooled"]["accuracy"], own["chance"])
        joint = trees["joint"]
        best = joint["levels"][joint["best_level"]]["accuracy"]
        found["joint, best level"] = (best, joint["chance"])
        found["joint, pooled minus best"] = (joint["pooled_minus_best"]["difference"], None)
        every = trees.get("probe", {})
        few = every.get("few") or {}
        for name, probes in {
            **{f"{name} probe": every.get(name) for name in ("v", "z")},
            **{f"{name} probe of {few.get('shots')}": few.get(name) for name in ("v", "z")},
        }.items():
            for cue, levels in (probes or {}).items():
                for level, value in levels.items():
                    found[f"{name}, {cue} {level}"] = (value, trees[cue]["chance"])
    if pairs := document["pairs"]:
        for name, own in {"all levels": pairs["all"], **pairs["levels"]}.items():
            recalls = [value for way in ("itr", "tir") for value in own[way].values()]
            chance = float(np.mean(list(own["chance"].values())))
            found[f"mean recall, {name}"] = (float(np.mean(recalls)), chance)
    return found
