"""PathFLIP as its equations read: the slow side of ``tests.bench.pretrain``.

The published formulation on the weights of one of our models of preset ``official_v1``: regions one
after another, patches projected to keys and values in every cross-attention, texts padded to their
maximum, sub-captions in a pass of their own, attention weights written out. Losses and gradients
are those of :meth:`PathFLIP.forward`.

Shapes: B slides, N regions, M patch slots, d_in feature width, h Q-Former width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models import PathFLIP


def losses(
    model: PathFLIP,
    features: Tensor,
    captions: list[list[int]],
    subcaptions: list[list[list[int]]],
    choice: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slide and region loss of a batch without masked patches.

    Args:
        model: Model of preset ``official_v1``, without dropout.
        features: [B, N, M, d_in].
        captions: Token ids [B].
        subcaptions: Token ids [B][K].
        choice: int64 [B, B].
    """
    config = model.config
    size, regions = features.shape[:2]
    patches = model.patch_in(features)
    queries = model.queries.expand(size, -1, -1)
    whole = bert(model, queries, None, patches.flatten(1, 2)).mean(1)
    rows = [model.token_out(whole)]
    local = [bert(model, queries, None, patches[:, n]) for n in range(regions)]
    rows += [model.token_out(states.mean(1)) for states in local]
    line = model.context(torch.stack(rows, 1))
    slide, tokens = F.normalize(line[:, 0], dim=-1), line[:, 1:]
    text = F.normalize(_texts(model, captions, config.max_text_tokens), dim=-1)
    target = torch.arange(size)
    smoothing = config.label_smoothing
    slide_loss = (
        F.cross_entropy(slide @ text.T / config.temperature, target, label_smoothing=smoothing)
        + F.cross_entropy(text @ slide.T / config.temperature, target, label_smoothing=smoothing)
    ) / 2
    num = len(subcaptions[0])
    flat = [ids for own in subcaptions for ids in own]
    pieces = _texts(model, flat, config.subcaption_tokens).view(size, num, -1)
    compared, signs = [], []
    for i in range(size):
        others = [pieces[j, choice[i, j]] for j in range(size) if j != i]
        compared.append(torch.cat([pieces[i], *(other[None] for other in others)]))
        signs.append(torch.tensor([1.0] * num + [-1.0] * len(others)))
    asked, y = torch.stack(compared), torch.stack(signs)
    head: Any = model.region_attention
    seen, _ = head.attention(head.query(asked), head.key(tokens), head.value(tokens))
    cosine = (F.normalize(seen, dim=-1) * F.normalize(asked, dim=-1)).sum(-1)
    region_loss = -F.logsigmoid(y * model.region_scale * cosine).sum() / asked.shape[1]
    return slide_loss, region_loss


def projected(model: PathFLIP, patches: Tensor) -> tuple[Tensor, Tensor]:
    """The Q-Former with keys and values of patches, each projected once, and PyTorch's attention.

    Args:
        model: With a Q-Former, without dropout.
        patches: [B, N, M, d_e], none masked.

    Returns:
        Slides [B, Q, h] and regions [B, N, Q, h].
    """
    batch, num = patches.shape[:2]
    queries, former = model.queries, model.qformer
    x = former.norm(queries).expand(batch * (num + 1), *queries.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for layer in former.layers:
        x = layer.attention(x)
        if (cross := layer.cross) is not None:
            k, v = F.linear(patches, cross.key.weight), cross.value(patches)
            q = cross.query(x).view(batch, num + 1, *queries.shape)
            whole = attend(q[:, -1], k.flatten(1, 2), v.flatten(1, 2), cross.heads)
            each = attend(q[:, :-1].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cross.heads)
            seen = torch.cat([each.view(batch, num, *queries.shape), whole[:, None]], 1)
            x = cross.norm(cross.out(seen.flatten(0, 1)) + x)
        x = layer.ffn_query(x)
    x = x.view(batch, num + 1, *queries.shape)
    return x[:, -1], x[:, :-1]


def _texts(model: PathFLIP, texts: list[list[int]], longest: int) -> Tensor:
    ids = torch.tensor([text[:longest] + [0] * (longest - len(text)) for text in texts])
    lengths = torch.tensor([[min(len(text), longest)] for text in texts])
    mask = torch.arange(longest)[None] < lengths
    words = model.qformer.words(ids) + model.qformer.positions.weight[:longest]
    out: Tensor = model.text_out(bert(model, words, mask, None)[:, 0])
    return out


def bert(model: PathFLIP, x: Tensor, mask: Tensor | None, patches: Tensor | None) -> Tensor:
    """Encode queries [n, Q, h] over patches [n, keys, d_e], or texts [n, length, h] without any."""
    qformer: Any = model.qformer
    x = qformer.norm(x)
    for layer in qformer.layers:
        own = layer.attention
        seen = _attend(own.query(x), own.key(x), own.value(x), own.heads, mask)
        x = own.norm(own.out(seen) + x)
        if patches is not None and layer.cross is not None:
            cross = layer.cross
            seen = _attend(
                cross.query(x), cross.key(patches), cross.value(patches), cross.heads, None
            )
            x = cross.norm(cross.out(seen) + x)
        block = layer.ffn_text if patches is None else layer.ffn_query
        x = block.norm(block.down(F.gelu(block.up(x))) + x)
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None].float()) * -10000.0
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
