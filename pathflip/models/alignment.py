"""Alignment losses: slides with captions, regions with sub-captions.

PathFLIP (arXiv 2512.17621): the slide loss is Eq. 7-9, the region loss Eq. 6.

Shapes: b slides of this process, B of all processes, K sub-captions of a slide, d joint width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pathflip.models import losses
from pathflip.models.outputs import PathFLIPOutput, VisionOutput

if TYPE_CHECKING:
    from pathflip.models.pathflip import PathFLIP, Texts


def align(
    model: PathFLIP,
    sight: VisionOutput,
    captions: Texts,
    subcaptions: Sequence[Texts],
    *,
    negative_choice: Tensor | None,
    group: Any,
) -> PathFLIPOutput:
    """Compute losses of encoded slides and their texts; arguments as of ``PathFLIP.forward``.

    With gathered or exchanged negatives, a slide is compared with texts of all processes.
    """
    config = model.config
    counts = {len(sight.slide), len(captions)}
    if config.has_region_loss:
        counts.add(len(subcaptions))
        if len({len(own) for own in subcaptions}) > 1:
            raise ValueError("every slide needs the same number of sub-captions")
    if len(counts) > 1:
        raise ValueError(f"slides, captions and sub-captions are {sorted(counts)} many")
    pieces: list[Any] = []
    if config.has_region_loss:
        pieces = [text for own in subcaptions for text in own]
    vectors = model.embed(captions, pieces)
    slide, text = losses.unit(sight.slide), losses.unit(vectors[: len(captions)])
    rank, processes = (0, 1) if config.negatives == "local" else losses.world(group)
    exchanged = config.negatives == "exchanged" and processes > 1
    gathered = config.negatives == "gathered" and processes > 1
    all_slides, all_texts = slide, text
    if processes > 1:
        both = torch.cat([slide, text], -1)
        both = losses.gather(both.detach() if exchanged else both, group)
        all_slides, all_texts = both[:, : config.d], both[:, config.d :]
    loss_slide = losses.info_nce(
        slide,
        text,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        all_slides=all_slides,
        all_texts=all_texts,
        offset=rank * len(slide),
    )
    zero = loss_slide.new_zeros(())
    scale = bias = zero
    loss, loss_region = loss_slide, zero
    if model.region_scale is not None:
        own = vectors[len(captions) :].view(len(captions), -1, config.d)
        everyone = losses.gather(own, group) if gathered else own
        if negative_choice is None:
            shape = (len(own), len(everyone))
            negative_choice = torch.randint(own.shape[1], shape, device=own.device)
        texts, positive = losses.region_texts(
            own, everyone, negative_choice, offset=rank * len(own) if gathered else 0
        )
        if exchanged:
            texts, positive = losses.exchange_texts(texts, positive, group)
        seen, _ = model.region_attention(texts, *sight.flat())
        scale = losses.scale_of(model.region_scale, kind=config.region_scale)
        bias = zero if model.region_bias is None else model.region_bias
        loss_region = losses.region_sigmoid(
            (losses.unit(seen) * losses.unit(texts)).sum(-1),
            positive,
            scale=scale,
            bias=model.region_bias,
            reduction=config.region_reduction,
        )
        if config.region_reduction == "sum" and not exchanged:
            # DDP takes the mean over processes of this; what is wanted is the sum.
            loss_region = loss_region * processes
        loss = loss_slide + loss_region
    return PathFLIPOutput(
        loss=loss,
        loss_slide=loss_slide,
        loss_region=loss_region,
        slide=slide,
        text=text,
        scale=scale.detach(),
        bias=bias.detach(),
    )
