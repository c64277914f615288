"""Retrieval between patches and their captions over an archive's trees, by level and together.

Galleries are those of slides (:mod:`pathflip.evaluation.retrieval`): 64 at a time, or all that were
drawn. Nodes are drawn by a rank that does not depend on how many there are; ``all`` mixes the
levels in equal numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.patch_text import PatchReader
from pathflip.evaluation.retrieval import SHUFFLES, retrieval
from pathflip.evaluation.tree_vectors import encode_trees, node_captions
from pathflip.geometry import LEVEL_OF, level_name
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive

PER_LEVEL = 2048
"""Most nodes of a level that are measured."""


def evaluate_pairs(
    archive: Archive,
    reader: PatchReader,
    *,
    split: str = "test",
    source: str | None = None,
    protocol: str = "batch64",
    per_level: int = PER_LEVEL,
    shuffles: int = SHUFFLES,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure recall from patch to caption ("itr") and back ("tir").

    Args:
        archive: Archive with trees, their features and captions.
        reader: The model.
        split: Split of the trees; ``all`` for every one.
        source: Source of the captions; may be left out when there is one.
        protocol: ``batch64``, or ``full`` for one gallery of all nodes drawn.
        per_level: Most nodes of a level.
        shuffles: Number of random orders of ``batch64``.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of all draws.
        progress: Called while trees are encoded.

    Returns:
        {"levels": {"5x": as :func:`pathflip.evaluation.retrieval.retrieval`}, "all": likewise,
        "split", "trees", "no_caption": the number of nodes without one}.

    Raises:
        ConfigError: No tree of the split has captions (``no_captions``).
    """
    trees = encode_trees(
        archive, reader, splits=None if split == "all" else (split,), progress=progress
    )
    texts = node_captions(archive, trees.tree_ids, source=source)
    patients = trees.patients
    missing = 0
    drawn: dict[int, list[tuple[bytes, int, int, str]]] = {level: [] for level in reader.levels}
    for i, tree_id in enumerate(trees.tree_ids):
        captions = texts.get(tree_id) or [None] * len(LEVEL_OF)
        for node in np.flatnonzero(trees.mask[i]).tolist():
            if not (caption := captions[node]):
                missing += 1
                continue
            rank = hashlib.sha256(f"{seed}/{tree_id}/{node}".encode()).digest()
            drawn[int(LEVEL_OF[node])].append((rank, i, node, caption))
    kept = {level: sorted(items)[:per_level] for level, items in drawn.items() if len(items) > 1}
    if not kept:
        raise ConfigError(
            f"No level of the {len(trees.tree_ids)} trees has two captions.",
            hint="Give captions of more nodes.",
            code="no_captions",
        )
    even = min(len(items) for items in kept.values())
    groups = {level_name(reader.level_mpp[level]): items for level, items in kept.items()}
    mixed = sorted(item for items in kept.values() for item in items[:even])
    distinct = sorted({caption for items in kept.values() for *_, caption in items})
    vectors = dict(zip(distinct, reader.texts(distinct), strict=True))

    def measured(items: list[tuple[bytes, int, int, str]]) -> dict[str, Any]:
        return retrieval(
            np.stack([trees.vectors[i, node] for _, i, node, _ in items]),
            np.stack([vectors[caption] for *_, caption in items]),
            [caption for *_, caption in items],
            protocol=protocol,
            patients=[patients[i] for _, i, _, _ in items],
            shuffles=shuffles,
            resamples=resamples,
            seed=seed,
        )

    return {
        "model": reader.name,
        "split": split,
        "trees": len(trees.tree_ids),
        "no_caption": missing,
        "levels": {name: measured(items) for name, items in groups.items()},
        "all": measured(mixed),
    }
