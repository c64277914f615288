"""Batches of patch trees: features and captions from the archive, pairs drawn per tree.

What a tree shows in an epoch (its patch-caption pairs, the seeds of masked tokens, prefixes and
random edges) is a function of (seed, epoch, tree, node), never of a worker, a thread or an earlier
draw: any number of workers sees the same, and so does a run that is resumed.

Shapes: G trees of this worker in a micro-batch, 85 nodes of a tree, d feature width, K distinct
keywords, k the most keywords of a tree, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.tree_texts import decode_keywords
from pathflip.geometry import LEVEL_OF, TREE_NODES
from pathflip.models.tree_batch import TreeBatch
from pathflip.training.dataset import rng_for
from pathflip.training.order import StepOrder
from pathflip.training.rows import damaged
from pathflip.training.tree_corpus import TreeCorpus, spread_over, unchanged_rows

VAL_TREES, VAL_PAIRS = 1024, 8
"""A validation uses at most so many trees, and so many pairs of each."""
VAL_TREES_AT_ONCE = 8
START_TREES, START_BYTES = 256, 256 << 20
"""Limits of the training data a model's start is fitted to: trees, bytes of features."""
SHARES = (1, 3, 5, 7)
"""Pairs of each level among 16."""


@dataclass(frozen=True, kw_only=True)
class TreeSampling:
    """Settings of what a tree contributes to a batch.

    Attributes:
        seed: Seed of all draws.
        batch_size: Number of trees in a step, over all workers.
        accumulate: Number of micro-batches in a step.
        pairs: Largest number of patch-caption pairs of a tree.
        trees_per_patient: Largest number of a patient's trees in a step.
        epochs: Number of passes over the training trees.
        steps: Number of steps in all; overrides ``epochs`` where given.
        levels: Levels that are shown, 0 (coarsest) to 3.
        keyword_cap: Largest number of keywords of a tree, the best by TF-IDF.
    """

    seed: int
    batch_size: int
    accumulate: int
    pairs: int
    trees_per_patient: int = 1
    epochs: int = 1
    steps: int | None = None
    levels: tuple[int, ...] = (0, 1, 2, 3)
    keyword_cap: int = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeText:
    """Texts of a tree.

    Attributes:
        captions: Caption of each node [85], None where there is none.
        keywords: The tree's vocabulary [k], best first.
        own: bool [85, k], whether a keyword is of the node's caption.
    """

    captions: list[str | None]
    keywords: list[str]
    own: NDArray[np.bool_]


class TreeReader:
    """Reader of the features and texts of a run's trees; checks them as they are read.

    Rows are taken from the newest state of the archive, just those asked for. If all of them
    together are small enough they are read once and kept.

    Args:
        corpus: The trees.
        cache_bytes: Largest total that is kept in memory.

    Raises:
        CheckpointError: If a tree is no longer in the archive as it was.
    """

    def __init__(self, corpus: TreeCorpus, *, cache_bytes: int = 0) -> None:
        self.dim = int(corpus.about["encoder"]["dim"])
        self._archive = Archive(corpus.about["archive"])
        self._rows = unchanged_rows(corpus, self._archive)
        self.mask = np.zeros((len(corpus), TREE_NODES), np.bool_)
        for places, rows in self._rows["trees"].every(columns=["node_mask"], at_once=1 << 16):
            self.mask[places] = vectors(rows["node_mask"]) != 0
        self._features: NDArray[np.float16] | None = None
        self._texts: pa.Table | None = None
        if bytes_of(corpus) <= cache_bytes:
            self._features = np.zeros((len(corpus), TREE_NODES, self.dim), np.float16)
            for places, rows in self._rows["features"].every():
                self._features[places] = self._finite(rows)
            self._texts = self._rows["texts"].take(np.arange(len(corpus))).select(_TEXT)

    def features(self, trees: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the features of trees [G, 85, d], zero where a node was not read."""
        if self._features is not None:
            return self._features[trees]
        return self._finite(self._rows["features"].take(trees))

    def texts(self, trees: NDArray[np.int64]) -> list[TreeText]:
        """Return the texts of trees [G]."""
        kept = self._texts
        rows = self._rows["texts"].take(trees) if kept is None else kept.take(trees)
        try:
            return [_text(row) for row in rows.select(_TEXT).to_pylist()]
        except ValueError as error:
            table = self._rows["texts"].table
            raise damaged(self._archive, f"keywords in {table} are not whole ({error})") from error

    def _finite(self, rows: pa.Table) -> NDArray[np.float16]:
        features = vectors(rows["features"]).reshape(len(rows), TREE_NODES, self.dim)
        if not np.isfinite(features).all():
            raise damaged(self._archive, f"rows of {self._rows['features'].table} are not finite")
        return features


_TEXT = ["captions", "keywords", "keyword_of"]


def _text(row: dict[str, Any]) -> TreeText:
    keywords: list[str] = row["keywords"] or []
    own = np.zeros((TREE_NODES, len(keywords)), np.bool_)
    if keywords:
        found = decode_keywords(keywords, row["keyword_of"])
        counts = np.diff(found.offsets.astype(np.int64))
        own[np.repeat(np.arange(TREE_NODES), counts), found.indices] = True
    captions = [text if text and text.strip() else None for text in row["captions"]]
    return TreeText(captions=captions, keywords=keywords, own=own)


def bytes_of(corpus: TreeCorpus) -> int:
    """Return the bytes that features and texts of all trees take in memory."""
    features = len(corpus) * TREE_NODES * int(corpus.about["encoder"]["dim"]) * 2
    return features + int(corpus.about["text_bytes"])


class TreeDataset:
    """The trees of a run, their order and how a batch of them is drawn.

    Features and texts are opened when the first batch is drawn; until then the list of trees is
    enough.

    Args:
        corpus: The trees.
        sampling: Settings of the draws.
        cache_bytes: Largest size of features and texts that is kept in memory.
    """

    unit = "trees"

    def __init__(self, corpus: TreeCorpus, sampling: TreeSampling, *, cache_bytes: int = 0) -> None:
        self.corpus, self.sampling, self._cache_bytes = corpus, sampling, cache_bytes
        # In the order of a batch a patient who may have several trees counts as so many.
        self.patients = spread_over(corpus.patients, sampling.trees_per_patient)
        self.members, self.says = corpus.members, corpus.says
        self._order = StepOrder(
            self,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            accumulate=sampling.accumulate,
        )

    @property
    def archive(self) -> str:
        """URI of the archive the trees are in."""
        return str(self.corpus.about["archive"])

    def save(self, path: str | Path) -> None:
        """Write the list of trees as Parquet."""
        self.corpus.save(path)

    def summary(self) -> dict[str, Any]:
        """Return the encoder, counts of each split, and counts of trees left out."""
        corpus = self.corpus
        return {
            "encoder": corpus.about["encoder"]["name"],
            **corpus.counts(),
            "left_out": corpus.about["left_out"],
        }

    def memory_mb(self, num_trees: int, *, read_ahead: int) -> dict[str, float]:
        """Return MiB a worker needs for data: a batch's features, read-ahead, and the cache.

        Args:
            num_trees: Number of trees in a worker's micro-batch.
            read_ahead: Number of batches read ahead.
        """
        tree = TREE_NODES * int(self.corpus.about["encoder"]["dim"])
        cache = bytes_of(self.corpus)
        return {
            "features_of_a_batch": round(num_trees * tree * (4 + 2 * read_ahead) / 2**20, 1),
            "cached_trees": round(cache / 2**20, 1) if cache <= self._cache_bytes else 0.0,
        }

    @cached_property
    def reader(self) -> TreeReader:
        """Reader of the trees' features and texts.

        Raises:
            CheckpointError: Trees are no longer in the archive as they were.
        """
        return TreeReader(self.corpus, cache_bytes=self._cache_bytes)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch.

        Raises:
            ConfigError: There are too few trees or patients for one batch.
        """
        return self._order.steps_per_epoch

    def step_trees(self, step: int) -> NDArray[np.int64]:
        """Return the trees of a global step, of all workers: int64 [accumulate, B]."""
        return self._order.step(step)

    def micro_batches(
        self, step: int, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> list[TreeBatch]:
        """Return a worker's share of a step, a micro-batch each.

        Args:
            step: The global step.
            rank: The worker.
            world: Number of workers; batch_size / accumulate is a multiple of it.
            pin: Whether tensors are to be in page-locked memory, which copies to a GPU start from.
        """
        epoch = step // self.steps_per_epoch
        done = step / (self.sampling.steps or self.sampling.epochs * self.steps_per_epoch)
        found = []
        for trees in self.step_trees(step):
            share = len(trees) // world
            mine = trees[rank * share : (rank + 1) * share]
            batch = replace(self.batch(mine, epoch=epoch), progress=done)
            found.append(batch.pin_memory() if pin else batch)
        return found

    def validation_batches(self) -> list[NDArray[np.int64]]:
        """Return the validation trees in batches; of many, some that the seed chooses.

        Trees of a slide do not follow each other: a gallery of neighbouring tissue would be another
        task than the one trained.
        """
        val = rng_for("validation", self.sampling.seed).permutation(self.corpus.members("val"))
        val = val[:VAL_TREES]
        return [
            val[start : start + VAL_TREES_AT_ONCE]
            for start in range(0, len(val), VAL_TREES_AT_ONCE)
        ]

    @cached_property
    def start_data(self) -> tuple[torch.Tensor, list[str], list[str]]:
        """Patches of :meth:`start_trees`, float32 [n, d], their captions and their keywords."""
        trees = self.start_trees()
        mask = self.reader.mask[trees] & np.isin(LEVEL_OF, self.sampling.levels)
        features = torch.from_numpy(self.reader.features(trees)[mask]).float()
        texts = self.reader.texts(trees)
        captions = [text for tree in texts for text in tree.captions if text is not None]
        keywords = [word for tree in texts for word in tree.keywords]
        return features, list(dict.fromkeys(captions)), list(dict.fromkeys(keywords))

    def start_trees(self) -> NDArray[np.int64]:
        """Return some training trees that a start from data is fitted to; set by the seed."""
        tree = TREE_NODES * int(self.corpus.about["encoder"]["dim"]) * 2
        most = max(2, min(START_TREES, START_BYTES // tree))
        train = self.corpus.members("train")
        drawn: NDArray[np.int64] = rng_for("start", self.sampling.seed).permutation(train)[:most]
        return drawn

    def batch(self, trees: NDArray[np.int64], *, epoch: int, pairs: int | None = None) -> TreeBatch:
        """Return a micro-batch of given trees, as drawn for an epoch.

        Args:
            trees: Positions of the trees, int64 [G].
            epoch: Epoch of the draws; -1 for validation.
            pairs: Largest number of pairs of a tree; None for that of the run.
        """
        sampling = self.sampling
        mask = self.reader.mask[trees] & np.isin(LEVEL_OF, sampling.levels)
        features = self.reader.features(trees)
        texts = self.reader.texts(trees)
        place: dict[str, int] = {}
        vocabularies: list[list[int]] = []
        owned: list[NDArray[np.bool_]] = []
        drawn: list[tuple[int, int, str]] = []
        for row, (tree, text) in enumerate(zip(trees.tolist(), texts, strict=True)):
            # Words of nodes that are not shown say nothing about those that are.
            own = text.own & mask[row][:, None]
            kept = np.flatnonzero(own.any(0))[: sampling.keyword_cap]
            vocabularies.append(
                [place.setdefault(text.keywords[i], len(place)) for i in kept.tolist()]
            )
            owned.append(own[:, kept])
            captions = [
                caption if there else None
                for caption, there in zip(text.captions, mask[row].tolist(), strict=True)
            ]
            nodes = draw_nodes(
                captions,
                num=sampling.pairs if pairs is None else pairs,
                levels=sampling.levels,
                seed=sampling.seed,
                epoch=epoch,
                tree_id=self.corpus.tree_ids[tree],
            )
            drawn += [(row, node, captions[node] or "") for node in nodes]
        widest = max(map(len, vocabularies))
        index = np.full((len(trees), widest), -1, np.int64)
        own = np.zeros((len(trees), TREE_NODES, widest), np.bool_)
        for row, words in enumerate(vocabularies):
            index[row, : len(words)] = words
            own[row, :, : len(words)] = owned[row]
        ids = [self.corpus.tree_ids[tree] for tree in trees.tolist()]
        key = (sampling.seed, epoch)
        return TreeBatch(
            trees=trees.tolist(),
            features=torch.from_numpy(np.where(mask[..., None], features, np.float16(0))),
            node_mask=torch.from_numpy(mask),
            keywords=list(place),
            keyword_index=torch.from_numpy(index),
            own=torch.from_numpy(own),
            pair_bag=torch.tensor([row for row, _, _ in drawn], dtype=torch.int64),
            pair_node=torch.tensor([node for _, node, _ in drawn], dtype=torch.int64),
            captions=[caption for _, _, caption in drawn],
            caption_id=_hashes(["caption", caption] for _, _, caption in drawn),
            draw=_hashes(["draw", *key, ids[row], node] for row, node, _ in drawn),
            edge_draw=_hashes(["edges", *key, tree] for tree in ids),
        )


def quotas(num: int, levels: Sequence[int]) -> list[int]:
    """Return how many of ``num`` pairs each level gets: 1, 3, 5 and 7 in 16, rounded.

    Largest remainders are rounded up, coarser levels first: 1, 2, 2, 3 of 8.
    """
    whole = sum(SHARES[level] for level in levels)
    found, rest = zip(*(divmod(num * SHARES[level], whole) for level in levels), strict=True)
    left = num - sum(found)
    up = sorted(range(len(levels)), key=lambda i: (-rest[i], i))[:left]
    return [count + (i in up) for i, count in enumerate(found)]


def draw_nodes(
    captions: Sequence[str | None],
    *,
    num: int,
    levels: Sequence[int],
    seed: int,
    epoch: int,
    tree_id: str,
) -> list[int]:
    """Return the nodes of a tree's pairs in an epoch, ascending, at most ``num``.

    Each level gets its share (:func:`quotas`); what a level lacks goes to the others. No two nodes
    have equal captions as long as there are others.

    Args:
        captions: Caption of each node [85]; None where it cannot be drawn.
        num: Largest number of pairs.
        levels: Levels to draw from.
        seed: Seed of the run.
        epoch: The epoch.
        tree_id: The tree.
    """
    order = rng_for("pairs", seed, epoch, tree_id).permutation(TREE_NODES).tolist()
    left = [node for node in order if captions[node] is not None]
    chosen: list[int] = []
    said: set[str | None] = set()

    def take(nodes: Sequence[int], most: int) -> None:
        for node in nodes:
            if most <= 0:
                return
            if captions[node] not in said:
                chosen.append(node)
                said.add(captions[node])
                most -= 1

    for level, quota in zip(levels, quotas(num, levels), strict=True):
        take([node for node in left if LEVEL_OF[node] == level], quota)
    take(left, num - len(chosen))
    chosen += [node for node in left if node not in chosen][: num - len(chosen)]
    return sorted(chosen)


def _hashes(keys: Any) -> torch.Tensor:
    """Return the first 63 bits of the sha256 of each key, int64."""
    digests = [hashlib.sha256("\x1f".join(map(str, key)).encode()).digest() for key in keys]
    values = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
    return torch.tensor(values, dtype=torch.int64)
