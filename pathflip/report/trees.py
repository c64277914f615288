"""Page of one patch tree: its pyramid as the encoder saw it, with the texts of its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from pathflip.archive import Archive
from pathflip.archive.storage import guarded, is_local
from pathflip.archive.trees import TREE_TEXTS, read_trees, tree_spec
from pathflip.errors import ArchiveError
from pathflip.geometry import TREE_NODES, TREE_OFFSETS
from pathflip.interop.tree_images import read_nodes, tree_reader
from pathflip.report.page import data_uri, write_page

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE_PX = 512
"""Side of the picture of a level; its nodes share it."""


def write_tree_page(archive: Archive, path: str | Path, *, tree_id: str | None = None) -> str:
    """Write a page of a patch tree: four levels of nodes, masked ones empty, and their texts.

    Args:
        archive: The archive.
        path: The HTML file; replaced whole.
        tree_id: Key of the tree; by default the first one with texts, or the first.

    Returns:
        The key of the tree.

    Raises:
        ArchiveError: There is no such tree (``unknown_tree``, ``no_trees``), or it is
            ``quarantined``.
        SlideError: Its slide cannot be read.
    """
    spec = tree_spec(archive)
    if tree_id is None:
        tree_id = _first(archive)
    rows = read_trees(archive)
    tree = next(iter(rows.filter(pc.equal(rows["tree_id"], tree_id)).to_pylist()), None)
    if tree is None:
        bad = read_trees(archive, columns=["tree_id", "fault"], quarantined=True)
        if fault := bad.filter(pc.equal(bad["tree_id"], tree_id))["fault"].to_pylist():
            raise ArchiveError(
                f"Patch tree {tree_id} of {archive.uri} is quarantined: {fault[0]}.",
                hint="Copy its slide's file again and ingest it; or, if the file is good: "
                f"pathflip trees --archive {archive.uri} --retry",
                code="quarantined",
            )
        raise ArchiveError(
            f"The archive {archive.uri} has no patch tree {tree_id!r}.",
            hint="A tree is named SLIDE_ID/TX_TY; those of ready slides can be shown.",
            code="unknown_tree",
        )
    slide = archive.slide(tree["slide_id"])
    pictures: dict[int, str] = {}
    with tree_reader(spec) as reader:
        for node, pixels in read_nodes(reader, slide, tree, spec=spec):
            pictures[node] = _picture(pixels, SIDE_PX >> _level(node))
    sources = [
        {
            "name": row["source"],
            "model": row["model"],
            "keywords": row["keywords"] or [],
            "captions": [
                {"node": node, "place": _place(node), "text": text}
                for node, text in enumerate(row["captions"] or [])
                if text
            ],
        }
        for row in _texts(archive, tree)
    ]
    titles = {
        one["node"]: one["text"] for source in reversed(sources) for one in source["captions"]
    }
    levels = [
        {
            "mpp": spec.level_mpp[level],
            "um": spec.parent_um / 2**level,
            "nodes": [
                {
                    "x": col * (SIDE_PX >> level),
                    "y": row * (SIDE_PX >> level),
                    "side": SIDE_PX >> level,
                    "picture": pictures.get(node, ""),
                    "title": f"Node {node}: {titles.get(node, '')}".rstrip(": "),
                }
                for node, row, col in _nodes(level)
            ],
        }
        for level in range(tree["levels"])
    ]
    write_page(
        "tree.html",
        Path(path),
        title=f"Patch tree {tree['tree_id']}",
        archive=archive.uri,
        tree=tree,
        nodes=len(pictures),
        side=SIDE_PX,
        levels=levels,
        sources=sources,
    )
    return str(tree["tree_id"])


def _first(archive: Archive) -> str:
    """Return the key of the first tree with texts, or of the first; "" if there are none."""
    trees = read_trees(archive, columns=["tree_id"])["tree_id"].to_pylist()
    told: set[str] = set()
    if TREE_TEXTS in archive.tables():
        with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
            rows = archive.dataset(TREE_TEXTS).to_table(columns=["tree_id"])
        told = set(rows["tree_id"].to_pylist())
    return next((tree for tree in trees if tree in told), next(iter(trees), ""))


def _texts(archive: Archive, tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a tree's rows of texts, by source."""
    if TREE_TEXTS not in archive.tables():
        return []
    of_tree = pc.field("slide_id") == tree["slide_id"]  # the column that has an index
    of_tree &= pc.field("tree_id") == tree["tree_id"]
    columns = ["source", "model", "captions", "keywords"]
    with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
        rows = archive.dataset(TREE_TEXTS).to_table(columns=columns, filter=of_tree)
    found: list[dict[str, Any]] = rows.sort_by("source").to_pylist()
    return found


def _level(node: int) -> int:
    return max(level for level, first in enumerate(TREE_OFFSETS) if node >= first)


def _nodes(level: int) -> list[tuple[int, int, int]]:
    """Return (node, row, col) of a level."""
    first, side = TREE_OFFSETS[level], 2**level
    last = [*TREE_OFFSETS, TREE_NODES][level + 1]
    return [(node, *divmod(node - first, side)) for node in range(first, last)]


def _place(node: int) -> str:
    level = _level(node)
    row, col = divmod(node - TREE_OFFSETS[level], 2**level)
    return f"level {level}, row {row}, column {col}"


def _picture(pixels: NDArray[np.uint8], px: int) -> str:
    import cv2
    import simplejpeg

    small = cv2.resize(pixels, (px, px), interpolation=cv2.INTER_AREA)
    rgb = np.ascontiguousarray(small, np.uint8)
    return data_uri(simplejpeg.encode_jpeg(rgb, quality=85))
