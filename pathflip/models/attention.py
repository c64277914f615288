"""Text-conditioned attention over a slide's region vectors (Eq. 5), in its variants.

None of them adds the text to its output: v_tc holds visual values only, or the loss would be solved
by copying the text.

Shapes: B slides, L texts of a slide, R region vectors of a slide, d joint width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathflip.models.config import PathFLIPConfig


class MeanAttention(nn.Module):
    """Mean of all region vectors, the same for every text."""

    def forward(self, texts: Tensor, regions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the mean of regions; see :meth:`SingleAttention.forward`."""
        weights = mask.to(regions.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
        weights = weights[:, None].expand(-1, texts.shape[1], -1)
        return weights @ regions, weights

    def values(self, regions: Tensor) -> Tensor:
        """Return region vectors unchanged."""
        return regions


class SingleAttention(nn.Module):
    """Attention of the paper: one head, matrices W_q, W_k and W_v'.

    Args:
        width: d.
        norm: Whether queries and keys have a layer norm.
        identity: Whether the matrices begin as identity.
    """

    def __init__(self, width: int, *, norm: bool, identity: bool) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.query_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.key_norm = nn.LayerNorm(width) if norm else nn.Identity()
        for part in (self.query, self.key, self.value):
            nn.init.eye_(part.weight) if identity else nn.init.xavier_uniform_(part.weight)

    def forward(self, texts: Tensor, regions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from texts to region vectors.

        Args:
            texts: [B, L, d], before normalisation.
            regions: [B, R, d].
            mask: bool [B, R].

        Returns:
            v_tc [B, L, d], and weights [B, L, R].
        """
        q = self.query(self.query_norm(texts))
        k = self.key(self.key_norm(regions))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = _masked(scores, mask[:, None]).softmax(-1)
        # (p v) W is p (v W): project what was gathered where that is less.
        if texts.shape[1] < regions.shape[1]:
            return self.values(weights @ regions), weights
        return weights @ self.values(regions), weights

    def values(self, regions: Tensor) -> Tensor:
        """Return W_v' v, region vectors in the space of texts [..., d]."""
        out: Tensor = self.value(regions)
        return out


class HeadsAttention(nn.Module):
    """Multi-head attention behind projections (published code) or layer norms (its successor).

    Args:
        width: d.
        heads: Number of heads.
        norm: Whether layer norms come first, rather than linear maps.
    """

    def __init__(self, width: int, *, heads: int, norm: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        make = nn.LayerNorm if norm else nn.Linear
        sizes = (width,) if norm else (width, width)
        self.query, self.key, self.value = (make(*sizes) for _ in range(3))

    def forward(self, texts: Tensor, regions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with several heads and return their mean weights, see :class:`SingleAttention`."""
        width, heads = texts.shape[-1], self.attention.num_heads
        inner = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        parts = (self.query(texts), self.key(regions), self.value(regions))
        q, k, v = (
            F.linear(part, weight, bias)
            .view(*part.shape[:2], heads, width // heads)
            .transpose(1, 2)
            for part, weight, bias in zip(parts, *inner, strict=True)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
        weights = _masked(scores, mask[:, None, None]).softmax(-1)
        seen = (weights @ v).transpose(1, 2).flatten(2)
        return self.attention.out_proj(seen), weights.mean(1)

    def values(self, regions: Tensor) -> Tensor:
        """Return the output of attention to one region vector alone [..., d]."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        inner = F.linear(self.value(regions), weight.chunk(3)[2], bias.chunk(3)[2])
        out: Tensor = self.attention.out_proj(inner)
        return out


RegionAttention = MeanAttention | SingleAttention | HeadsAttention


def build_attention(config: PathFLIPConfig) -> RegionAttention:
    """Return the attention a configuration asks for."""
    if config.tr_attention == "none" or not config.has_region_loss:
        return MeanAttention()
    if config.tr_attention.startswith("mha"):
        return HeadsAttention(config.d, heads=config.tr_heads, norm=config.tr_attention == "mha_ln")
    return SingleAttention(
        config.d, norm=config.tr_attention == "paper_ln", identity=config.tr_identity_init
    )


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    # Where nothing is left everything stays: a softmax over nothing would be NaN.
    hidden = ~mask & mask.any(-1, keepdim=True)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
