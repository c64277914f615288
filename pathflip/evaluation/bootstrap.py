"""Confidence intervals by resampling patients, and metrics that take a matrix of weights.

A resample draws as many patients as there are, with replacement, and takes all slides of each as
often as it was drawn; so a resample is a row of weights over slides, and a metric that takes
[R, n] weights is computed for all resamples at once.

Shapes: n slides, R resamples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95


def patient_weights(
    patients: Sequence[str | None], *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return the number of times each slide is drawn in each resample [R, n].

    Args:
        patients: Patient of each slide [n]; a slide of no known patient counts as its own.
        resamples: R, number of resamples.
        seed: Seed of the draws.
    """
    names = [f"patient {p}" if p else f"slide {i}" for i, p in enumerate(patients)]
    _, of = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    count = int(of.max(initial=-1)) + 1
    rng = np.random.default_rng([seed, 0xB007])
    drawn = rng.multinomial(count, np.full(count, 1 / max(count, 1)), size=resamples)
    weights: NDArray[np.float64] = drawn[:, of].astype(np.float64)
    return weights


def interval(values: ArrayLike, *, level: float = LEVEL) -> list[float] | None:
    """Return the percentile interval [low, high] of resampled values [R].

    Resamples without a value (NaN: a class was not drawn) are left out; None if all are.
    """
    drawn = np.asarray(values, np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def auc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> NDArray[Any]:
    """Return the area under the ROC curve for each row of weights; ties count half.

    Args:
        scores: [n], higher is more positive.
        positive: bool [n].
        weights: [R, n]; all one by default.

    Returns:
        [R] ([1] without weights), NaN where either class has no weight.
    """
    scores = np.asarray(scores, np.float64)
    positive = np.asarray(positive, np.bool_)
    weights = np.ones((1, len(scores))) if weights is None else np.asarray(weights, np.float64)
    values, level = np.unique(scores, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(values)))
    sorted_weights = weights[:, order]
    right = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)  # [R, levels]
    wrong = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(wrong, axis=1) - wrong
    total = right.sum(axis=1) * wrong.sum(axis=1)
    area = (right * (below + wrong / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, area / total, np.nan)


def balanced_accuracy(
    predicted: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None
) -> NDArray[Any]:
    """Return the mean over classes of recall, for each row of weights [R].

    Classes without weight are left out of the mean, as scikit-learn does.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    weights = np.ones((1, len(truth))) if weights is None else np.asarray(weights, np.float64)
    recalls = []
    for value in np.unique(truth):
        mine = weights[:, truth == value]
        with np.errstate(invalid="ignore", divide="ignore"):
            recalls.append(mine @ (predicted[truth == value] == value) / mine.sum(axis=1))
    stacked = np.array(recalls)
    known = ~np.isnan(stacked)
    mean: NDArray[Any] = np.nansum(stacked, axis=0) / np.maximum(known.sum(axis=0), 1)
    return mean


def weighted_mean(values: ArrayLike, weights: ArrayLike) -> NDArray[Any]:
    """Return the mean of [n] values under each row of [R, n] weights; NaN without any weight."""
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    total = weights.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weights @ values / total, np.nan)
