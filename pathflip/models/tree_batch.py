"""A batch of patch trees with their texts, as the patch model reads it.

Shapes: G trees, 85 nodes of a tree, d_in feature width, K distinct keywords of the batch, k the
most keywords of a tree, P patch-caption pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeBatch:
    """Trees of one worker, their keywords, and the pairs drawn from them.

    Attributes:
        trees: Position of each tree in the corpus [G].
        features: Patch features [G, 85, d_in], zero where masked; float16 as stored, float32 on the
            device.
        node_mask: bool [G, 85], False where the tree has no such patch.
        keywords: The distinct keywords of the trees [K].
        keyword_index: Place of each tree's keywords among them, int64 [G, k], best by TF-IDF first;
            -1 behind a tree's last.
        own: bool [G, 85, k], whether the keyword is of the node's own caption.
        pair_bag: Row of each pair's tree, int64 [P].
        pair_node: Node of each pair, int64 [P].
        captions: Caption of each pair [P].
        caption_id: int64 [P], equal exactly where captions are; the same on all workers.
        draw: Seed of each pair's draws (masked tokens, prefix), int64 [P]; a function of
            (seed, epoch, tree, node).
        edge_draw: Seed of each tree's random edges, int64 [G].
        progress: Share of the run that is done, from 0 to 1; some settings change on the way.
    """

    trees: list[int]
    features: Tensor
    node_mask: Tensor
    keywords: list[str]
    keyword_index: Tensor
    own: Tensor
    pair_bag: Tensor
    pair_node: Tensor
    captions: list[str]
    caption_id: Tensor
    draw: Tensor
    edge_draw: Tensor
    progress: float = 1.0

    def to(self, device: torch.device | str) -> TreeBatch:
        """Return the batch on a device, with features in float32."""
        moved = self._tensors()
        return replace(
            self,
            **{
                name: value.to(device, non_blocking=True).float()
                if name == "features"
                else value.to(device, non_blocking=True)
                for name, value in moved.items()
            },
        )

    def pin_memory(self) -> TreeBatch:
        """Return the batch in page-locked memory."""
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **pinned)

    def _tensors(self) -> dict[str, Any]:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
