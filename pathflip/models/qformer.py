"""Q-Former: latent queries that attend to patches (BLIP-2).

A BERT encoder over the queries whose even layers also attend to patches. Two things are done
differently from BLIP-2's, with the same result (tests/unit/models/test_qformer.py holds it against
``transformers.Blip2QFormerModel``):

* Few queries and many patches: ``q·(W_k x) = (W_kᵀ q)·x`` and ``Σ p (W_v x) = W_v Σ p x``, so the
  queries are taken into the patches' space and what they gather is projected afterwards. Keys and
  values of every layer and head are then the patches as they are. The bias of a key adds the same
  to all of a query's scores, so the softmax never sees it: there is none.
* Regions and the slide share weights and queries, so all of them go through the layers as one
  batch of (N + 1) sequences a slide; only the softmax tells them apart.

Shapes: B slides, N regions, M patch slots, E patch width, Q latent queries, H hidden width, A
heads, S = B·(N + 1) sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pathflip.models.packing import Packed

KEYS_AT_ONCE = 16384
"""Patches of a slide attended to at once, where no gradient is wanted."""


class QFormerOutput(NamedTuple):
    """Query states of regions and slides, with attention.

    Attributes:
        regions: [B, N, Q, H], or None if not asked for.
        slide: [B, Q, H], or None if not asked for.
        attention: Weights of the last cross-attention, mean over heads, of the regions' queries:
            [B, N, Q, M], 0 where masked; None if not asked for.
    """

    regions: Tensor | None
    slide: Tensor | None
    attention: Tensor | None


class QFormer(nn.Module):
    """Q-Former over regions and slide in one pass; optionally with the text branch of BLIP-2.

    Args:
        hidden: H, width of the states.
        layers: Number of layers.
        heads: A, number of attention heads.
        ffn: Width inside the feed-forward blocks.
        patch_width: E, width of the patches.
        cross_every: Cross-attention in layers 0, cross_every, 2·cross_every, …
        dropout: Dropout of states and attention weights.
        vocab_size: Number of tokens of the text branch; 0 for no text branch.
        max_positions: Maximum length of a text, in tokens.
        eps: Epsilon of the layer norms.
        recompute: Whether cross-attention and GELUs keep only their inputs for the gradient.
    """

    def __init__(
        self,
        *,
        hidden: int,
        layers: int,
        heads: int,
        ffn: int,
        patch_width: int,
        cross_every: int = 2,
        dropout: float = 0.1,
        vocab_size: int = 0,
        max_positions: int = 512,
        eps: float = 1e-12,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)
        text = vocab_size > 0
        if text:
            self.words = nn.Embedding(vocab_size, hidden)
            self.positions = nn.Embedding(max_positions, hidden)
        made = [
            Layer(
                hidden=hidden,
                heads=heads,
                ffn=ffn,
                patch_width=patch_width if i % cross_every == 0 else 0,
                dropout=dropout,
                text=text,
                eps=eps,
                recompute=recompute,
            )
            for i in range(layers)
        ]
        self.layers = cast("list[Layer]", nn.ModuleList(made))
        self.last_cross = (layers - 1) // cross_every * cross_every
        self.apply(_init)

    def forward(
        self,
        queries: Tensor,
        patches: Tensor,
        mask: Tensor,
        *,
        regions: bool = True,
        slide: bool = True,
        attention: bool = False,
    ) -> QFormerOutput:
        """Encode regions and slide.

        Args:
            queries: Latent queries [Q, H].
            patches: [B, N, M, E].
            mask: bool [B, N, M], True where there is a patch.
            regions: Whether to read each region for itself.
            slide: Whether to read all patches of a slide together.
            attention: Whether to return attention weights of the regions.
        """
        batch, num = patches.shape[:2]
        each = (num if regions else 0) + (1 if slide else 0)
        x = self.dropout(self.norm(queries).expand(batch * each, *queries.shape))
        reader = _Reader(patches, mask, regions=regions, slide=slide)
        for number, layer in enumerate(self.layers):
            x = layer.read(x, reader, attention=attention and number == self.last_cross)
        x = x.view(batch, each, *queries.shape)
        return QFormerOutput(
            regions=x[:, :num] if regions else None,
            slide=x[:, -1] if slide else None,
            attention=reader.weights,
        )

    def text(self, packed: Packed, *, pooling: str) -> Tensor:
        """Encode packed texts with the text branch.

        Args:
            packed: Texts.
            pooling: ``cls`` or ``mean``.

        Returns:
            One state for each distinct text [n, H].
        """
        x = self.words(packed.ids) + self.positions(packed.positions)
        x = self.dropout(self.norm(x))
        *below, top = self.layers
        for layer in below:
            x = layer.write(x, packed)
        x = top.write(x, packed, first=pooling == "cls")
        return x if pooling == "cls" else packed.mean(x)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Layer(nn.Module):
    """Q-Former layer: self-attention, optional cross-attention, feed-forward; norm after each."""

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        ffn: int,
        patch_width: int,
        dropout: float,
        text: bool,
        eps: float,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads=heads, dropout=dropout, eps=eps)
        self.cross = (
            CrossAttention(
                hidden,
                heads=heads,
                patch_width=patch_width,
                dropout=dropout,
                eps=eps,
                recompute=recompute,
            )
            if patch_width
            else None
        )
        sizes: dict[str, Any] = {
            "ffn": ffn, "dropout": dropout, "eps": eps, "recompute": recompute,
        }  # fmt: skip
        self.ffn_query = FeedForward(hidden, **sizes)
        self.ffn_text = FeedForward(hidden, **sizes) if text else None

    def read(self, x: Tensor, reader: _Reader, *, attention: bool) -> Tensor:
        """Attend with queries [S, Q, H] -> [S, Q, H]."""
        x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, reader, attention=attention)
        out: Tensor = self.ffn_query(x)
        return out

    def write(self, x: Tensor, packed: Packed, *, first: bool = False) -> Tensor:
        """Text tokens [T, H] -> [T, H], or [n, H] where the first of each are all that is asked."""
        if self.ffn_text is None:
            raise TypeError("this Q-Former has no text branch")
        out: Tensor = self.ffn_text(self.attention.packed(x, packed, first=first))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention with its residual and norm."""

    def __init__(self, hidden: int, *, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within sequences of one length [S, Q, H] -> [S, Q, H]."""
        sequences, length, hidden = x.shape
        shape = (sequences, length, self.heads, hidden // self.heads)
        q, k, v = (
            part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        seen = seen.transpose(1, 2).reshape(x.shape)
        out: Tensor = self.norm(self.dropout(self.out(seen)) + x)
        return out

    def packed(self, x: Tensor, packed: Packed, *, first: bool = False) -> Tensor:
        """Attend within packed sequences of any lengths [T, H] -> [T, H], or their first tokens."""
        asking = x[packed.first] if first else x
        seen = packed.attend(
            self.query(asking),
            self.key(x),
            self.value(x),
            heads=self.heads,
            dropout=self.p if self.training else 0.0,
            first=first,
        )
        out: Tensor = self.norm(self.dropout(self.out(seen)) + asking)
        return out


class FeedForward(nn.Module):
    """Two linear maps around a GELU, with residual and norm."""

    def __init__(
        self, hidden: int, *, ffn: int, dropout: float, eps: float, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        inner = feed_forward(x, self.up, self.down, recompute=self.recompute)
        out: Tensor = self.norm(self.dropout(inner) + x)
        return out


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module, *, recompute: bool) -> Tensor:
    """Compute ``down(gelu(up(x)))``; optionally recompute the GELU's output for the gradient."""
    inner = up(x)
    if recompute and torch.is_grad_enabled():
        out: Tensor = _GeluDown.apply(inner, down.weight, down.bias)  # type: ignore[no-untyped-call]
        return out
    plain: Tensor = down(F.gelu(inner))
    return plain


class _GeluDown(torch.autograd.Function):
    """``F.linear(F.gelu(x), weight, bias)`` that saves only x for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        given = gradients[0].flatten(0, -2)
        weight_gradient = given.T @ F.gelu(x).flatten(0, -2).to(given.dtype)
        inner = (given @ weight.to(given.dtype)).view(x.shape).to(x.dtype)
        return torch.ops.aten.gelu_backward(inner, x), weight_gradient, given.sum(0)


class CrossAttention(nn.Module):
    """Cross-attention of queries to patches used as keys and values; with residual and norm.

    ``key`` and ``value`` hold the weights that would be applied to patches.
    """

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        patch_width: int,
        dropout: float,
        eps: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.p, self.recompute = heads, dropout, recompute
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(patch_width, hidden, bias=False)
        self.value = nn.Linear(patch_width, hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, reader: _Reader, *, attention: bool = False) -> Tensor:
        """Attend with queries [S, Q, H] -> [S, Q, H]."""

        def run(q: Tensor) -> Tensor:
            return self._gather(q, reader, attention=attention)

        gathered = _kept_or_again(run, self.query(x), again=self.recompute)
        out: Tensor = self.norm(self.dropout(self.out(gathered)) + x)
        return out

    def _gather(self, q: Tensor, reader: _Reader, *, attention: bool) -> Tensor:
        sequences, length, hidden = q.shape
        heads, size = self.heads, hidden // self.heads
        width = self.key.in_features
        # A batch of heads: [A, S·Q, size] x [A, size, E].
        q = q.view(-1, heads, size).transpose(0, 1) * (1 / math.sqrt(size))
        asked = torch.bmm(q, self.key.weight.view(heads, size, width))
        asked = asked.view(heads, sequences, length, width).transpose(0, 1)
        asked = asked.reshape(sequences, heads * length, width)
        p = self.p if self.training else 0.0
        seen, total = reader.attend(asked, heads=heads, dropout=p, attention=attention)
        seen = seen.view(sequences, heads, length, width).transpose(0, 1)
        gathered = torch.bmm(
            seen.reshape(heads, -1, width),
            self.value.weight.view(heads, size, width).transpose(1, 2),
        )
        gathered = gathered.view(heads, sequences, length, size).permute(1, 2, 0, 3)
        bias = self.value.bias.view(heads, size)
        if total is not None:  # dropped-out weights no longer sum to one
            bias = bias * total.view(sequences, heads, length, 1).transpose(1, 2)
        return (gathered + bias).reshape(sequences, length, hidden)


def _kept_or_again(run: Callable[[Tensor], Tensor], x: Tensor, *, again: bool) -> Tensor:
    """Compute ``run(x)``; optionally checkpoint its activations."""
    if not again or not torch.is_grad_enabled():
        return run(x)
    out: Tensor = checkpoint(run, x, use_reentrant=False)
    return out


class _Reader:
    """Attention over the patches of a batch, by region and by slide."""

    def __init__(self, patches: Tensor, mask: Tensor, *, regions: bool, slide: bool) -> None:
        self.batch, self.num, self.slots, self.width = patches.shape
        self._regions, self._slide = regions, slide
        self._patches = patches
        self._mask = mask
        # 0 where there is a patch. What has none attends to all of it, and is masked later: a
        # softmax over nothing would be NaN.
        self._region_bias = _bias(mask.reshape(-1, 1, self.slots), patches.dtype)
        self._slide_bias = _bias(mask.reshape(self.batch, 1, -1), patches.dtype)
        self.weights: Tensor | None = None

    def attend(
        self, asked: Tensor, *, heads: int, dropout: float, attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in the patches' space [S, A·Q, E] -> (gathered patches, sums of weights).

        The sums [S, A·Q] are None where they are one.
        """
        rows = asked.shape[1]
        asked = asked.view(self.batch, -1, rows, self.width)
        found: list[Tensor] = []
        sums: list[Tensor] = []

        def keep(part: tuple[Tensor, Tensor | None], sequences: int) -> None:
            found.append(part[0].view(self.batch, sequences, rows, self.width))
            if part[1] is not None:
                sums.append(part[1].view(self.batch, sequences, rows))

        if self._regions:
            mine = asked[:, : self.num].reshape(-1, rows, self.width)
            keys = self._patches.view(-1, self.slots, self.width)
            keep(_attend(mine, keys, self._region_bias, dropout, self._keeper(heads, attention)),
                 self.num)  # fmt: skip
        if self._slide:
            mine = asked[:, -1]
            keys = self._patches.view(self.batch, -1, self.width)
            if torch.is_grad_enabled() or keys.shape[1] <= KEYS_AT_ONCE:
                keep(_attend(mine, keys, self._slide_bias, dropout, None), 1)
            else:
                keep((_attend_in_parts(mine, keys, self._slide_bias), None), 1)
        seen = torch.cat(found, 1) if len(found) > 1 else found[0]
        total = (torch.cat(sums, 1) if len(sums) > 1 else sums[0]) if sums else None
        return seen.flatten(0, 1), None if total is None else total.flatten(0, 1)

    def _keeper(self, heads: int, wanted: bool) -> Callable[[Tensor], None] | None:
        if not wanted:
            return None

        def keep(weights: Tensor) -> None:
            shape = (self.batch, self.num, heads, -1, self.slots)
            mean = weights.view(shape).mean(2)
            self.weights = mean.masked_fill(~self._mask[:, :, None], 0.0)

        return keep


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    if bool(mask.all()):
        return None
    hidden = ~mask & mask.any(-1, keepdim=True)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        hidden, torch.finfo(dtype).min
    )


def _attend(
    asked: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    dropout: float,
    keep: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention whose keys are its values: [n, rows, E], [n, keys, E] -> [n, rows, E]."""
    scores = torch.bmm(asked, keys.transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    if keep is not None:
        keep(weights)
    total = None
    if dropout:
        weights = F.dropout(weights, dropout)
        total = weights.sum(-1)
    return torch.bmm(weights, keys), total


def _attend_in_parts(asked: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Compute :func:`_attend` some keys at a time, so that memory for scores stays bounded."""
    seen = torch.zeros_like(asked)
    best = torch.full(asked.shape[:2], -torch.inf, dtype=asked.dtype, device=asked.device)
    total = torch.zeros_like(best)
    for start in range(0, keys.shape[1], KEYS_AT_ONCE):
        part = keys[:, start : start + KEYS_AT_ONCE]
        scores = torch.bmm(asked, part.transpose(1, 2))
        if bias is not None:
            scores = scores + bias[..., start : start + KEYS_AT_ONCE]
        now = torch.maximum(best, scores.amax(-1))
        weights = torch.exp(scores - now[..., None])
        shrink = torch.exp(best - now)
        seen = seen * shrink[..., None] + torch.bmm(weights, part)
        total = total * shrink + weights.sum(-1)
        best = now
    return seen / total[..., None]
