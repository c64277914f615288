"""Measures of a classification from its confusion matrix, with intervals by resampling groups.

Everything is computed from counts [C, C] of true and predicted classes: a resample of patients is a
sum of their matrices, and one of n items that are all their own group is a multinomial draw over
the matrix's cells. So a hundred thousand tiles resample as fast as a hundred.

Shapes: n items, C classes, R resamples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.evaluation.bootstrap import RESAMPLES, interval, support

METRICS = ("weighted_f1", "balanced_accuracy", "accuracy")
_CHUNK = 1 << 22
"""Draws (resamples x groups) held at a time."""


def confusion(truth: ArrayLike, predicted: ArrayLike, *, classes: int) -> NDArray[np.int64]:
    """Return counts [C, C] of items by true class (rows) and predicted one."""
    cell = np.asarray(truth, np.int64) * classes + np.asarray(predicted, np.int64)
    counts: NDArray[np.int64] = np.bincount(cell, minlength=classes**2).reshape(classes, classes)
    return counts


def scores_of(counts: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Return {metric: [...]} of confusion matrices [..., C, C].

    ``weighted_f1`` is the mean of the classes' F1 by their number of items, 0 of a class that is
    never right; ``balanced_accuracy`` the mean recall of the classes that have items. Both as
    scikit-learn computes them. NaN of a matrix without items.
    """
    counts = np.asarray(counts, np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    items, said = counts.sum(axis=-1), counts.sum(axis=-2)
    total = items.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(items + said > 0, 2 * right / (items + said), 0.0)
        recall = np.where(items > 0, right / items, 0.0)
        return {
            "weighted_f1": (f1 * items).sum(axis=-1) / total,
            "balanced_accuracy": recall.sum(axis=-1) / (items > 0).sum(axis=-1),
            "accuracy": right.sum(axis=-1) / total,
        }


def resample(counts: NDArray[Any], *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield sums of matrices over drawn groups, in parts [r, ...] that make R together.

    Args:
        counts: Counts of each group [G, ...].
        resamples: R, number of resamples; G groups are drawn for each, with replacement.
        seed: Seed of the draws.
    """
    groups = len(counts)
    rng = np.random.default_rng([seed, 0xB007])
    flat = counts.reshape(groups, -1).astype(np.float64)
    step = max(1, _CHUNK // max(groups, 1))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=size)
        yield (drawn @ flat).reshape(size, *counts.shape[1:])


def resampled_confusions(
    truth: NDArray[np.int64],
    predicted: NDArray[np.int64],
    *,
    classes: int,
    groups: Sequence[str | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return confusion matrices of resampled groups [R, C, C].

    Args:
        truth: True class of each item [n].
        predicted: Predicted class [n].
        classes: C.
        groups: Patient or slide of each item; one of no known group is its own. None: all are.
        resamples: R, number of resamples.
        seed: Seed of the draws.
    """
    counts = confusion(truth, predicted, classes=classes)
    if groups is None or not any(groups):
        rng = np.random.default_rng([seed, 0xB007])
        total = int(counts.sum())
        drawn = rng.multinomial(total, (counts / total).ravel(), size=resamples)
        return drawn.reshape(resamples, classes, classes).astype(np.float64)
    names = [f"group {g}" if g else f"item {i}" for i, g in enumerate(groups)]
    _, of = np.unique(np.asarray(names), return_inverse=True)
    cell = (of * classes + truth) * classes + predicted
    by_group = np.bincount(cell, minlength=(int(of.max()) + 1) * classes**2)
    by_group = by_group.reshape(-1, classes, classes)
    return np.concatenate(list(resample(by_group, resamples=resamples, seed=seed)))


def measure(
    truth: ArrayLike,
    predicted: ArrayLike,
    names: Sequence[str],
    *,
    groups: Sequence[str | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure predicted classes against the truth.

    Args:
        truth: Index of the true class of each item [n], n >= 1.
        predicted: Index of the predicted class [n].
        names: Names of the classes [C].
        groups: See :func:`resampled_confusions`.
        resamples: Number of bootstrap resamples, 0 for no intervals.
        seed: Seed of the draws.

    Returns:
        {"n", "weighted_f1", "balanced_accuracy", "accuracy", "ci": {metric: [low, high]},
        "classes": {name: {"n", "recall", "precision", "f1"}}, "confusion": [[…]]}; recall of a
        class without items and precision of one never predicted are None.
    """
    truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    counts = confusion(truth, predicted, classes=len(names))
    found: dict[str, Any] = {"n": len(truth)}
    found |= {key: float(value) for key, value in scores_of(counts).items()}
    if resamples:
        drawn = scores_of(
            resampled_confusions(
                truth, predicted, classes=len(names), groups=groups, resamples=resamples, seed=seed
            )
        )
        owners = [None] * len(truth) if groups is None else groups
        whole, by_class = support(owners), support(owners, truth)
        found["ci"] = {
            key: interval(values, found[key], by_class if key == "balanced_accuracy" else whole)
            for key, values in drawn.items()
        }
    found["classes"] = {name: per_class(counts, i) for i, name in enumerate(names)}
    found["confusion"] = counts.tolist()
    return found


def per_class(counts: ArrayLike, index: int) -> dict[str, Any]:
    """Return {"n", "recall", "precision", "f1"} of one class of a confusion matrix."""
    counts = np.asarray(counts)
    right, items, said = counts[index, index], counts[index].sum(), counts[:, index].sum()
    return {
        "n": int(items),
        "recall": float(right / items) if items else None,
        "precision": float(right / said) if said else None,
        "f1": float(2 * right / (items + said)) if items + said else None,
    }


def baselines(truth: ArrayLike, *, classes: int) -> dict[str, dict[str, float]]:
    """Return what needs no model, on the same items: {"majority": {metric: …}, "chance": {…}}.

    ``majority`` always answers the most frequent class. ``chance`` answers any of the C classes
    with equal probability; its figures are those of the expected confusion matrix.
    """
    items = np.bincount(np.asarray(truth, np.int64), minlength=classes)
    majority = np.zeros((classes, classes))
    majority[:, int(items.argmax())] = items
    chance = np.repeat(items[:, None] / classes, classes, axis=1)
    return {
        name: {key: float(value) for key, value in scores_of(counts).items()}
        for name, counts in (("majority", majority), ("chance", chance))
    }
