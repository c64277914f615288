"""Weighted metrics against scikit-learn, intervals against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pathflip.evaluation.bootstrap import (
    Support,
    auc,
    balanced_accuracy,
    difference_interval,
    interval,
    patient_weights,
    support,
    weighted_mean,
)
from pathflip.evaluation.classification import scores_of


def test_auc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, 60).astype(float)  # many ties
    positive = rng.uniform(size=60) < 0.4
    weights = rng.integers(0, 4, (25, 60)).astype(float)
    expected = [metrics.roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert auc(scores, positive, weights) == pytest.approx(expected, abs=1e-12)
    assert auc(scores, positive)[0] == pytest.approx(metrics.roc_auc_score(positive, scores))
    only = np.where(positive, weights[:1], 0.0)
    assert np.isnan(auc(scores, positive, only)).all()


def test_balanced_accuracy_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth, said = rng.integers(0, 3, (2, 50))
    weights = rng.integers(1, 4, (10, 50)).astype(float)
    expected = [metrics.balanced_accuracy_score(truth, said, sample_weight=w) for w in weights]
    assert balanced_accuracy(said, truth, weights) == pytest.approx(expected)
    assert weighted_mean(said == truth, weights) == pytest.approx(
        [metrics.accuracy_score(truth, said, sample_weight=w) for w in weights]
    )


def test_patients_are_drawn_whole() -> None:
    patients = ["a", "a", "b", None, "c", None, "b"]
    weights = patient_weights(patients, resamples=500, seed=4)
    assert (weights == patient_weights(patients, resamples=500, seed=4)).all()
    assert (weights != patient_weights(patients, resamples=500, seed=5)).any()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 6]).all()
    assert (weights[:, 3] != weights[:, 5]).any()  # unknown patients are not one patient
    drawn = weights[:, [0, 2, 3, 4, 5]]
    assert (drawn.sum(axis=1) == 5).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(5), abs=0.2)


def test_interval_of_a_mean_is_that_of_its_patients() -> None:
    rng = np.random.default_rng(2)
    of_patient = rng.uniform(0.3, 0.7, size=200)
    values = np.repeat(of_patient, 5)  # five equal slides each say no more than one
    patients = [str(i) for i in np.repeat(np.arange(200), 5)]
    weights = patient_weights(patients, resamples=4000)
    drawn, on = weighted_mean(values, weights), support(patients, graded=True)
    assert on == Support(math.inf, 200)
    low, high = interval(drawn, float(values.mean()), on) or (0.0, 0.0)
    half = 1.96 * of_patient.std() / 200**0.5
    assert high - low == pytest.approx(2 * half, rel=0.08)
    assert (low + high) / 2 == pytest.approx(of_patient.mean(), abs=0.002)


def test_interval_of_a_share_is_wilsons() -> None:
    """With one slide a patient, it is the score interval, also where all resamples are alike."""
    for right, count in ((40, 80), (76, 80), (80, 80), (0, 80)):
        values = np.arange(count) < right
        patients = [str(i) for i in range(count)]
        drawn = weighted_mean(values, patient_weights(patients, resamples=20_000))
        found = interval(drawn, right / count, support(patients))
        known = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert found == pytest.approx([known.low, known.high], abs=0.006)
    whole = Support(80, 80)
    assert interval([np.nan, np.nan], 0.5, whole) is None
    assert interval([0.5, 0.6], None, whole) is None
    assert interval([0.5, 0.6], 0.5, Support(80, 1)) is None
    assert difference_interval([0.1, 0.2], 0.1, 1) is None


def test_a_measure_rests_on_its_classes_alike() -> None:
    patients = ["a", "a", "b", "c", None, None]
    assert support(patients) == Support(6, 5)
    assert support(patients, [0, 0, 0, 1, 1, 1]) == pytest.approx(
        (4 / (1 / 3 + 1 / 3), 4 / (1 / 2 + 1 / 3))
    )
    assert support([]) == Support(0, 0)


def covered(
    repeats: int, *, positives: int, negatives: int, slides: int, area: float, same: float
) -> dict[str, float]:
    """Share of cohorts whose intervals hold the truth, by measure.

    Scores are normal, two of every slide, shifted for positive patients so that the AUC is
    ``area``; a share ``same`` of their variance is the patient's. The threshold is half way.
    """
    rng = np.random.default_rng(7)
    shift = 2**0.5 * stats.norm.ppf(area)
    recall = float(stats.norm.cdf(shift / 2))
    count = positives + negatives
    expected = np.outer([negatives, positives], [recall, recall])
    expected[[0, 1], [1, 0]] = np.array([negatives, positives]) * (1 - recall)
    truth = dict.fromkeys(("accuracy", "balanced_accuracy", "recall"), recall) | {
        "auc": area, "weighted_f1": float(scores_of(expected)["weighted_f1"]), "difference": 0.0,
    }  # fmt: skip
    held = dict.fromkeys(truth, 0)
    for repeat in range(repeats):
        of = np.repeat(np.arange(count), rng.integers(1, slides + 1, count))
        positive, patients = of < positives, [str(i) for i in of]
        noise = same**0.5 * rng.normal(size=(2, count))[:, of]
        noise = noise + (1 - same) ** 0.5 * rng.normal(size=(2, len(of)))
        scores = noise + shift * positive
        said = scores > shift / 2
        right = said == positive
        weights = patient_weights(patients, resamples=200, seed=repeat)
        weights = np.concatenate([np.ones((1, len(of))), weights])
        cells = [weights @ ((positive == i) & (said[0] == j)) for i in (0, 1) for j in (0, 1)]
        values = scores_of(np.stack(cells, axis=1).reshape(-1, 2, 2)) | {
            "auc": auc(scores[0], positive, weights),
            "recall": weighted_mean(said[0, positive], weights[:, positive]),
        }
        whole, by_class = support(patients), support(patients, positive)
        on = dict.fromkeys(values, whole) | {
            "auc": by_class, "balanced_accuracy": by_class,
            "recall": support([patients[i] for i in np.flatnonzero(positive)]),
        }  # fmt: skip
        found = {key: interval(own[1:], float(own[0]), on[key]) for key, own in values.items()}
        gain = weighted_mean(right[0].astype(float) - right[1], weights)
        found["difference"] = difference_interval(gain[1:], float(gain[0]), count)
        for key, (low, high) in found.items():  # type: ignore[misc]
            held[key] += low <= truth[key] <= high
    return {key: number / repeats for key, number in held.items()}


@pytest.mark.parametrize(
    "cohort",
    [
        {"positives": 12, "negatives": 40, "slides": 1, "area": 0.95, "same": 0.0},
        {"positives": 12, "negatives": 40, "slides": 3, "area": 0.95, "same": 0.8},
        {"positives": 12, "negatives": 12, "slides": 2, "area": 0.8, "same": 0.5},
    ],
    ids=["one slide each", "up to three alike", "even classes"],
)
def test_intervals_hold_the_truth_at_twelve_positives(cohort: dict[str, float]) -> None:
    """Percentiles hold an AUC of 0.95 in 84 %, and a recall of 0.88 in 79 %, of such cohorts.

    The standard error of 0.93 among 400 is 0.013: seeded, so the margin is for other versions.
    """
    for key, share in covered(400, **cohort).items():  # type: ignore[arg-type]
        assert share >= 0.92, key
