"""Steps of the patch model shared by processes, a tree each; matching aside.

Matching draws its negatives among a process's own pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pathflip.models import MRPLIP, TreeBatch
from tests.unit.models.tree_samples import patch_model, tree_batch

LOSSES = ("itc", "mlm", "plm", "cvta", "mrtva")
SETTINGS: dict[str, dict[str, Any]] = {
    "own": {"losses": LOSSES, "selection": "own", "cvta_mean": "levels"},
    "current": {"losses": LOSSES, "edges": "random"},
    "no keywords": {"losses": LOSSES, "selection": "own"},
}


def whole(name: str) -> TreeBatch:
    """Two trees, the first with six pairs and the second with three, one caption in both."""
    batch = tree_batch(pairs=6)
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 11])
    index = batch.keyword_index.clone()
    if name == "no keywords":
        index[1] = -1
    return replace(
        batch,
        keyword_index=index,
        own=batch.own & (index >= 0)[:, None],
        pair_bag=batch.pair_bag[kept],
        pair_node=batch.pair_node[kept],
        captions=[batch.captions[i] for i in kept.tolist()],
        caption_id=batch.caption_id[kept],
        draw=batch.draw[kept],
    )


def part(batch: TreeBatch, rank: int) -> TreeBatch:
    """A process's tree; keywords it lacks are not handed to it."""
    mine = batch.pair_bag == rank
    index = batch.keyword_index[rank : rank + 1]
    words = sorted(set(index[index >= 0].tolist()))
    place = {word: i for i, word in enumerate(words)}
    return replace(
        batch,
        trees=[rank],
        features=batch.features[rank : rank + 1],
        node_mask=batch.node_mask[rank : rank + 1],
        keywords=[batch.keywords[word] for word in words],
        keyword_index=torch.tensor([[place.get(word, -1) for word in index[0].tolist()]]),
        own=batch.own[rank : rank + 1],
        pair_bag=batch.pair_bag[mine] - rank,
        pair_node=batch.pair_node[mine],
        captions=[text for text, own in zip(batch.captions, mine.tolist(), strict=True) if own],
        caption_id=batch.caption_id[mine],
        draw=batch.draw[mine],
        edge_draw=batch.edge_draw[rank : rank + 1],
    )


def step(model: Any, batch: TreeBatch, counts: dict[str, float]) -> torch.Tensor:
    """One micro-batch as the trainer does it: sums over counts; returns the losses."""
    out = model(batch)
    means = [out.totals[name] / (counts[name] or 1.0) for name in LOSSES]
    torch.stack(means).sum().backward()
    return torch.stack(means).detach()


def shared(model: MRPLIP, batch: TreeBatch, world: int) -> dict[str, float]:
    counts = torch.tensor([model.counts(batch)[name] for name in LOSSES])
    dist.all_reduce(counts)
    return dict(zip(LOSSES, (counts / world).tolist(), strict=True))


def work_on_trees(rank: int, world: int, found: dict[str, torch.Tensor]) -> None:
    """Run a step of every setting in a process and keep its losses and gradients."""
    for name, settings in SETTINGS.items():
        model = DistributedDataParallel(patch_model(**settings).train())
        mine = part(whole(name), rank)
        for _ in range(2 if name == "no keywords" else 1):
            model.zero_grad()  # a weight without a gradient would stop the second
            losses = step(model, mine, shared(model.module, mine, world))
        dist.all_reduce(losses)
        found[f"trees, {name}/losses"] = losses / world
        for parameter, value in model.module.named_parameters():
            found[f"trees, {name}/{parameter}"] = value.grad.clone()
