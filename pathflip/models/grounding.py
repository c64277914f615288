"""Grounding: heat of texts on the patches of a slide.

Shapes: B slides, N regions, M patch slots, T vectors of a region, L texts, d joint width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models.attention import RegionAttention
from pathflip.models.outputs import Grounding, VisionOutput

Variant = Literal["attn", "region_only", "cosine", "product"]
VARIANTS: tuple[Variant, ...] = ("attn", "region_only", "cosine", "product")


def ground(
    sight: VisionOutput,
    patch_mask: Tensor,
    texts: Tensor,
    attend: RegionAttention,
    *,
    variant: Variant,
    contrast: bool,
) -> Grounding:
    """Return heat of texts on patches; see :meth:`PathFLIP.ground` for the variants.

    Args:
        sight: Slides with regions and attention.
        patch_mask: bool [B, N, M].
        texts: Raw text vectors [L, d]; with ``contrast`` the last is the neutral one.
        attend: Text-conditioned attention.
        variant: Variant of the heat.
        contrast: Whether to subtract the neutral text's heat.
    """
    if sight.tokens is None or sight.attention is None:
        raise ValueError("grounding needs regions and their attention")
    batch, num, each = sight.tokens.shape[:3]
    tokens, mask = sight.flat()
    queries = texts[None].expand(batch, -1, -1)
    seen, weights = attend(queries, tokens, mask)
    weights = weights.float().view(batch, -1, num, each)
    weights = weights * sight.region_mask[:, None, :, None]
    within = sight.attention.float()
    region = weights.sum(-1)
    if variant == "region_only":
        even = patch_mask / patch_mask.sum(-1, keepdim=True).clamp(min=1)
        heat = region[..., None] * even[:, None]
    elif variant == "cosine":
        heat = _cosines(sight.tokens, texts, within, attend)
    else:
        heat = torch.einsum("blnt,bntm->blnm", weights, within)
    if variant == "product":
        heat = heat * _cosines(sight.tokens, texts, within, attend).clamp(min=0)
    score = F.cosine_similarity(seen.float(), queries.float(), dim=-1)
    if contrast:
        heat = heat[:, :-1] - heat[:, -1:]
        region, score = region[:, :-1], score[:, :-1]
    return Grounding(heat=heat * patch_mask[:, None], region=region, score=score)


def _cosines(tokens: Tensor, texts: Tensor, within: Tensor, attend: RegionAttention) -> Tensor:
    """Return cosines of texts and patches: those of region vectors, weighted by attention."""
    values = F.normalize(attend.values(tokens).float(), dim=-1)
    cosine = torch.einsum("bntd,ld->blnt", values, F.normalize(texts.float(), dim=-1))
    share = within / within.sum(2, keepdim=True).clamp(min=1e-12)
    return torch.einsum("blnt,bntm->blnm", cosine, share)
