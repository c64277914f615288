"""Each loss against plain loops over its equation, and against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models import losses


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_slide_loss_is_its_equation(smoothing: float) -> None:
    slides, texts, tau = units(5, 7), units(5, 7, seed=1), 0.1
    n, total = len(slides), 0.0
    for i in range(n):
        for a, b in ((slides, texts), (texts, slides)):
            scores = [float(a[i] @ b[j]) / tau for j in range(n)]
            norm = math.log(sum(math.exp(score) for score in scores))
            target = [smoothing / n + (1 - smoothing) * (j == i) for j in range(n)]
            total -= sum(t * (score - norm) for t, score in zip(target, scores, strict=True)) / 2
    found = losses.info_nce(slides, texts, temperature=tau, label_smoothing=smoothing)
    assert float(found) == pytest.approx(total / n, rel=1e-5)


def test_the_slide_loss_by_hand() -> None:
    # Two orthogonal pairs at τ = 1: each softmax is e / (e + 1).
    both = torch.eye(2)
    assert float(losses.info_nce(both, both, temperature=1.0)) == pytest.approx(
        math.log(1 + math.exp(-1)), rel=1e-6
    )
    # The wrong way round: 1 / (e + 1).
    assert float(losses.info_nce(both, both.flip(0), temperature=1.0)) == pytest.approx(
        math.log(1 + math.e), rel=1e-6
    )


def test_a_part_of_the_batch_sees_everyone() -> None:
    slides, texts = units(6, 4), units(6, 4, seed=1)
    whole = losses.info_nce(slides, texts, temperature=0.2)
    parts = [
        losses.info_nce(
            slides[at : at + 2], texts[at : at + 2], temperature=0.2,
            all_slides=slides, all_texts=texts, offset=at,
        )
        for at in (0, 2, 4)
    ]  # fmt: skip
    assert float(sum(parts) / 3) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [None, -0.7])
def test_the_region_loss_is_its_equation(reduction: str, bias: float | None) -> None:
    size, num, width = 3, 2, 5
    seen, own = units(size, num + size - 1, width), units(size, num, width, seed=1)
    choice = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 1]])
    texts, positive = losses.region_texts(own, own, choice)
    scale, total = 2.5, 0.0
    for i in range(size):
        compared = [(own[i, k], 1) for k in range(num)]
        compared += [(own[j, choice[i, j]], -1) for j in range(size) if j != i]
        for place, (text, y) in enumerate(compared):
            assert torch.equal(texts[i, place], text)
            assert bool(positive[i, place]) == (y == 1)
            score = y * (scale * float(seen[i, place] @ text) + (bias or 0.0))
            total += math.log(1 + math.exp(-score)) / len(compared)
    found = losses.region_sigmoid(
        (seen * texts).sum(-1), positive,
        scale=torch.tensor(scale), bias=None if bias is None else torch.tensor(bias),
        reduction=reduction,
    )  # fmt: skip
    assert float(found) == pytest.approx(total / (size if reduction == "mean" else 1), rel=1e-5)


def test_the_region_loss_by_hand() -> None:
    # One positive at cosine 1, one negative at cosine 0, η = ln 3: (ln(4/3) + ln 2) / 2.
    found = losses.region_sigmoid(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), scale=torch.tensor(math.log(3))
    )
    assert float(found) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)


def test_negatives_of_a_part_are_those_of_the_whole() -> None:
    everyone = units(4, 3, 2)
    choice = torch.randint(3, (4, 4), generator=torch.Generator().manual_seed(0))
    whole, _ = losses.region_texts(everyone, everyone, choice)
    part, _ = losses.region_texts(everyone[2:], everyone, choice[2:], offset=2)
    assert torch.equal(part, whole[2:])


@pytest.mark.parametrize(
    ("kind", "parameter", "scale"),
    [("raw", 2.659, 2.659), ("raw", -1.0, 0.0), ("raw", 500.0, 100.0), ("exp", 2.0, math.e**2),
     ("exp", 50.0, 100.0)],
)  # fmt: skip
def test_the_scale_is_bounded(kind: str, parameter: float, scale: float) -> None:
    assert float(losses.scale_of(torch.tensor(parameter), kind=kind)) == pytest.approx(scale)
