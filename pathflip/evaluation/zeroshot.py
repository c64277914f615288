"""Zero-shot classification: scores of slides and prompts, measured against labels.

A class's weight is the normalised mean of its normalised prompt vectors, over names and templates.
The score of a class is the cosine of the slide's vector with it (``global``), the mean over its
prompts of cos(v_tc(t), t), what the text's own attention over the regions gathers (``local``, Eq.
5), or the sum of both.

* ``multiclass``: the best-scoring class; AUC one against the rest on softmax(score / 0.1).
* ``binary`` (a mutation): positive minus negative prompt; the paper gives one prompt only.
* ``presence`` of a finding: the positive score, by itself or against the other findings' or a
  neutral prompt's. Contrast with a negated prompt is offered and reported, but contrastive text
  towers read the noun and not its negation.

Shapes: n slides, L texts, C classes, d joint width, R resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.encode import Encoded, SlideRow, encode, list_slides
from pathflip.evaluation.prompts import Source, Suite, Task
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

logger = logging.getLogger(__name__)

TEMPERATURE = 0.1
SOURCES: tuple[Source, ...] = ("global", "local", "sum")


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Scores of single texts on slides, before they are combined.

    Attributes:
        at: Row of each text [L].
        vectors: Text vectors [L, d], L2-normalised.
        slide: Slide vectors [n, d], L2-normalised.
        local: cos(v_tc(t), t) [n, L]; None of a model without regions, whose every score is
            global.
    """

    at: Mapping[str, int]
    vectors: NDArray[np.float64]
    slide: NDArray[np.float64]
    local: NDArray[np.float64] | None

    def source(self, asked: Source) -> Source:
        """Return the kind of score that is used when one is asked for."""
        return asked if self.local is not None else "global"

    def of(self, texts: Sequence[str], source: Source) -> NDArray[np.float64]:
        """Return the score [n] of the class that these texts describe."""
        rows = [self.at[text] for text in texts]
        score = np.zeros(len(self.slide))
        if self.local is None or source in ("global", "sum"):
            weight = self.vectors[rows].mean(axis=0)
            score = score + self.slide @ (weight / max(float(np.linalg.norm(weight)), 1e-12))
        if self.local is not None and source in ("local", "sum"):
            score = score + self.local[:, rows].mean(axis=1)
        return score


def find_tasks(archive: Archive) -> Path | None:
    """Return ``tasks.yaml`` beside the folder of the slides, if there is one."""
    uris = [uri for uri in archive.slides("ready", ["uri"])["uri"].to_pylist() if uri]
    folders = dict.fromkeys(Path(uri).parent.parent for uri in uris)
    return next((f / "tasks.yaml" for f in folders if (f / "tasks.yaml").is_file()), None)


def default_tasks(archive: Archive) -> Path:
    """Return the task file that :func:`find_tasks` finds.

    Raises:
        ConfigError: There is none.
    """
    if (found := find_tasks(archive)) is not None:
        return found
    raise ConfigError(
        f"No tasks.yaml lies beside the folder of the slides of {archive.uri}.",
        hint="Give one with --tasks; docs/howto/evaluation.md shows how it is written.",
        code="no_tasks",
    )


def suite_texts(suite: Suite) -> list[str]:
    """Return every text a suite needs."""
    texts = []
    for task in suite.tasks:
        texts += task.texts(task.prompts) + task.texts(task.negative_prompts)
        texts += [text for names in task.classes.values() for text in task.texts(names)]
    return list(dict.fromkeys([*texts, suite.neutral]))


def text_scores(run: Run, encoded: Encoded) -> TextScores:
    """Encode the texts of an encoding beside its slides."""
    vectors = run.model.encode_text(list(encoded.texts)).float().cpu().numpy()
    return TextScores(
        at={text: i for i, text in enumerate(encoded.texts)},
        vectors=vectors.astype(np.float64),
        slide=encoded.slide.astype(np.float64),
        local=None if encoded.local is None else encoded.local.astype(np.float64),
    )


def task_score(
    task: Task,
    scores: TextScores,
    suite: Suite,
    *,
    score: Source | None = None,
    contrast: str | None = None,
) -> NDArray[np.float64]:
    """Return scores of a binary task [n], or of a multi-class one [n, C].

    Args:
        task: The task.
        scores: Scores of all texts of the suite.
        suite: Suite of the task, for the other tasks and the neutral prompt.
        score: Kind of score, instead of the task's own.
        contrast: Kind of contrast, instead of the task's own.
    """
    source = score or task.score
    if task.kind == "multiclass":
        columns = [scores.of(task.texts(names), source) for names in task.classes.values()]
        return np.stack(columns, axis=1)
    positive = scores.of(task.texts(task.prompts), source)
    contrast = contrast or task.contrast
    if contrast == "negation":
        return positive - scores.of(task.texts(task.negative_prompts), source)
    if contrast == "neutral":
        return positive - scores.of([suite.neutral], source)
    if contrast == "others" and (others := _others(task, suite)):
        rest = [scores.of(other.texts(other.prompts), source) for other in others]
        return np.asarray(positive - np.mean(rest, axis=0))
    return positive


def evaluate_task(
    task: Task,
    scores: TextScores,
    slides: Sequence[SlideRow],
    suite: Suite,
    *,
    split: str = "test",
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure one task on the slides of a split that have its label.

    The threshold of a two-sided task without a natural zero is the one that is best on the slides
    of split ``val``, where there are any; the AUC needs none.

    Args:
        task: The task.
        scores: Scores of all texts of the suite on all ``slides``.
        slides: Their rows [n].
        suite: See :func:`task_score`.
        split: The split measured; ``all`` for every slide.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the resamples.

    Returns:
        {"auc", "ci", "n", …}; with one class only, auc and ci are None.

    Raises:
        ConfigError: No slide has the label at all.
    """
    if not any(task.label in slide.labels for slide in slides):
        raise ConfigError(
            f"Task {task.name!r}: none of {len(slides)} slides has the label {task.label!r}.",
            hint="Name a label of the slides: Task(label=…), or label: in the task file.",
            code="no_labels",
        )
    chosen = np.array([split in ("all", slide.split) for slide in slides])
    values = task_score(task, scores, suite)
    if task.kind == "multiclass":
        found = _multiclass(task, values, slides, chosen, resamples=resamples, seed=seed)
        return found | {"score": scores.source(task.score)}
    truth = [task.is_positive(slide.labels.get(task.label)) for slide in slides]
    known = np.array([value is not None for value in truth])
    right = np.array([bool(value) for value in truth])
    on = known & chosen
    found = {
        "kind": task.kind,
        "score": scores.source(task.score),
        "contrast": task.contrast,
        "n": int(on.sum()),
        "n_pos": int(right[on].sum()),
    }
    threshold, origin = _threshold(task, values, right, slides, known, split=split)
    found |= _two_sided(
        values[on], right[on], [slides[i] for i in np.flatnonzero(on)],
        threshold=threshold, resamples=resamples, seed=seed,
    )  # fmt: skip
    found |= {"threshold": threshold, "threshold_from": origin}
    found["auc_by"] = {
        f"{source}/{contrast}": _number(
            bootstrap.auc(
                task_score(task, scores, suite, score=source, contrast=contrast)[on], right[on]
            )[0]
        )
        for source in SOURCES[: 1 if scores.local is None else None]
        for contrast in _contrasts(task, suite)
    }
    return found


def zeroshot(
    archive: Archive,
    run: Run,
    suite: Suite,
    *,
    split: str = "test",
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    encoded: Encoded | None = None,
    progress: Report | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every task of a suite.

    Args:
        archive: Archive with slides, features and labels.
        run: Run of the model.
        suite: The tasks.
        split: The split measured, or ``all``; val is encoded too, for thresholds.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the resamples.
        encoded: The slides already encoded with :func:`suite_texts`.
        progress: Called while slides are encoded.

    Returns:
        {task: {"auc", "ci", "n", …}} as :func:`evaluate_task` says.

    Raises:
        ConfigError: The split is empty or no slide has any label of the suite.
    """
    if encoded is None:
        splits = None if split == "all" else (split, "val")
        encoded = encode(archive, run, splits=splits, texts=suite_texts(suite), progress=progress)
    if not any(split in ("all", slide.split) for slide in encoded.slides):
        list_slides(archive, run, splits=(split,))  # says what is wrong
    labels = {key for slide in encoded.slides for key in slide.labels}
    missing = [task.label for task in suite.tasks if task.label not in labels]
    if len(missing) == len(suite.tasks):
        raise ConfigError(
            f"The slides have none of the labels {', '.join(missing)}.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --labels FILE",
            code="no_labels",
        )
    if missing:
        logger.warning("No slide has the label %s: not evaluated.", ", ".join(missing))
    scores = text_scores(run, encoded)
    return {
        task.name: evaluate_task(
            task, scores, encoded.slides, suite, split=split, resamples=resamples, seed=seed
        )
        for task in suite.tasks
        if task.label not in missing
    }


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return macro means by kind: {"presence": {"auc", "tasks"}, "binary": …, "multiclass": …}."""
    found: dict[str, Any] = {}
    for kind in ("presence", "binary", "multiclass"):
        mine = [task for task in results.values() if task["kind"] == kind]
        means: dict[str, Any] = {}
        for key in ("auc", "ap", "accuracy", "balanced_accuracy"):
            known = [task[key] for task in mine if task.get(key) is not None]
            if known:
                means[key] = float(np.mean(known))
        if means:
            found[kind] = means | {"tasks": len(mine)}
    return found


def _others(task: Task, suite: Suite) -> list[Task]:
    return [
        other
        for other in suite.tasks
        if other.kind == task.kind and other.group == task.group and other.name != task.name
    ]


def _contrasts(task: Task, suite: Suite) -> list[str]:
    """Return the contrasts that a task's prompts allow, to be compared."""
    found = ["none", "neutral"]
    if task.kind == "presence" and _others(task, suite):
        found.append("others")
    return [*found, "negation"] if task.negative_prompts else found


def _threshold(
    task: Task,
    values: NDArray[np.float64],
    right: NDArray[np.bool_],
    slides: Sequence[SlideRow],
    known: NDArray[np.bool_],
    *,
    split: str,
) -> tuple[float | None, str]:
    """Return the threshold of a positive decision, and its origin."""
    if task.contrast == "negation":
        return 0.0, "zero"
    on = known & np.array([slide.split == "val" for slide in slides])
    if split == "val":  # what is measured must not choose its own threshold
        return None, "none"
    if not on.any() or right[on].all() or not right[on].any():
        return None, "none"
    order = np.sort(np.unique(values[on]))
    cuts = np.concatenate([(order[1:] + order[:-1]) / 2, order[:1]])
    above = values[on][None, :] >= cuts[:, None]
    sensitivity = above[:, right[on]].mean(axis=1)
    specificity = 1 - above[:, ~right[on]].mean(axis=1)
    return float(cuts[int(np.argmax(sensitivity + specificity))]), "val"


def _two_sided(
    values: NDArray[np.float64],
    right: NDArray[np.bool_],
    slides: Sequence[SlideRow],
    *,
    threshold: float | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    from sklearn import metrics

    share = float(right.mean()) if len(right) else 0.0
    found: dict[str, Any] = {
        "auc": None,
        "ci": None,
        "ap": None,
        "accuracy": None,
        "balanced_accuracy": None,
        "baseline": {
            "auc": 0.5,
            "ap": share,
            "accuracy": max(share, 1 - share),
            "balanced_accuracy": 0.5,
        },
        "patient": _patient_auc(values, right, slides),
    }
    if not right.any() or right.all():
        return found
    found["auc"] = float(metrics.roc_auc_score(right, values))
    found["ap"] = float(metrics.average_precision_score(right, values))
    if resamples:
        weights = _weights(slides, resamples=resamples, seed=seed)
        drawn = bootstrap.auc(values, right, weights)
        found["ci"] = bootstrap.interval(drawn, found["auc"], _support(slides, right))
    if threshold is not None:
        said = values >= threshold
        found["accuracy"] = float(metrics.accuracy_score(right, said))
        found["balanced_accuracy"] = float(metrics.balanced_accuracy_score(right, said))
    return found


def _multiclass(
    task: Task,
    values: NDArray[np.float64],
    slides: Sequence[SlideRow],
    chosen: NDArray[np.bool_],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    from sklearn import metrics

    names = list(task.classes)
    given = [slide.labels.get(task.label, "") for slide in slides]
    on = chosen & np.array([value in task.classes for value in given])
    truth = np.array([names.index(value) for value, used in zip(given, on, strict=True) if used])
    values = values[on]
    counts = np.bincount(truth.astype(np.int64), minlength=len(names))
    share = float(counts.max() / max(1, len(truth)))
    found: dict[str, Any] = {
        "kind": task.kind,
        "score": task.score,
        "classes": dict(zip(names, counts.tolist(), strict=True)),
        "n": len(truth),
        "auc": None,
        "ci": None,
        "accuracy": None,
        "accuracy_ci": None,
        "balanced_accuracy": None,
        "weighted_f1": None,
        "baseline": {
            "auc": 0.5,
            "accuracy": share,
            "balanced_accuracy": 1 / max(1, int((counts > 0).sum())),
        },
    }
    if not len(truth):
        return found
    said = values.argmax(axis=1)
    found["accuracy"] = float(metrics.accuracy_score(truth, said))
    found["balanced_accuracy"] = float(bootstrap.balanced_accuracy(said, truth)[0])
    found["weighted_f1"] = float(metrics.f1_score(truth, said, average="weighted", zero_division=0))
    weights = None
    if resamples:
        rows = [slides[i] for i in np.flatnonzero(on)]
        weights = _weights(rows, resamples=resamples, seed=seed)
        drawn = bootstrap.weighted_mean(said == truth, weights)
        found["accuracy_ci"] = bootstrap.interval(drawn, found["accuracy"], _support(rows))
    shares = _softmax(values / TEMPERATURE)
    found["auc"] = _number(_one_against_rest(shares, truth)[0])
    if weights is not None and found["auc"] is not None:
        drawn = _one_against_rest(shares, truth, weights)
        found["ci"] = bootstrap.interval(drawn, found["auc"], _support(rows, truth))
    return found


def _one_against_rest(
    shares: NDArray[np.float64], truth: NDArray[Any], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the macro mean over classes of one-against-rest AUC, for each row of weights [R]."""
    present = np.unique(truth)
    if len(present) < 2:
        return np.full(1 if weights is None else len(weights), np.nan)
    areas = [bootstrap.auc(shares[:, c], truth == c, weights) for c in present]
    mean: NDArray[np.float64] = np.mean(areas, axis=0)
    return mean


def _patient_auc(
    values: NDArray[np.float64], right: NDArray[np.bool_], slides: Sequence[SlideRow]
) -> dict[str, Any]:
    """Return AUC of patients' mean scores; patients whose slides disagree are left out."""
    of: dict[str, list[int]] = {}
    for i, slide in enumerate(slides):
        of.setdefault(slide.patient_id or f"slide {slide.slide_id}", []).append(i)
    agreed = [rows for rows in of.values() if len(set(right[rows].tolist())) == 1]
    scores = np.array([values[rows].mean() for rows in agreed])
    truth = np.array([right[rows[0]] for rows in agreed], np.bool_)
    return {
        "auc": _number(bootstrap.auc(scores, truth)[0]) if len(agreed) else None,
        "n": len(agreed),
        "n_mixed": len(of) - len(agreed),
    }


def _weights(slides: Sequence[SlideRow], *, resamples: int, seed: int) -> NDArray[np.float64]:
    patients = [slide.patient_id for slide in slides]
    return bootstrap.patient_weights(patients, resamples=resamples, seed=seed)


def _support(slides: Sequence[SlideRow], classes: ArrayLike | None = None) -> bootstrap.Support:
    return bootstrap.support([slide.patient_id for slide in slides], classes)


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
