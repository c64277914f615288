"""Losses of MR-PLIP as functions of tensors: CVTA, MRTVA, and the choices they rest on.

Each is a sum with the number of its terms known beforehand, so that micro-batches and workers add
up. The contrastive loss is :func:`pathflip.models.losses.info_nce`.

Shapes: G trees, V nodes, k most keywords of a tree, m most positives of a patch, N patches there
are, E edges, P pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OWN_TREE_WEIGHT = 0.1
"""Weight of negatives of the same tree: most of its patches look alike."""
UNIFORM = 1e-6
"""Weight of every negative beside its similarity."""


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient is cut only where it would lead further out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x <= low) & (gradients[0] > 0)) | ((x >= high) & (gradients[0] < 0))
        return gradients[0].masked_fill(outward, 0.0), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp a parameter; beyond a bound, descent can lead it back but no further out."""
    out: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return out


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Compute dot products [..., m, d] · [..., n, d] in float32, under autocast as well.

    Cosines in bfloat16 have steps of 0.004 near 1: similar keywords would tie.
    """
    with torch.autocast(one.device.type, enabled=False):
        return one.float() @ other.float().mT


def own_positives(own: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the first keywords of each patch's own caption, as many as there are up to the limit.

    Args:
        own: bool [G, V, k], best keywords first.
        limit: Most positives of a patch of each tree, int64 [G].

    Returns:
        Places among the tree's keywords, int64 [G, V, m], and which are chosen, bool [G, V, m].
    """
    most = max(limit.tolist(), default=0)
    before_or_at = own.cumsum(-1)
    kept = own & (before_or_at <= limit[:, None, None])
    # Chosen ones first, in their order.
    place = torch.arange(own.shape[-1], device=own.device).expand(own.shape)
    order = place.masked_fill(~kept, own.shape[-1]).sort(-1).values[..., :most]
    return order.clamp(max=max(0, own.shape[-1] - 1)), order < own.shape[-1]


def similar_positives(scores: Tensor, real: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the most similar keywords of each patch, exactly as many as the limit.

    Args:
        scores: Similarity of patches and keywords [G, V, k].
        real: bool [G, k], whether there is such a keyword.
        limit: Most positives of a patch of each tree, int64 [G].

    Returns:
        As :func:`own_positives`.
    """
    most = max(limit.tolist(), default=0)
    hidden = scores.detach().masked_fill(~real[:, None], -torch.inf)
    index = hidden.topk(most, -1).indices
    chosen = torch.arange(most, device=index.device) < limit[:, None, None]
    return index, chosen.expand(index.shape)


def node_weights(there: Tensor, levels: Tensor, *, mean: str) -> Tensor:
    """Return the weight of each patch in the mean over a tree; they sum to 1, or 0 without any.

    Args:
        there: bool [G, V], patches that count.
        levels: Level of each node, int64 [V].
        mean: ``nodes``, or ``levels``: the mean over levels there are of the mean within each.
    """
    if mean == "nodes":
        return there / there.sum(1, keepdim=True).clamp(min=1)
    member = F.one_hot(levels, 4).bool() & there[..., None]  # [G, V, 4]
    counts = member.sum(1, keepdim=True)
    within = (member / counts.clamp(min=1)).sum(-1)
    return within / (counts > 0).sum(-1).clamp(min=1)


def cvta(
    logits: Tensor, real: Tensor, index: Tensor, chosen: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-resolution vision-text alignment.

    Of each patch, the mean over its positives of -log softmax over all keywords of its tree; then
    the weighted mean over patches.

    Args:
        logits: Similarities divided by τ [G, V, k].
        real: bool [G, k], whether there is such a keyword.
        index: Places of positives, int64 [G, V, m].
        chosen: bool [G, V, m], which of them are positives.
        weights: Weight of each patch [G, V]; 0 for those without positives.

    Returns:
        The sum over trees, and the least it could be: that of equal scores for all positives.
    """
    if not index.shape[-1]:
        return logits.sum() * 0, logits.new_zeros(())
    log_p = logits.float().masked_fill(~real[:, None], -1e9).log_softmax(-1).gather(-1, index)
    size = chosen.sum(-1)
    per_node = -(log_p * chosen).sum(-1) / size.clamp(min=1)
    return (per_node * weights).sum(), (size.clamp(min=1).log() * weights).sum()


def mrtva(f: Tensor, q: Tensor, edges: Tensor) -> Tensor:
    """Compute the multi-resolution text-guided visual alignment, SimSiam's form, over edges.

    Args:
        f: Projections f(z) [N, p]; no gradient flows into them as targets.
        q: Predictions q(f(z)) [N, p].
        edges: Pairs of rows, int64 [E, 2].

    Returns:
        The sum over edges of ½ D(q_a, sg f_b) + ½ D(q_b, sg f_a), D being minus the cosine.
    """
    target, guess = F.normalize(f.detach().float(), dim=-1), F.normalize(q.float(), dim=-1)
    one, other = edges.unbind(1)
    forth = (guess[one] * target[other]).sum(-1)
    back = (guess[other] * target[one]).sum(-1)
    return -(forth + back).sum() / 2


def negative_weights(similarity: Tensor, allowed: Tensor, same_tree: Tensor) -> Tensor:
    """Return weights to draw a hard negative of each row by.

    Args:
        similarity: Divided by τ [P, P].
        allowed: bool [P, P]; rows without any get weights of 0.
        same_tree: bool [P, P].
    """
    hidden = similarity.float().masked_fill(~allowed, -1e9)
    weights = (hidden.softmax(-1) + UNIFORM) * allowed
    return weights.where(~same_tree, weights * OWN_TREE_WEIGHT)


def keyword_entropy(keywords: Tensor) -> Tensor:
    """Return the entropy of chosen keywords divided by that of an even choice; NaN below two.

    Args:
        keywords: Times each keyword of the step was chosen [K]; those that could be.
    """
    share = keywords.float() / keywords.sum()
    even = math.log(len(keywords)) if len(keywords) > 1 else math.nan
    entropy: Tensor = torch.special.entr(share).sum() / even
    return entropy
