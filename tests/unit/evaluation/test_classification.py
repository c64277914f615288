"""Measures from confusion matrices, against scikit-learn and plain resampling."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score

from pathflip.evaluation.classification import (
    baselines,
    confusion,
    measure,
    resampled_confusions,
    scores_of,
)


def sklearn_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "weighted_f1": f1_score(truth, predicted, average="weighted", zero_division=0),
        "balanced_accuracy": balanced_accuracy_score(truth, predicted),
        "accuracy": accuracy_score(truth, predicted),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 3], p=[0.7, 0.2, 0.1], size=50)  # class 2 has no item
    predicted = np.where(rng.uniform(size=50) < 0.5, truth, rng.integers(0, 3, size=50))
    counts = confusion(truth, predicted, classes=4)
    assert (counts == confusion_matrix(truth, predicted, labels=range(4))).all()
    found = scores_of(counts)
    for key, value in sklearn_scores(truth, predicted).items():
        assert found[key] == pytest.approx(value, abs=1e-12)


def test_a_stack_of_matrices_is_scored_one_by_one() -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=(5, 3, 3))
    stacked = scores_of(counts)
    for i, one in enumerate(counts):
        assert all(stacked[key][i] == value for key, value in scores_of(one).items())


def test_groups_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    groups = [f"p{i // 10}" for i in range(40)]
    drawn = resampled_confusions(truth, predicted, classes=2, groups=groups, resamples=300)
    parts = np.stack(
        [confusion(truth[i : i + 10], predicted[i : i + 10], classes=2) for i in range(0, 40, 10)]
    )
    assert (drawn.sum(axis=(1, 2)) == 40).all()
    # Each resample is a whole-number combination of the four groups' matrices.
    weights, *_ = np.linalg.lstsq(parts.reshape(4, 4).T, drawn.reshape(300, 4).T, rcond=None)
    assert np.linalg.matrix_rank(parts.reshape(4, 4)) == 4
    assert np.allclose(weights, np.rint(weights), atol=1e-8)
    assert np.allclose(weights.sum(axis=0), 4)


def test_items_without_groups_resample_as_drawing_items_does() -> None:
    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    options = {"classes": 3, "resamples": 4000}
    cells = resampled_confusions(truth, predicted, groups=None, **options)
    plain = resampled_confusions(truth, predicted, groups=[*["x"], *[None] * 59], **options)
    assert (cells.sum(axis=(1, 2)) == 60).all()
    assert np.allclose(cells.mean(axis=0), plain.mean(axis=0), atol=0.35)
    assert np.allclose(cells.std(axis=0), plain.std(axis=0), atol=0.2)


def test_the_interval_of_half_right_answers_is_binomial() -> None:
    truth = np.zeros(400, np.int64)
    predicted = np.arange(400) % 2
    low, high = measure(truth, predicted, ["a", "b"])["ci"]["accuracy"]
    half = 1.96 * np.sqrt(0.25 / 400)
    assert low == pytest.approx(0.5 - half, abs=0.012)
    assert high == pytest.approx(0.5 + half, abs=0.012)


def test_one_patient_gives_no_interval() -> None:
    found = measure([0, 1, 1], [0, 1, 0], ["a", "b"], groups=["p", "p", "p"])
    assert found["ci"]["accuracy"] is None


def test_classes_without_items_or_predictions_have_no_recall_or_precision() -> None:
    found = measure([0, 0, 1], [0, 2, 2], ["a", "b", "c"], resamples=0)
    assert found["classes"]["a"] == {
        "n": 2, "recall": 0.5, "precision": 1.0, "f1": pytest.approx(2 / 3),
    }  # fmt: skip
    assert found["classes"]["b"] == {"n": 1, "recall": 0.0, "precision": None, "f1": 0.0}
    assert found["classes"]["c"] == {"n": 0, "recall": None, "precision": 0.0, "f1": 0.0}
    assert "ci" not in found


def test_majority_and_chance() -> None:
    truth = np.repeat([0, 1, 2], [60, 30, 10])
    found = baselines(truth, classes=4)
    assert found["majority"] == pytest.approx(sklearn_scores(truth, np.zeros(100, np.int64)))
    assert found["chance"]["accuracy"] == pytest.approx(0.25)
    assert found["chance"]["balanced_accuracy"] == pytest.approx(0.25)
    shares = np.array([0.6, 0.3, 0.1])
    closed = float((shares * 2 * (shares / 4) / (shares + 1 / 4)).sum())
    assert found["chance"]["weighted_f1"] == pytest.approx(closed)
    guesses = np.random.default_rng(0).integers(0, 4, size=(200, 100))
    drawn = [f1_score(truth, one, average="weighted", zero_division=0) for one in guesses]
    assert np.mean(drawn) == pytest.approx(found["chance"]["weighted_f1"], abs=0.01)
