"""Temperatures and calibration errors against models whose confidence is known."""

from __future__ import annotations

import numpy as np
import pytest

from pathflip.calibration import (
    biased,
    chance_error,
    equal_mass,
    expected_error,
    fit_bias,
    fit_temperature,
    reliability,
    tempered,
    weighted_error,
)

RNG = np.random.default_rng(0)
_SEEDED = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = _SEEDED


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("heat", [0.2, 1.0, 3.0])
def test_the_temperature_that_spoilt_them_is_found(heat: float) -> None:
    """Answers are drawn from probabilities; what the model says has ``heat`` times the logits."""
    logits = RNG.normal(0, 2, (6000, 4))
    truth = [int(RNG.choice(4, p=row)) for row in softmax(logits)]
    said = list(softmax(logits * heat))
    found = fit_temperature(said, truth, mode="option_ll")
    assert found.temperature == pytest.approx(heat, rel=0.08)
    assert found.nll <= found.nll_before + 1e-9
    assert found.ece < 0.03
    if heat != 1:
        assert found.ece_before > 3 * found.ece
    assert (found.questions, found.mode) == (6000, "option_ll")


def test_a_temperature_changes_no_choice_and_can_be_taken_back() -> None:
    said = softmax(RNG.normal(0, 3, (200, 5)))
    hot = tempered(said, 2.5)
    assert (hot.argmax(1) == said.argmax(1)).all()
    assert hot == pytest.approx(softmax(np.log(said) / 2.5))
    assert tempered(hot, 1 / 2.5) == pytest.approx(said)
    assert (hot.max(1) < said.max(1)).all()
    named_none = np.array([[0.0, 0.0], [1.0, 0.0]])
    assert (tempered(named_none, 3.0)[0] == 0).all()
    assert tempered(named_none, 3.0)[1].argmax() == 0


def test_errors_by_hand() -> None:
    sure = np.repeat([0.6, 0.9], 10)
    right = np.array([1] * 5 + [0] * 5 + [1] * 6 + [0] * 4)
    assert expected_error(sure, right) == pytest.approx((0.1 + 0.3) / 2)
    assert reliability(sure, right) == [
        {"n": 10, "confidence": pytest.approx(0.6), "accuracy": 0.5},
        {"n": 10, "confidence": pytest.approx(0.9), "accuracy": 0.6},
    ]
    assert expected_error([0.7], [0]) == pytest.approx(0.7)
    only_second = np.repeat([[0.0, 1.0]], 10, axis=1)
    assert weighted_error(sure, right, only_second)[0] == pytest.approx(0.3)


def test_bins_hold_as_many_and_equal_values_stay_together() -> None:
    values = RNG.random(1000)
    assert np.bincount(equal_mass(values)).tolist() == [100] * 10
    found = equal_mass([0.5] * 70 + [0.9] * 30)
    assert found.tolist() == [0] * 70 + [1] * 30


def test_a_perfect_model_has_the_error_of_chance() -> None:
    sure = RNG.uniform(0.3, 1, 400)
    drawn = [expected_error(sure, RNG.random(400) < sure) for _ in range(200)]
    assert chance_error(sure) == pytest.approx(np.mean(drawn), abs=0.003)
    assert chance_error(sure) < chance_error(sure[:40])


def test_the_bias_of_abstaining_is_found() -> None:
    """The last entry's logit is 2.5 too low, behind a temperature of 1.5."""
    logits = RNG.normal(0, 2, (4000, 4))
    truth = [int(RNG.choice(4, p=row)) for row in softmax(logits)]
    spoilt = (logits - [0, 0, 0, 2.5]) * 1.5
    bias = fit_bias(list(softmax(spoilt)), truth, 1.5)
    assert bias == pytest.approx(2.5, abs=0.2)
    mended = biased(tempered(softmax(spoilt), 1.5), 2.5)
    assert mended == pytest.approx(softmax(logits))
    assert (biased(np.zeros((1, 3)), 2.0) == 0).all()
