"""Confidence intervals by resampling patients, and metrics that take a matrix of weights.

A resample draws as many patients as there are, with replacement, and takes all slides of each as
often as it was drawn; so a resample is a row of weights over slides, and a metric that takes
[R, n] weights is computed for all resamples at once.

Percentiles of the resampled values are no interval where a class has a dozen patients: an AUC near
1 hardly varies among resamples, and a recall of 12 out of 12 not at all. So the resamples give the
variance alone, by it the number of independent answers that a measure is worth (effective sample
size: Korn and Graubard, 1998), and that number the score interval of a proportion (Wilson, 1927).
docs/howto/evaluation.md has the coverage.

Shapes: n slides, R resamples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95
_CONSTANT = 1e-12
"""Variance of resampled values below which they are all the same, but for rounding."""


class Support(NamedTuple):
    """Amount of data a measure rests on.

    Of classes that count alike, such as those of balanced accuracy or AUC, it is C² / Σ 1/n_c: as
    many as C classes of equal size would need to measure as well.

    Attributes:
        answers: Number of right or wrong answers; infinite where values are graded.
        patients: Number of patients they are of.
    """

    answers: float
    patients: float


def support(
    patients: Sequence[str | None], classes: ArrayLike | None = None, *, graded: bool = False
) -> Support:
    """Return what a measure on slides rests on.

    Args:
        patients: Patient of each slide [n], as of :func:`patient_weights`.
        classes: Class of each slide [n], of a measure whose classes count alike.
        graded: Whether a slide's value may be anything, not right or wrong.
    """
    of = _patient_index(patients)
    kind = np.zeros(len(of), np.int64)
    if classes is not None:
        _, kind = np.unique(np.asarray(classes), return_inverse=True)
    slides = np.bincount(kind)
    own = np.bincount(np.unique(np.stack([kind, of]), axis=1)[0]) if len(of) else slides
    answers, whole = (len(n) ** 2 / (1 / n).sum() if len(n) else 0.0 for n in (slides, own))
    return Support(math.inf if graded else float(answers), float(whole))


def _patient_index(patients: Sequence[str | None]) -> NDArray[np.int64]:
    """Return the number of each slide's patient [n]; a slide of none is a patient of its own."""
    names = [f"patient {p}" if p else f"slide {i}" for i, p in enumerate(patients)]
    _, of = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    index: NDArray[np.int64] = of.astype(np.int64)
    return index


def patient_weights(
    patients: Sequence[str | None], *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return the number of times each slide is drawn in each resample [R, n].

    Args:
        patients: Patient of each slide [n]; a slide of no known patient counts as its own.
        resamples: R, number of resamples.
        seed: Seed of the draws.
    """
    of = _patient_index(patients)
    count = int(of.max(initial=-1)) + 1
    rng = np.random.default_rng([seed, 0xB007])
    drawn = rng.multinomial(count, np.full(count, 1 / max(count, 1)), size=resamples)
    weights: NDArray[np.float64] = drawn[:, of].astype(np.float64)
    return weights


def interval(
    values: ArrayLike, estimate: float | None, on: Support, *, level: float = LEVEL
) -> list[float] | None:
    """Return the interval [low, high] of a measure in [0, 1].

    The measure is worth e (1 - e) / v independent answers, e its value and v the variance of the
    resamples, but no more than there are; where all resamples are alike, no more than there are
    patients. The interval is Wilson's for that number, with Student's quantile for the patients.

    Args:
        values: Resampled values [R]; those without one (NaN: a class was not drawn) are left out.
        estimate: Value of the measure itself.
        on: Data it rests on, as of :func:`support`.
        level: Share of such intervals that should hold the truth.

    Returns:
        None where the measure or all resamples have no value, or there is one patient only.
    """
    drawn = np.asarray(values, np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if estimate is None or math.isnan(estimate) or not len(drawn) or on.patients <= 1:
        return None
    variance = float(drawn.var(ddof=min(1, len(drawn) - 1)))
    alike = variance < _CONSTANT
    worth = on.patients if alike else estimate * (1 - estimate) / variance
    worth = max(1.0, min(worth, on.answers))
    z = _quantile(on.patients, level)
    share = z * z / worth
    centre = (estimate + share / 2) / (1 + share)
    half = math.sqrt(share * (estimate * (1 - estimate) + share / 4)) / (1 + share)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def difference_interval(
    values: ArrayLike, estimate: float | None, patients: int, *, level: float = LEVEL
) -> list[float] | None:
    """Return the interval [low, high] of a difference of two paired shares, in [-1, 1].

    Two patients are added, one for each side, and Wald's interval is taken, after Bonett and Price
    (2012), with Student's quantile.

    Args:
        values: Resampled differences [R]; NaN are left out.
        estimate: The difference itself.
        patients: Number of patients.
        level: Share of such intervals that should hold the truth.

    Returns:
        None where there is no value, or one patient only.
    """
    drawn = np.asarray(values, np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if estimate is None or math.isnan(estimate) or not len(drawn) or patients < 2:
        return None
    variance = float(drawn.var(ddof=min(1, len(drawn) - 1)))
    centre = estimate * patients / (patients + 2)
    spread = math.sqrt(patients**2 * variance + 2) / (patients + 2)
    half = _quantile(patients, level) * spread
    return [max(-1.0, centre - half), min(1.0, centre + half)]


def _quantile(patients: float, level: float) -> float:
    """Return Student's quantile of a two-sided interval."""
    from scipy.stats import t  # type: ignore[import-untyped]

    return float(t.ppf((1 + level) / 2, patients - 1))


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
