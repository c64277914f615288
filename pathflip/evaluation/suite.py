"""All evaluations of a slide model, from one pass over the slides' features.

:func:`evaluate_all` gives one document for reports and ablations; :func:`headline` the few numbers
of it that are compared between models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip.compat import check_fits
from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap, zeroshot
from pathflip.evaluation.encode import Encoder, batches, has_regions, list_slides
from pathflip.evaluation.grounding import VARIANTS, Grounder, queries_of, read_outlines
from pathflip.evaluation.prompts import Suite
from pathflip.evaluation.retrieval import evaluate_retrieval
from pathflip.geometry import Tiling
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run


def evaluate_all(
    archive: Archive,
    run: Run,
    *,
    suite: Suite | None = None,
    truth: str | Path | None = None,
    split: str = "test",
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Run every evaluation that the archive has ground truth for.

    Args:
        archive: Archive with slides, features, captions and labels.
        run: Run of the model.
        suite: Zero-shot tasks, and the queries of grounding; without it, neither is measured.
        truth: Outlines, see :func:`pathflip.evaluation.grounding.read_outlines`.
        split: The split measured, or ``all``.
        resamples: Number of bootstrap resamples of patients.
        seed: Seed of shuffles and resamples.
        progress: Called while slides are encoded.

    Returns:
        {"model", "fingerprint", "split", "slides", "retrieval", "retrieval_full", "zeroshot",
        "zeroshot_summary", "grounding"}; None for what there is no truth for.
    """
    name = check_fits(archive, run)
    list_slides(archive, run, splits=None if split == "all" else (split,))  # says if there is none
    slides = list_slides(archive, run, splits=None if split == "all" else (split, "val"))
    measured = [slide for slide in slides if split in ("all", slide.split)]
    texts = zeroshot.suite_texts(suite) if suite else []
    encoder = Encoder(run, slides, texts=texts)
    grounder = None
    if suite and has_regions(run) and (queries := queries_of(suite)):
        try:
            outlines = read_outlines(archive, measured, findings=set(queries), truth=truth)
        except ConfigError:
            if truth is not None:
                raise
        else:
            tiling = Tiling(**archive.tiling())
            grounder = Grounder(run, queries, outlines, tiling=tiling, variants=VARIANTS[:1])
    for batch in batches(
        archive, slides, encoder=name, device=run.model.device, what="evaluate", progress=progress
    ):
        encoder.add(batch)
        if grounder is not None:
            grounder.add(batch)
    encoded = encoder.result()
    options: dict[str, Any] = {"split": split, "resamples": resamples, "seed": seed}
    tasks = None
    if suite:
        tasks = _unless_missing(
            lambda: zeroshot.zeroshot(archive, run, suite, encoded=encoded, **options)
        )
    protocols = {
        protocol: _unless_missing(
            lambda protocol=protocol: evaluate_retrieval(
                archive, run, encoded=encoded, protocol=protocol, **options
            )
        )
        for protocol in ("batch64", "full")
    }
    return {
        "model": run.name,
        "fingerprint": run.fingerprint,
        "split": split,
        "slides": len(measured),
        "retrieval": protocols["batch64"],
        "retrieval_full": protocols["full"],
        "zeroshot": tasks,
        "zeroshot_summary": zeroshot.summary(tasks) if tasks else None,
        "grounding": grounder.result(resamples=resamples, seed=seed) if grounder else None,
    }


def headline(document: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Return {metric: (value, chance)} of the results of :func:`evaluate_all`, in reading order."""
    found: dict[str, tuple[float | None, float | None]] = {}
    if retrieval := document.get("retrieval"):
        for way in ("itr", "tir"):
            for key, value in retrieval[way].items():
                found[f"{way} {key}"] = (value, retrieval["chance"][key])
    if tasks := document.get("zeroshot"):
        presence = [task for task in tasks.values() if task["kind"] == "presence"]
        known = [task for task in presence if task["auc"] is not None]
        if known:
            found["presence auc"] = (_mean([task["auc"] for task in known]), 0.5)
            # For models whose regions were not trained, by the slide's vector alone.
            values = [task["auc_by"]["global/none"] for task in known]
            found["presence auc, global"] = (_mean(values), 0.5)
        for name, task in tasks.items():
            if task["kind"] == "multiclass":
                chance = task["baseline"]["balanced_accuracy"]
                found[f"{name} auc"] = (task["auc"], 0.5)
                found[f"{name} balanced accuracy"] = (task["balanced_accuracy"], chance)
            elif task["kind"] == "binary":
                found[f"{name} auc"] = (task["auc"], 0.5)
                by_slide = task["auc_by"].get("global/negation", task["auc_by"]["global/none"])
                found[f"{name} auc, global"] = (by_slide, 0.5)
    if grounding := document.get("grounding"):
        for key in ("pointing", "patch_ap"):
            found[key.replace("_", " ")] = (grounding[key], grounding[f"{key}_chance"])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _unless_missing(measure: Any) -> Any:
    """Return the result of an evaluation, or None where the archive has no truth for it."""
    try:
        return measure()
    except ConfigError as error:
        if error.code in ("no_captions", "no_labels"):
            return None
        raise
