"""Page of one patch tree: its pyramid as the encoder saw it, with the texts of its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from pathflip.archive import Archive
from pathflip.archive.storage import guarded, is_local
from pathflip.archive.trees import TREE_TEXTS, read_trees, tree_spec
from pathflip.display import data_uri
from pathflip.errors import ArchiveError
from pathflip.geometry import TREE_OFFSETS, level_name
from pathflip.interop.tree_images import read_nodes, tree_reader
from pathflip.report.page import write_page

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathflip.slides.reader import SlideReader

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
    tree_id = _first(archive) if tree_id is None else tree_id
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
    sources = [
        {
            "name": row["source"],
            "model": row["model"],
            "keywords": row["keywords"] or [],
            "captions": node_texts(row["captions"] or []),
        }
        for row in tree_texts(archive, tree)
    ]
    titles = {
        one["node"]: one["text"] for source in reversed(sources) for one in source["captions"]
    }
    with tree_reader(spec) as reader:
        levels = pyramid(archive, reader, tree, titles=titles)
    write_page(
        "tree.html",
        Path(path),
        title=f"Patch tree {tree['tree_id']}",
        archive=archive.uri,
        tree=tree,
        nodes=sum(bool(node["picture"]) for level in levels for node in level["nodes"]),
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


def pyramid(
    archive: Archive,
    reader: SlideReader,
    tree: Mapping[str, Any],
    *,
    titles: Mapping[int, str],
    across: Sequence[int] = (1, 2, 4, 8),
) -> list[dict[str, Any]]:
    """Return the levels of a tree with pictures of their nodes, each to be drawn in a square.

    Args:
        archive: The archive.
        reader: Reader of :func:`pathflip.interop.tree_images.tree_reader`.
        tree: Row of the tree.
        titles: {node: caption}.
        across: Nodes across that are shown of each level, the central ones.

    Returns:
        Of each level {"name", "mpp", "um", "count": its nodes, "nodes": [{"x", "y", "side",
        "picture", "title"}], "frame": (x, y, side) of what the next level shows, None where that is
        all of it}; x, y and side are px in a square of :data:`SIDE_PX`.

    Raises:
        SlideError: The slide cannot be read.
    """
    spec = tree_spec(archive)
    shown = {level: _central(level, across[level]) for level in range(tree["levels"])}
    side = {level: SIDE_PX // across[level] for level in shown}
    mask = tree["node_mask"]
    wanted = [node for level in shown.values() for node, _, _ in level if mask[node]]
    read = read_nodes(reader, archive.slide(tree["slide_id"]), tree, spec=spec, nodes=wanted)
    pictures = {
        node: _picture(pixels, min(side[_level(node)], spec.node_px)) for node, pixels in read
    }
    share = [across[level] / 2**level for level in shown]  # of the root's side
    frames = [after / own for own, after in pairwise(share)]
    return [
        {
            "name": level_name(spec.level_mpp[level]),
            "mpp": spec.level_mpp[level],
            "um": spec.parent_um / 2**level,
            "count": 4**level,
            "nodes": [
                {
                    "x": col * side[level],
                    "y": row * side[level],
                    "side": side[level],
                    "picture": pictures.get(node, ""),
                    "title": f"Node {node}: {titles.get(node, '')}".rstrip(": "),
                }
                for node, row, col in nodes
            ],
            "frame": _framed(frames[level]) if level < len(frames) else None,
        }
        for level, nodes in shown.items()
    ]


def tree_texts(archive: Archive, tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a tree's rows of texts, by source."""
    if TREE_TEXTS not in archive.tables():
        return []
    of_tree = pc.field("slide_id") == tree["slide_id"]  # the column that has an index
    of_tree &= pc.field("tree_id") == tree["tree_id"]
    columns = ["source", "model", "captions", "keywords", "keyword_of"]
    with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
        rows = archive.dataset(TREE_TEXTS).to_table(columns=columns, filter=of_tree)
    found: list[dict[str, Any]] = rows.sort_by("source").to_pylist()
    return found


def node_texts(captions: Sequence[str | None]) -> list[dict[str, Any]]:
    """Return {"node", "place", "text"} of the captions of a tree's nodes."""
    return [
        {"node": node, "place": _place(node), "text": text}
        for node, text in enumerate(captions)
        if text
    ]


def _level(node: int) -> int:
    return max(level for level, first in enumerate(TREE_OFFSETS) if node >= first)


def _central(level: int, across: int) -> list[tuple[int, int, int]]:
    """Return (node, row, col) of a level's central nodes; row and col among them."""
    first = (2**level - across) // 2
    start = TREE_OFFSETS[level] + first * (2**level + 1)
    return [
        (start + row * 2**level + col, row, col) for row, col in product(range(across), repeat=2)
    ]


def _framed(share: float) -> tuple[float, float, float] | None:
    """Return (x, y, side) of the central part of a square, None of all of it."""
    side = SIDE_PX * share
    return None if share >= 1 else ((SIDE_PX - side) / 2, (SIDE_PX - side) / 2, side)


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
