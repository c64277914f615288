"""The part of a training step of MR-PLIP that is known before its forward pass.

Draws (masked tokens, prefixes, random edges) are functions of seeds in the batch, which are
functions of (seed, epoch, tree, node); so is the number of terms of each loss. Sampled negatives of
the matching loss depend on the model and are drawn later.

Shapes: G trees, V nodes, P pairs, k keywords of a tree, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathflip.geometry import LEVEL_OF, TREE_NODES, patch_tree
from pathflip.models.mrplip_config import MRPLIPConfig
from pathflip.models.tree_batch import TreeBatch

FEWEST_KEYWORDS = 4
"""A tree with fewer has no choice of positives, and is left out of the alignment."""
_TREE = patch_tree([0], [0], mpp=0.25)
EDGES = _TREE.edges.astype(np.int64)
"""Parent and child [84, 2]."""


def _ancestors() -> NDArray[np.int64]:
    pairs = []
    for node in range(1, TREE_NODES):
        above = _TREE.parent[node]
        while above >= 0:
            pairs.append((above, node))
            above = _TREE.parent[above]
    return np.array(pairs)


ANCESTORS = _ancestors()
"""Ancestor and descendant [228, 2]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Draws and counts of a step, on the CPU.

    Attributes:
        present: bool [G, V], whether the tree has the patch and its level is read.
        index: Keywords of each tree, int64 [G, k]; 0 behind its last.
        real: bool [G, k], whether there is such a keyword.
        own: bool [G, V, k], whether the keyword is of the patch's own caption.
        limit: Most positives of a patch of each tree, int64 [G].
        aligned: bool [G], whether the tree takes part in the vision-text alignment.
        captions: Token ids of captions [P].
        masked: The same with tokens masked; empty where that loss is off.
        places: Places of the masked tokens [P].
        prefixes: Tokens of each caption's prefix [P]; empty where that loss is off.
        allowed: bool [P, P], whether the one's text may be a negative of the other's patch.
        edges: Pairs of patches as tree · V + node, int64 [E, 2].
        counts: Number of terms of each loss.
    """

    present: Tensor
    index: Tensor
    real: Tensor
    own: Tensor
    limit: Tensor
    aligned: Tensor
    captions: list[list[int]]
    masked: list[list[int]]
    places: list[list[int]]
    prefixes: list[int]
    allowed: Tensor
    edges: Tensor
    counts: dict[str, float]


def make_plan(
    batch: TreeBatch,
    config: MRPLIPConfig,
    captions: list[list[int]],
    *,
    words: NDArray[np.int64],
    mask_id: int | None,
) -> Plan:
    """Plan a step.

    Args:
        batch: The trees of this worker.
        config: Settings of the model.
        captions: Token ids of the pairs' captions.
        words: Sorted ids of the tokenizer's words, see :func:`plain_tokens`.
        mask_id: Id of its [MASK].

    Raises:
        ValueError: There are no pairs, or one of a patch that its tree lacks.
    """
    present = batch.node_mask.cpu() & torch.from_numpy(np.isin(LEVEL_OF, config.levels))
    bag, node = batch.pair_bag.cpu(), batch.pair_node.cpu()
    if not len(bag) or not bool(present[bag, node].all()):
        raise ValueError("every pair needs a patch of its tree, and a batch needs pairs")
    index = batch.keyword_index.cpu()[:, : config.keyword_cap]
    real = index >= 0
    own = batch.own.cpu()[:, :, : config.keyword_cap] & real[:, None]
    index = index.clamp(min=0)
    sizes = real.sum(1)
    limit = (sizes // 2).clamp(max=config.keywords)
    aligned = sizes >= FEWEST_KEYWORDS
    possible = own & present[..., None] if config.takes_own(batch.progress) else present
    aligned = aligned & possible.flatten(1).any(1)
    counts = {"itc": float(len(bag))}
    allowed = torch.zeros(0, 0, dtype=torch.bool)
    masked: list[list[int]] = []
    places: list[list[int]] = []
    prefixes: list[int] = []
    if config.has("itm"):
        allowed = negatives_allowed(batch.caption_id.cpu(), keyword_sets(index, own, bag, node))
        counts["itm"] = float(len(bag) + allowed.any(1).sum() + allowed.any(0).sum())
    if config.has("mlm", "plm"):
        for ids, draw in zip(captions, batch.draw.tolist(), strict=True):
            rng = np.random.default_rng(draw % 2**63)
            if config.has("mlm") and mask_id is not None:
                hidden, where = mask_tokens(ids, words, mask_id, config.mlm_share, rng)
                masked.append(hidden)
                places.append(where)
            rng = np.random.default_rng((draw % 2**63, 1))  # the same whether or not mlm is on
            prefixes.append(prefix_length(len(ids), rng))
        counts["mlm"] = float(sum(map(len, places)))
        counts["plm"] = float(sum(map(len, captions)) - sum(prefixes))
    if not config.has("plm"):
        prefixes = []
    counts["cvta"] = float(aligned.sum())
    edges = torch.zeros(0, 2, dtype=torch.long)
    if config.has("mrtva"):
        edges = tree_edges(present, kind=config.edges, draws=batch.edge_draw.tolist())
        counts["mrtva"] = float(len(edges))
    return Plan(
        present=present, index=index, real=real, own=own, limit=limit, aligned=aligned,
        captions=captions, masked=masked, places=places, prefixes=prefixes, allowed=allowed,
        edges=edges, counts={name: counts[name] for name in config.losses},
    )  # fmt: skip


def tree_edges(present: Tensor, *, kind: str, draws: Sequence[int]) -> Tensor:
    """Return the pairs of patches that the cross-resolution alignment compares.

    Args:
        present: bool [G, V].
        kind: ``hierarchy``, ``all_ancestors`` or ``random``: as many pairs of different patches as
            hierarchy has.
        draws: Seed of each tree's random pairs [G].

    Returns:
        int64 [E, 2], a patch being tree · V + node.
    """
    table = ANCESTORS if kind == "all_ancestors" else EDGES
    found = []
    for tree, (there, draw) in enumerate(zip(present.numpy(), draws, strict=True)):
        pairs = table[there[table].all(1)]
        nodes = np.flatnonzero(there)
        if kind == "random" and len(pairs):
            rng = np.random.default_rng(draw % 2**63)
            one = rng.integers(len(nodes), size=len(pairs))
            other = (one + rng.integers(1, len(nodes), size=len(pairs))) % len(nodes)
            pairs = np.stack([nodes[one], nodes[other]], 1)
        found.append(tree * present.shape[1] + pairs)
    return torch.from_numpy(np.concatenate(found))


def keyword_sets(index: Tensor, own: Tensor, bag: Tensor, node: Tensor) -> list[frozenset[int]]:
    """Return the own keywords of each pair's patch."""
    return [
        frozenset(index[tree][own[tree, place]].tolist())
        for tree, place in zip(bag.tolist(), node.tolist(), strict=True)
    ]


def negatives_allowed(caption_id: Tensor, keywords: Sequence[frozenset[int]]) -> Tensor:
    """Return which pairs may be mismatched: of other captions, and other keywords if any.

    Args:
        caption_id: Equal where captions are [P].
        keywords: Own keywords of each pair's patch [P].

    Returns:
        bool [P, P].
    """
    number = {each: i for i, each in enumerate(dict.fromkeys(keywords))}
    kinds = torch.tensor([number[each] for each in keywords])
    said = torch.tensor([bool(each) for each in keywords])
    alike = (kinds[:, None] == kinds) & said
    return (caption_id[:, None] != caption_id) & ~alike


def plain_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """Return the ids of a tokenizer's words, without its special tokens."""
    special = np.array(sorted(set(tokenizer.all_special_ids)))
    return np.setdiff1d(np.arange(len(tokenizer)), special)


def mask_tokens(
    ids: Sequence[int],
    plain: NDArray[np.int64],
    mask_id: int,
    share: float,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Mask some of a caption's words, one at least: 80 % as [MASK], 10 % as another, 10 % as is.

    Args:
        ids: Token ids.
        plain: Sorted ids of words, that is of tokens which are not special.
        mask_id: Id of [MASK].
        share: Share of the words to mask.
        rng: Source of the draws.

    Returns:
        Token ids with those masked, and their places in order.
    """
    words = np.flatnonzero(np.isin(ids, plain))
    count = min(len(words), max(1, round(share * len(words))))
    places = np.sort(rng.permutation(words)[:count])
    how, others = rng.random(count), rng.integers(len(plain), size=count)
    hidden = list(ids)
    for place, luck, other in zip(places.tolist(), how, others, strict=True):
        if luck < 0.8:
            hidden[place] = mask_id
        elif luck < 0.9:
            hidden[place] = int(plain[other])
    return hidden, places.tolist()


def prefix_length(length: int, rng: np.random.Generator) -> int:
    """Draw where a caption is split: [CLS] before it at least, a word and [SEP] behind it."""
    return int(rng.integers(1, max(2, length - 1)))
