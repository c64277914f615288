"""Losses of the patch model against plain loops over their equations and sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathflip.geometry import LEVEL_OF
from pathflip.models import losses, mr_losses
from pathflip.models.norm import GatheredBatchNorm, Predictor, Projector


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- positives ------------------------------------------------------------------------------------


def test_own_positives_are_the_best_of_the_caption_and_never_filled() -> None:
    own = torch.tensor([[[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]).bool()
    index, chosen = mr_losses.own_positives(own, torch.tensor([2]))
    found = [row[kept].tolist() for row, kept in zip(index[0], chosen[0], strict=True)]
    assert found == [[1, 3], [], [4]]
    assert index.max() < 5, "places that are not chosen can be looked up too"


def test_each_tree_has_its_own_limit() -> None:
    own = torch.ones(3, 1, 4).bool()
    index, chosen = mr_losses.own_positives(own, torch.tensor([1, 0, 2]))
    assert [row[0][kept[0]].tolist() for row, kept in zip(index, chosen, strict=True)] == [
        [0], [], [0, 1],
    ]  # fmt: skip
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0]).expand(3, 1, 4)
    index, chosen = mr_losses.similar_positives(
        scores, torch.ones(3, 4).bool(), torch.tensor([1, 0, 2])
    )
    assert [row[0][kept[0]].tolist() for row, kept in zip(index, chosen, strict=True)] == [
        [2], [], [2, 0],
    ]  # fmt: skip


def test_similar_positives_are_the_top_k_and_never_padding() -> None:
    scores = draw(2, 6, 7).requires_grad_()
    real = torch.ones(2, 7).bool()
    real[1, 4:] = False
    limit = torch.tensor([3, 2])
    index, chosen = mr_losses.similar_positives(scores, real, limit)
    for tree in range(2):
        for node in range(6):
            row = scores[tree, node].tolist()
            order = sorted(range(int(real[tree].sum())), key=lambda j: -row[j])
            assert index[tree, node][chosen[tree, node]].tolist() == order[: int(limit[tree])]
    assert not index.requires_grad


def test_without_keywords_nothing_is_chosen() -> None:
    index, chosen = mr_losses.own_positives(torch.zeros(2, 85, 0).bool(), torch.tensor([0, 0]))
    assert index.shape == chosen.shape == (2, 85, 0)
    logits = torch.zeros(2, 85, 0, requires_grad=True)
    total, least = mr_losses.cvta(
        logits, torch.zeros(2, 0).bool(), index, chosen, torch.ones(2, 85)
    )
    assert (float(total.detach()), float(least)) == (0, 0)


# -- vision-text alignment ------------------------------------------------------------------------


def test_alignment_is_its_equation() -> None:
    logits, real = draw(2, 5, 6) * 3, torch.ones(2, 6).bool()
    real[1, 4:] = False
    index, chosen = mr_losses.similar_positives(logits, real, torch.tensor([3, 2]))
    weights = torch.full((2, 5), 0.2)
    total, least = mr_losses.cvta(logits, real, index, chosen, weights)
    expected = 0.0
    for tree, (keywords, most) in enumerate(((6, 3), (4, 2))):
        for node in range(5):
            row = logits[tree, node, :keywords].tolist()
            norm = math.log(sum(math.exp(x) for x in row))
            positives = sorted(row, reverse=True)[:most]
            expected -= sum(x - norm for x in positives) / most / 5
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(least) == pytest.approx(math.log(3) + math.log(2), rel=1e-6)


def test_alignment_by_hand() -> None:
    # Two keywords, the first positive, ahead by ln 3: -log(3/4). One of equal scores: ln 2.
    logits = torch.tensor([[[math.log(3), 0.0], [5.0, 5.0], [9.0, 9.0]]])
    index, chosen = torch.zeros(1, 3, 1).long(), torch.tensor([[[1], [1], [0]]]).bool()
    weights = mr_losses.node_weights(chosen.any(-1), torch.tensor([0, 1, 1]), mean="nodes")
    assert weights.tolist() == [[0.5, 0.5, 0]]
    total, _ = mr_losses.cvta(logits, torch.ones(1, 2).bool(), index, chosen, weights)
    assert float(total) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)


def test_equal_scores_of_all_positives_give_the_least() -> None:
    logits = torch.full((1, 1, 6), -60.0)
    logits[..., :3] = 60.0
    index, chosen = torch.arange(3).view(1, 1, 3), torch.ones(1, 1, 3).bool()
    total, least = mr_losses.cvta(logits, torch.ones(1, 6).bool(), index, chosen, torch.ones(1, 1))
    assert float(total - least) == pytest.approx(0, abs=1e-6)


def test_weights_of_levels() -> None:
    levels = torch.from_numpy(LEVEL_OF)
    there = torch.ones(2, 85).bool()
    there[1, :5] = False  # neither root nor second level
    weights = mr_losses.node_weights(there, levels, mean="levels")
    assert torch.allclose(weights.sum(1), torch.ones(2))
    for level, count in enumerate((1, 4, 16, 64)):
        assert torch.allclose(weights[0, levels == level], torch.tensor(0.25 / count))
    assert torch.allclose(weights[1, 5:21], torch.tensor(0.5 / 16))
    none = mr_losses.node_weights(torch.zeros(1, 85).bool(), levels, mean="levels")
    assert not none.any()


def test_no_gradient_comes_from_keywords_that_are_padding() -> None:
    logits = draw(1, 2, 5).requires_grad_()
    real = torch.tensor([[True, True, True, False, False]])
    index, chosen = mr_losses.similar_positives(logits, real, torch.tensor([1]))
    mr_losses.cvta(logits, real, index, chosen, torch.ones(1, 2))[0].backward()
    assert not logits.grad[..., 3:].any()
    assert logits.grad[..., :3].any()


# -- visual alignment over resolutions ------------------------------------------------------------


def test_visual_alignment_is_its_equation() -> None:
    f, q = draw(6, 4), draw(6, 4, seed=1)
    edges = torch.tensor([[0, 1], [0, 2], [3, 5]])
    expected = 0.0
    for a, b in edges.tolist():
        for guess, target in ((q[a], f[b]), (q[b], f[a])):
            expected -= float(guess @ target / guess.norm() / target.norm()) / 2
    assert float(mr_losses.mrtva(f, q, edges)) == pytest.approx(expected, rel=1e-6)


def test_visual_alignment_by_hand() -> None:
    # Predictions equal to their targets: -1 an edge; opposed one way and right the other: 0.
    f = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    edge = torch.tensor([[0, 1]])
    assert float(mr_losses.mrtva(f, f.flip(0), edge)) == pytest.approx(-1)
    q = torch.tensor([[0.0, -1.0], [5.0, 0.0]])
    assert float(mr_losses.mrtva(f, q, edge)) == pytest.approx(0)
    assert float(mr_losses.mrtva(f, q, torch.zeros(0, 2).long())) == 0


def test_no_gradient_reaches_the_stopped_side() -> None:
    f, q = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    mr_losses.mrtva(f, q, torch.tensor([[0, 1], [1, 2]])).backward()
    assert f.grad is None
    assert q.grad[:3].any(1).all()
    assert not q.grad[3].any(), "a patch without an edge"


# -- negatives, temperature, alarms ---------------------------------------------------------------


def test_weights_of_hard_negatives() -> None:
    similarity = draw(4, 4)
    allowed = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    found = mr_losses.negative_weights(similarity, allowed, same)
    for i in range(4):
        may = [j for j in range(4) if allowed[i, j]]
        norm = sum(math.exp(similarity[i, j]) for j in may)
        for j in range(4):
            expected = math.exp(similarity[i, j]) / norm + 1e-6 if j in may else 0.0
            expected *= 0.1 if same[i, j] else 1.0
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "gradient", "passes"),
    [
        (0.2, 1.0, True), (0.2, -1.0, True),
        (0.005, 1.0, False), (0.005, -1.0, True),  # descent against -1 raises it: inward
        (0.6, 1.0, True), (0.6, -1.0, False),
        (0.01, 1.0, False), (0.5, -1.0, False),
    ],
)  # fmt: skip
def test_a_bound_stops_only_what_leads_out(value: float, gradient: float, passes: bool) -> None:
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    out = mr_losses.bounded(x, 0.01, 0.5)
    (out * gradient).backward()
    assert float(out.detach()) == min(max(value, 0.01), 0.5)
    assert float(x.grad) == (gradient if passes else 0.0)


def test_entropy_of_keywords() -> None:
    even, one = torch.tensor([3, 3, 3, 3]), torch.tensor([0, 9, 0, 0])
    assert float(mr_losses.keyword_entropy(even)) == pytest.approx(1)
    assert float(mr_losses.keyword_entropy(one)) == pytest.approx(0)
    assert float(mr_losses.keyword_entropy(torch.tensor([1, 1, 0, 0]))) == pytest.approx(0.5)
    for nothing in ([0, 0, 0], [4], []):
        assert mr_losses.keyword_entropy(torch.tensor(nothing)).isnan()


# -- contrast with equal captions -----------------------------------------------------------------


def test_equal_captions_are_no_negatives() -> None:
    image, text = F.normalize(draw(5, 3), dim=-1), F.normalize(draw(5, 3, seed=1), dim=-1)
    ids, tau = [7, 8, 7, 9, 7], 0.3
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if ids[j] != ids[i] or j == i]
        for a, b in ((image, text), (text, image)):
            scores = {j: float(a[i] @ b[j]) / tau for j in others}
            expected += math.log(sum(map(math.exp, scores.values()))) - scores[i]
    number = torch.tensor(ids)
    same = number[:, None] == number
    found = losses.info_nce(image, text, temperature=torch.tensor(tau), same=same)
    assert float(found) == pytest.approx(expected / 10, rel=1e-5)
    # All captions equal: nothing to tell apart.
    alike = losses.info_nce(image, text, temperature=tau, same=torch.ones(5, 5).bool())
    assert float(alike) == 0


# -- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_that_of_torch(affine: bool) -> None:
    ours, theirs = GatheredBatchNorm(6, affine=affine), nn.BatchNorm1d(6, affine=affine)
    if affine:
        with torch.no_grad():
            for norm in (ours, theirs):
                norm.weight.copy_(draw(6, seed=2))
                norm.bias.copy_(draw(6, seed=3))
    x = (draw(9, 6).float() * 3 + 100).requires_grad_()
    y = x.detach().clone().requires_grad_()
    seed = draw(9, 6, seed=4).float()
    first, second = ours(x), theirs(y)
    assert torch.allclose(first, second, atol=1e-5)
    (first * seed).sum().backward()
    (second * seed).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert torch.equal(ours.eval()(x), first), "in evaluation too, the batch's own statistics"
    assert not list(ours.buffers())


def test_the_heads_of_visual_alignment() -> None:
    torch.manual_seed(0)
    f, q = Projector(5, 8), Predictor(8, 2)
    z = torch.randn(30, 5)
    out = f(z, group=None)
    assert torch.allclose(out.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(out.var(0, correction=0), torch.ones(8), atol=1e-2)
    assert f.norms[2].weight is None
    assert q(out, group=None).shape == (30, 8)
    assert q.down.out_features == 2
