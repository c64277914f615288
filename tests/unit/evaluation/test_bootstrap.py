"""Weighted metrics against scikit-learn, intervals against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from pathflip.evaluation.bootstrap import (
    auc,
    balanced_accuracy,
    interval,
    patient_weights,
    weighted_mean,
)


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
    of_patient = rng.normal(size=200)
    values = np.repeat(of_patient, 5)  # five equal slides each say no more than one
    patients = [str(i) for i in np.repeat(np.arange(200), 5)]
    weights = patient_weights(patients, resamples=4000)
    low, high = interval(weighted_mean(values, weights)) or (0.0, 0.0)
    half = 1.96 * of_patient.std() / 200**0.5
    assert high - low == pytest.approx(2 * half, rel=0.08)
    assert (low + high) / 2 == pytest.approx(of_patient.mean(), abs=0.02)
    assert interval([np.nan, np.nan]) is None
    assert interval([0.0, 1.0, np.nan]) == pytest.approx([0.025, 0.975])
