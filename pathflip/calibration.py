"""Calibration of choices: a temperature fitted on validation questions, and how far off it leaves.

A model that says 0.9 should be right nine times in ten. Temperature scaling (Guo et al., 2017)
divides the logits of a question's options by one number for all questions, which changes no choice.
Abstaining, where a model may, is one more entry with a logit like theirs and a bias of its own, as
its text has another length and is learned from other questions. The expected calibration error
(ECE) compares confidence and accuracy in bins.

Shapes: n questions, C options of one, R orders they are shown in, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 10
FEWEST = 50
"""Questions below which no temperature is fitted."""
FEWEST_UNANSWERABLE = 20
"""Such questions below which no bias of abstaining is fitted."""
COLDEST, HOTTEST = 0.02, 50.0
STRONGEST = 20.0
"""Largest bias."""
CHANCE_DRAWS = 200
"""Sets of answers drawn for the error that a perfectly calibrated model has."""
_SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperature of a model's choices, and what it was fitted on.

    Attributes:
        mode: Way an option is chosen that it is for; see :data:`pathflip.slide_qa.MODES`.
        temperature: Divisor of the options' logits; 1 leaves them.
        questions: Number of validation questions.
        ece_before, ece: Expected calibration error on them, without and with the temperature.
        nll_before, nll: Mean negative log-probability of the right option, likewise.
        abstain_bias: Added to the logit of abstaining, behind the temperature.
        unanswerable: Number of validation questions that no option answers, which it was fitted
            on; 0: none was fitted.
    """

    mode: str
    temperature: float
    questions: int
    ece_before: float
    ece: float
    nll_before: float
    nll: float
    abstain_bias: float = 0.0
    unanswerable: int = 0

    def as_json(self) -> dict[str, Any]:
        """The object in instruct.json."""
        return asdict(self)


def tempered(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return probabilities [..., C] whose logits are divided by a temperature; rows of zeros stay.

    ``tempered(tempered(p, t), 1 / t)`` is ``p``.
    """
    if temperature == 1:
        return probabilities
    named = probabilities.any(axis=-1, keepdims=True)
    logits = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)) / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(np.where(named, powers / powers.sum(axis=-1, keepdims=True), 0.0))


def biased(probabilities: NDArray[np.float64], bias: float) -> NDArray[np.float64]:
    """Return probabilities [..., E] with a bias added to the logit of the last entry."""
    if bias == 0:
        return probabilities
    powers = probabilities.copy()
    powers[..., -1] *= np.exp(bias)
    total = powers.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(powers, total, out=powers, where=total > 0))


def fit_bias(
    probabilities: Sequence[NDArray[np.float64]], truth: Sequence[int], temperature: float
) -> float:
    """Fit the bias of abstaining that makes the right entries most probable.

    Args:
        probabilities: Probabilities of the options of each question and, last, of abstaining,
            without a temperature [n][C + 1].
        truth: Position of the right entry of each [n].
        temperature: Temperature of the options.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    rows = [tempered(row, temperature) for row in probabilities]

    def loss(bias: float) -> float:
        right = [biased(row, bias)[at] for row, at in zip(rows, truth, strict=True)]
        return float(-np.log(np.maximum(right, _SMALLEST)).mean())

    return float(minimize_scalar(loss, bounds=(-STRONGEST, STRONGEST), method="bounded").x)


def fit_temperature(
    probabilities: Sequence[NDArray[np.float64]], truth: Sequence[int], *, mode: str
) -> Calibration:
    """Fit the temperature that makes the right options most probable.

    Args:
        probabilities: Probabilities of the options of each question [n][C].
        truth: Position of the right option of each [n].
        mode: Way the options were scored.
    """
    from scipy.optimize import minimize_scalar

    def loss(temperature: float) -> float:
        right = [
            tempered(row, temperature)[at] for row, at in zip(probabilities, truth, strict=True)
        ]
        return float(-np.log(np.maximum(right, _SMALLEST)).mean())

    found = minimize_scalar(
        lambda power: loss(float(np.exp(power))),
        bounds=(np.log(COLDEST), np.log(HOTTEST)),
        method="bounded",
    )
    temperature = float(np.exp(found.x))

    def error(by: float) -> float:
        rows = [tempered(row, by) for row in probabilities]
        right = [int(row.argmax()) == at for row, at in zip(rows, truth, strict=True)]
        return expected_error([row.max() for row in rows], right)

    return Calibration(
        mode=mode,
        temperature=temperature,
        questions=len(truth),
        ece_before=error(1.0),
        ece=error(temperature),
        nll_before=loss(1.0),
        nll=loss(temperature),
    )


def expected_error(confidence: ArrayLike, right: ArrayLike) -> float:
    """Return the expected calibration error, in bins of equal mass."""
    return float(weighted_error(confidence, right, np.ones((1, np.size(confidence))))[0])


def weighted_error(
    confidence: ArrayLike, right: ArrayLike, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the expected calibration error under each row of weights [S, n]; bins are of all."""
    gap = np.asarray(confidence, np.float64) - np.asarray(right, np.float64)
    of = equal_mass(confidence)
    by_bin = np.stack([(weights * gap)[:, of == k].sum(axis=1) for k in range(of.max() + 1)])
    error: NDArray[np.float64] = np.abs(by_bin).sum(axis=0) / weights.sum(axis=1)
    return error


def equal_mass(confidence: ArrayLike) -> NDArray[np.int64]:
    """Return the bin of each value [n]: as many in each, equal values together."""
    values = np.asarray(confidence, np.float64)
    order = np.sort(values)
    edges = np.unique(order[np.linspace(0, len(order), BINS + 1)[1:-1].astype(np.int64)])
    found = np.searchsorted(edges, values, side="right")
    _, of = np.unique(found, return_inverse=True)
    return of.astype(np.int64)


def reliability(confidence: ArrayLike, right: ArrayLike) -> list[dict[str, float]]:
    """Return {"n", "confidence", "accuracy"} of each bin, from the least sure."""
    sure, good = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    of = equal_mass(sure)
    return [
        {
            "n": int((of == k).sum()),
            "confidence": float(sure[of == k].mean()),
            "accuracy": float(good[of == k].mean()),
        }
        for k in range(of.max() + 1)
    ]


def chance_error(confidence: ArrayLike) -> float:
    """Return the mean error of a perfectly calibrated model of this confidence: the ECE's floor."""
    sure = np.asarray(confidence, np.float64)
    right = np.random.default_rng(0xECE).random((CHANCE_DRAWS, len(sure))) < sure
    return float(np.mean([expected_error(sure, row) for row in right]))
