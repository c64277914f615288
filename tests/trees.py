"""Small archives with patch trees, made without slides: with texts that fit them, or bare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pathflip.archive.commit import Committer
from pathflip.archive.schema import tree_id, tree_text_id
from pathflip.archive.trees import (
    TREE_TEXTS,
    Tree,
    ensure_tree_encoder,
    ensure_tree_texts,
    ensure_trees,
    write_trees,
)
from pathflip.geometry import TREE_NODES, TreeSpec
from tests.archives import make_archive

DIM = 12
PATTERNS = ("nested", "solid", "cribriform", "trabecular")
NUCLEI = ("grooved", "stippled", "granular")
LEVELS = np.repeat(np.arange(4), (1, 4, 16, 64))
MASKED = 84
"""Node that no tree of :func:`make_bare_trees` has."""


def plain_caption(tree: int, node: int, pattern: str, nuclei: str) -> str | None:
    """Return what is said of a node: coarse ones of the pattern, fine ones of the nuclei."""
    seen = f"{pattern} growth" if LEVELS[node] < 2 else f"{nuclei} nuclei"
    return f"{seen} in field {tree * TREE_NODES + node}"


def make_tree_archive(
    uri: Path,
    *,
    slides: int = 12,
    per_slide: int = 2,
    per_patient: int = 1,
    split: Any = lambda n: "val" if n % 4 == 3 else "train",
    caption: Callable[[int, int, str, str], str | None] = plain_caption,
    levels: Callable[[int], int] = lambda tree: 4,
    masked: float = 0.05,
    keywords: bool = True,
    seed: int = 0,
) -> Path:
    """Make an archive: tree t shows one pattern and one kind of nuclei, as its features say.

    Args:
        uri: URI of the archive.
        slides: Number of slides.
        per_slide: Trees of a slide.
        per_patient: Slides of a patient.
        split: slide -> split, or None.
        caption: (tree, node, pattern, nuclei) -> caption of a node, or None.
        levels: tree -> levels of it.
        masked: Share of nodes, other than the root, that were not read.
        keywords: Whether captions have keywords: the two words that say what is seen.
        seed: Seed of the features.
    """
    rng = np.random.default_rng(seed)
    looks = {name: rng.standard_normal(DIM) for name in (*PATTERNS, *NUCLEI)}
    make_archive(
        uri, slides=slides, regions=(1, 1), per_patient=per_patient, split=split, captions=False
    )
    trees, texts = [], []
    for number in range(slides * per_slide):
        slide, tx = f"slide{number // per_slide:03d}", number % per_slide
        pattern, nuclei = (str(rng.choice(names)) for names in (PATTERNS, NUCLEI))
        depth = levels(number)
        mask = (rng.random(TREE_NODES) >= masked) & (depth > LEVELS)
        mask[0] = True
        coarse = np.where(LEVELS[:, None] < 2, looks[pattern], looks[nuclei])
        trees.append(
            Tree(
                slide_id=slide, tx=tx, ty=0, mpp=0.25 if depth == 4 else 0.5, levels=depth,
                node_mask=mask, node_tissue=np.ones(TREE_NODES, np.float32),
                node_blur=np.ones(TREE_NODES, np.float32),
                features={"tex": coarse + 0.3 * rng.standard_normal((TREE_NODES, DIM))},
            )
        )  # fmt: skip
        said = [caption(number, node, pattern, nuclei) for node in range(TREE_NODES)]
        texts.append(text_row(slide, tx=tx, captions=said, keywords=keywords))
    spec = TreeSpec(parent_um=256, node_px=128)
    with Committer(uri) as committer:
        ensure_trees(committer, spec, seed=0, per_slide=per_slide, min_tissue=0.5)
        ensure_tree_encoder(committer, "tex", dim=DIM, revision="1", mpp=None, licence="MIT")
        write_trees(committer, trees)
        write_texts(committer, texts)
    return uri


def make_bare_trees(uri: Path, *, slides: int = 2, trees: int = 2) -> Path:
    """Make an archive whose slides ``slide000`` … have trees at (0, 0), (1, 0) …, all of 84 nodes.

    The trees have neither features nor texts.
    """
    make_archive(uri, slides=slides, captions=False)
    mask = np.arange(TREE_NODES) != MASKED
    scores = np.ones(TREE_NODES, np.float32)
    with Committer(uri) as committer:
        spec = TreeSpec(parent_um=256, node_px=128)
        ensure_trees(committer, spec, seed=0, per_slide=trees, min_tissue=0.5)
        write_trees(
            committer,
            [
                Tree(
                    slide_id=f"slide{n:03d}", tx=tx, ty=0, mpp=0.25, levels=4, node_mask=mask,
                    node_tissue=scores, node_blur=scores,
                )
                for n in range(slides)
                for tx in range(trees)
            ],
        )  # fmt: skip
    return uri


def text_row(
    slide: str,
    *,
    tx: int,
    captions: Sequence[str | None],
    keywords: bool = True,
    source: str = "oracle",
) -> dict[str, Any]:
    """Return the row of a tree's captions; the first two words of each are its keywords."""
    words = [text.split()[:2] if text and keywords else [] for text in captions]
    vocabulary = sorted({word for own in words for word in own})
    offsets = np.cumsum([0, *map(len, words)]).astype("<u2")
    indices = np.array([vocabulary.index(word) for own in words for word in own], np.uint8)
    tree = tree_id(slide, tx=tx, ty=0)
    return {
        "text_id": tree_text_id(tree, source),
        "slide_id": slide,
        "tree_id": tree,
        "source": source,
        "model": "made up",
        "captions": list(captions),
        "keywords": vocabulary,
        "keyword_of": offsets.tobytes() + indices.tobytes(),
        "extractor": "made up",
    }


def write_texts(committer: Committer, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of :func:`text_row`."""
    ensure_tree_texts(committer)
    fields = committer.archive.dataset(TREE_TEXTS).schema
    body = pa.schema([item for item in fields if item.name != "checksum"])
    committer.upsert(TREE_TEXTS, pa.Table.from_pylist(list(rows), schema=body))
