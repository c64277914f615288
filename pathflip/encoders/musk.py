"""Image tower of MUSK, built here from its published shape; no code of a hub is run.

MUSK is a BEiT-3: blocks whose parts come in two copies, ``A`` for images and ``B`` for texts. With
an image alone only ``A`` is used, and that is a ViT with a further LayerNorm inside the attention
and one inside the feed-forward part. Positions are counted from 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FIRST = 2
"""Row of the table of positions that the class token has."""


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, px, px] -> [n, 1 + patches, width], the class token first."""
        patches: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        parts = [
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        out: Tensor = self.out_proj(self.inner_attn_ln(mixed))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ffn_layernorm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.ffn = _Attention(width, heads), _FeedForward(width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        out: Tensor = x + self.ffn(self.final_layer_norm(x))
        return out


class MuskTower(nn.Module):
    """Class token of MUSK for images, before its head; not scaled.

    Args:
        width: Width of a token.
        depth: Number of blocks.
        heads: Attention heads.
        px: Side of an image, px.
        patch: Side of a patch, px.
    """

    def __init__(
        self,
        *,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        px: int = 384,
        patch: int = 16,
    ) -> None:
        super().__init__()
        self.vision_embed = _Patches(width, patch)
        self.embed_positions = nn.Embedding(_FIRST + 1 + (px // patch) ** 2, width)
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, px, px] -> [n, width]."""
        x = self.vision_embed(images) + self.embed_positions.weight[_FIRST:]
        for block in self.layers:
            x = block(x)
        out: Tensor = self.layer_norm(x[:, 0])
        return out


def image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the image tower among those of a whole MUSK, by its names here."""
    whole = {name.removeprefix("beit3.").removeprefix("encoder."): x for name, x in state.items()}
    elsewhere = ("text_embed.", "language_head.", "vision_head.", "logit_scale")
    return {
        name.replace(".A.", "."): x
        for name, x in whole.items()
        if ".B." not in name
        and not name.startswith(elsewhere)
        and name != "vision_embed.mask_token"
    }
