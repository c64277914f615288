"""Contrastive and region loss as functions of tensors, and gathering across processes.

Shapes: b slides of this process, B of all processes, K sub-captions of a slide, L texts a slide is
compared with, d joint width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SCALE_MAX = 100.0


def info_nce(
    slide: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    all_slides: Tensor | None = None,
    all_texts: Tensor | None = None,
    offset: int = 0,
    same: Tensor | None = None,
) -> Tensor:
    """Compute the symmetric cross-entropy of slides and captions (Eq. 7-9).

    Args:
        slide: Normalised slide vectors [b, d].
        text: Normalised caption vectors [b, d]; text i belongs to slide i.
        temperature: τ.
        label_smoothing: Share of the target spread over all candidates.
        all_slides: Candidates for the texts [B, d]; None: ``slide``.
        all_texts: Candidates for the slides [B, d]; None: ``text``.
        offset: Position of ``slide[0]`` among the candidates.
        same: bool [b, B], whether the captions of i and candidate j are equal; such candidates are
            left out, but for i itself. None: none are.

    Returns:
        Scalar, the mean over slides and both directions.
    """
    all_slides = slide if all_slides is None else all_slides
    all_texts = text if all_texts is None else all_texts
    target = torch.arange(offset, offset + len(slide), device=slide.device)
    to_text = (slide @ all_texts.T).float() / temperature
    to_slide = (text @ all_slides.T).float() / temperature
    if same is not None:
        hidden = same & ~F.one_hot(target, same.shape[1]).bool()
        to_text, to_slide = (x.masked_fill(hidden, -math.inf) for x in (to_text, to_slide))
    both = F.cross_entropy(to_text, target, label_smoothing=label_smoothing) + F.cross_entropy(
        to_slide, target, label_smoothing=label_smoothing
    )
    return both / 2


def region_sigmoid(
    similarity: Tensor,
    positive: Tensor,
    *,
    scale: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the sigmoid loss of text-conditioned region vectors and their texts (Eq. 6).

    Args:
        similarity: cos(v_tc, t) [b, L].
        positive: bool [b, L], whether the text is of the slide.
        scale: η, the factor of the similarity.
        bias: Added to the scaled similarity; None for none.
        reduction: ``mean`` or ``sum`` over slides, of the mean over texts.
    """
    logits = scale * similarity.float()
    if bias is not None:
        logits = logits + bias
    losses = F.softplus(torch.where(positive, -logits, logits)).mean(-1)
    return losses.sum() if reduction == "sum" else losses.mean()


def scale_of(parameter: Tensor, *, kind: str) -> Tensor:
    """Return η of its parameter: itself (``raw``) or its exponential (``exp``), at most 100."""
    if kind == "exp":
        return parameter.clamp(max=math.log(SCALE_MAX)).exp()
    return parameter.clamp(0.0, SCALE_MAX)


def region_texts(
    own: Tensor, everyone: Tensor, choice: Tensor, *, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the texts each slide is compared with: its sub-captions, one of each other slide.

    Args:
        own: Sub-captions of this process's slides [b, K, d].
        everyone: Sub-captions of all slides [B, K, d].
        choice: int64 [b, B], index of slide j's sub-caption that is the negative for slide i; own
            entries are ignored.
        offset: Position of ``own[0]`` in ``everyone``.

    Returns:
        Texts [b, K + B - 1, d], and which are positive [b, K + B - 1].
    """
    size, num, width = own.shape
    total = len(everyone)
    others = torch.arange(total, device=own.device)[None].expand(size, total)
    mine = torch.arange(offset, offset + size, device=own.device)[:, None]
    keep = others != mine
    j = others[keep].view(size, total - 1)
    k = choice.to(own.device)[keep].view(size, total - 1)
    negatives = everyone.reshape(total * num, width)[j * num + k]
    positive = torch.arange(num + total - 1, device=own.device) < num
    return torch.cat([own, negatives], 1), positive[None].expand(size, -1)


def exchange_texts(texts: Tensor, positive: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    """Add the texts of all other processes as negatives, as the published code does.

    Row i of every other process's texts is compared with slide i of this one. The mean over all of
    them is what the published code computes: the processes' means summed, divided by their number.

    Args:
        texts: Texts of this process's slides [b, L, d], of the same shape in all processes.
        positive: bool [b, L], which of them are the slide's own.
        group: Process group; None for all.

    Returns:
        Texts [b, W·L, d] of W processes, with gradients as of :func:`gather`, and which are
        positive [b, W·L].
    """
    rank, processes = world(group)
    everyone = gather(texts, group).chunk(processes)
    others = [part for other, part in enumerate(everyone) if other != rank]
    negative = torch.zeros_like(positive).repeat(1, len(others))
    return torch.cat([texts, *others], 1), torch.cat([positive, negative], 1)


class _Gather(torch.autograd.Function):
    """Concatenation of all processes' tensors; gradients are summed over processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.size = group, len(local)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.size
        return gradient[start : start + ctx.size], None


def gather(local: Tensor, group: Any = None) -> Tensor:
    """Concatenate the tensors of all processes [B, …], with gradients.

    The gradient that comes back is the sum of all processes' gradients, so that when DDP averages
    the parameters' gradients, W processes get what one process gets from the whole batch.

    Args:
        local: [b, …], of the same shape in all processes.
        group: Process group; None for all.
    """
    out: Tensor = _Gather.apply(local, group)  # type: ignore[no-untyped-call]
    return out


def gather_ragged(local: Tensor, group: Any = None) -> tuple[Tensor, int]:
    """Concatenate the rows of all processes, which may have different numbers of them.

    Args:
        local: [b, …], of the same shape in all processes but for b.
        group: Process group; None for all.

    Returns:
        [B, …] with gradients as of :func:`gather`, and the place of the first local row in it.
    """
    rank, processes = world(group)
    if processes == 1:
        return local, 0
    size = torch.tensor([len(local)], device=local.device)
    sizes = gather(size, group).tolist()
    longest, offset = max(sizes), sum(sizes[:rank])
    if min(sizes) == longest:
        return gather(local, group), offset
    padding = local.new_zeros(longest - len(local), *local.shape[1:])
    padded = gather(torch.cat([local, padding]), group)
    there = [i * longest + j for i, own in enumerate(sizes) for j in range(own)]
    return padded[torch.tensor(there, device=local.device)], offset


class _Total(torch.autograd.Function):
    """Sum of all processes' tensors; gradients are summed over processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = local.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def total(local: Tensor, group: Any = None) -> Tensor:
    """Sum the tensors of all processes, with gradients as of :func:`gather`."""
    out: Tensor = _Total.apply(local, group)  # type: ignore[no-untyped-call]
    return out


def world(group: Any = None) -> tuple[int, int]:
    """Return (rank, number of processes) of a group; (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, in float32."""
    return F.normalize(vectors.float(), dim=-1)
