"""Outputs of the slide model and of the patch model.

Shapes: B slides, N regions, M patch slots of a region, T vectors of a region, d joint width, L
texts, P pairs of patch and caption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PathFLIPOutput:
    """Losses and vectors of a training step.

    Attributes:
        loss: Scalar to minimise.
        loss_slide: Slide loss (Eq. 7-9).
        loss_region: Region loss (Eq. 6); 0 where there is none.
        slide: Normalised slide vectors [B, d].
        text: Normalised caption vectors [B, d].
        scale: η, the factor of the similarity; 0 where there is no region loss.
        bias: The bias of the region loss; 0 where there is none.
    """

    loss: Tensor
    loss_slide: Tensor
    loss_region: Tensor
    slide: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MRPLIPOutput:
    """Losses and vectors of a training step of the patch model.

    Attributes:
        loss: Sum of the losses, each the mean over its terms in this batch.
        totals: Sum over its terms of each loss that is on, by name.
        counts: Number of those terms; 0 where the batch has none, and the sum is 0.
        image: Normalised vectors of the pairs' patches [P, d].
        text: Normalised vectors of their captions [P, d].
        alarms: Signs of collapse, NaN where the batch does not tell: ``keyword_entropy`` of chosen
            keywords (1: even), ``cvta_floor`` (that loss above the least it could be),
            ``cvta_skipped`` (share of trees left out of it, which is no such sign), ``z_std`` (of
            unit projections, 1: spread evenly), ``match_accuracy``.
        loss_itc: Contrastive loss of pairs.
        loss_itm: Matching loss; None where off, as the others.
        loss_mlm: Loss of masked words.
        loss_plm: Loss of words behind a prefix.
        loss_cvta: Cross-resolution vision-text alignment.
        loss_mrtva: Multi-resolution text-guided visual alignment.
    """

    loss: Tensor
    totals: Mapping[str, Tensor]
    counts: Mapping[str, float]
    image: Tensor
    text: Tensor
    alarms: Mapping[str, Tensor]
    loss_itc: Tensor
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_plm: Tensor | None = None
    loss_cvta: Tensor | None = None
    loss_mrtva: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideEmbedding:
    """Vectors of a slide and its regions.

    Attributes:
        slide: L2-normalised [B, d].
        tokens: Region vectors as the text-conditioned attention reads them [B, N·T, d].
        token_mask: bool [B, N·T].
        regions: L2-normalised vectors of regions in text space, for search [B, N, d]; 0 where there
            is no region.
        region_mask: bool [B, N].
    """

    slide: Tensor
    tokens: Tensor
    token_mask: Tensor
    regions: Tensor
    region_mask: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Grounding:
    """Heat of texts on the patches of slides.

    Attributes:
        heat: float32 [B, L, N, M], 0 where there is no patch.
        region: Attention of each text to each region [B, L, N]; sums to 1 over regions.
        score: cos(v_tc, t) [B, L].
    """

    heat: Tensor
    region: Tensor
    score: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionOutput:
    """Encoded slides inside the model, nothing normalised.

    Attributes:
        slide: Vectors of slides [B, d].
        tokens: Vectors of regions [B, N, T, d]; None where regions were not read.
        attention: Attention of those vectors to the patches of their region [B, N, T, M], 0 where
            masked; None if not asked for.
        region_mask: bool [B, N].
        queries: Vectors of slides, one per query, whose mean is ``slide`` [B, Q, d]; None where
            not asked for, or where slides are not read by the Q-Former.
    """

    slide: Tensor
    tokens: Tensor | None
    attention: Tensor | None
    region_mask: Tensor
    queries: Tensor | None = None

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return region vectors [B, N·T, d] and their mask [B, N·T]; empty without regions."""
        if self.tokens is None:
            empty = self.slide.new_zeros(len(self.slide), 0, self.slide.shape[-1])
            return empty, self.region_mask[:, :0]
        return self.tokens.flatten(1, 2), self.region_mask.repeat_interleave(
            self.tokens.shape[2], 1
        )
