"""Small archives with patch trees, made without slides."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pathflip.archive.commit import Committer
from pathflip.archive.trees import Tree, ensure_trees, write_trees
from pathflip.geometry import TREE_NODES, TreeSpec
from tests.archives import make_archive

MASKED = 84
"""Node that no tree has features of."""


def make_tree_archive(uri: Path, *, slides: int = 2, trees: int = 2) -> Path:
    """Make an archive whose slides ``slide000`` … have trees at (0, 0), (1, 0) …, all of 84 nodes.

    The trees have no features.
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
