"""The actor of ``pathflip trees``: reads the nodes of a slide's patch trees and embeds them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.ingest.decision import Attempts
from jobs.ingest.reading import Request, SlideFile, check_revision, encode_ahead, read_ahead
from jobs.worker import to_ipc
from pathflip.archive import Archive, vectors
from pathflip.archive.schema import trees_table
from pathflip.archive.storage import guarded, is_local
from pathflip.archive.trees import TREES, Tree, tree_feature_rows, tree_rows
from pathflip.encoders import Encoder, load_encoder
from pathflip.errors import SlideError
from pathflip.geometry import (
    TREE_NODES,
    TREE_OFFSETS,
    TreeSpec,
    patch_tree,
    tree_levels,
    tree_tissue,
)
from pathflip.slides.reader import Patches, SlideReader
from pathflip.slides.staging import Stage, opened
from pathflip.slides.tissue import TissueMask

NODES_AT_ONCE = 64
"""Nodes of a request: the finest level of one tree, or a coarser level of several."""
MIN_NODE_TISSUE = 0.05
"""Nodes with less tissue are not read: a node of a kept root may be glass."""
MAX_BAD_NODES = 0.1
"""Share of the nodes read that may be damaged; beyond it the tree is quarantined."""


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """Trees of one slide that are to be read.

    Attributes:
        slide_id: The slide.
        new: (tx, ty) of roots without a good tree; they get features of all encoders.
        lacking: Encoders that the slide's stored trees have no features of.
    """

    slide_id: str
    new: list[list[int]]
    lacking: list[str]

    def to_json(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class SlideOutcome:
    """Result of one slide's task.

    Attributes:
        slide_id: The slide.
        trees: Good trees with new rows.
        nodes: Their nodes with features.
        levels: {levels: trees}.
        quarantined: {reason: trees} that are too damaged.
        reason: Error code of a slide that was left out, or empty.
        message: Its message.
    """

    slide_id: str
    trees: int = 0
    nodes: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Nodes as read: features fp16 [T, 85, dim] of each encoder, ok, finite [T, 85], blur."""

    features: list[NDArray[np.float16]]
    ok: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    blur: NDArray[np.float32]


class TreeActor:
    """Actor that reads and embeds the trees of one slide after the other.

    Args:
        archive: Archive URI.
        spec: Sizes of the trees.
        encoders: (spec, revision on the driver) of each encoder.
        device: Device of the encoders.
        readers: Reader processes to own.
        attempts: Times a reader may die or hang on a slide before the slide is left out.
        timeout_s: Deadline of one request.

    Raises:
        EncoderError: An encoder does not load, or is another one here (``other_encoder``).
    """

    def __init__(
        self,
        archive: str,
        spec: TreeSpec,
        encoders: Sequence[tuple[str, str]],
        device: str,
        readers: int,
        attempts: int,
        timeout_s: float,
    ) -> None:
        cv2.setNumThreads(1)  # parallel work is Ray's
        self._spec, self._attempts, self._timeout_s = spec, attempts, timeout_s
        self._archive = Archive(archive)
        self._stage = Stage()
        self._encoders: dict[str, Encoder] = {}
        for text, revision in encoders:
            encoder = load_encoder(text, device=device)
            check_revision(encoder, revision)
            self._encoders[encoder.name] = encoder
        # Every level alike: DCT halving would touch 20x of a 40x base but not 10x.
        self._readers = [
            SlideReader(patches=NODES_AT_ONCE, px=spec.node_px, halving="exact", buffers=2)
            for _ in range(readers)
        ]

    def close(self) -> None:
        """Stop the reader processes."""
        for reader in self._readers:
            reader.close()

    def __call__(self, rows: list[dict[str, str]]) -> pa.Table:
        """Return the rows that one slide's task makes: columns ``table`` and ``rows`` (IPC).

        Its outcome is the schema's metadata ``outcome``, JSON of :class:`SlideOutcome`.
        """
        (row,) = rows
        task = SlideTask(**json.loads(row["task"]))
        try:
            made, outcome = self._do(task)
        except SlideError as error:
            reason = "too_many_bad_tiles" if error.code == "bad_tile" else error.code
            made = {}
            outcome = SlideOutcome(slide_id=task.slide_id, reason=reason, message=str(error))
        table = pa.table(
            {
                "table": pa.array(list(made), pa.string()),
                "rows": pa.array([to_ipc(part) for part in made.values()], pa.binary()),
            }
        )
        return table.replace_schema_metadata({"outcome": json.dumps(asdict(outcome))})

    def _do(self, task: SlideTask) -> tuple[dict[str, pa.Table], SlideOutcome]:
        slide = self._slide(task.slide_id)
        with opened(slide, stage=self._stage) as path:
            return self._do_opened(slide | {"path": path}, task)

    def _do_opened(
        self, slide: dict[str, Any], task: SlideTask
    ) -> tuple[dict[str, pa.Table], SlideOutcome]:
        """Do the task of a slide whose row has ``path``, that of the file to read."""
        attempts = Attempts(limit=self._attempts)
        read = self._new_trees(slide, task, attempts) if task.new else []
        trees = [tree for tree in read if tree.fault is None]
        made: dict[str, pa.Table] = {}
        if trees:
            made = {trees_table(name): tree_feature_rows(trees, name) for name in self._encoders}
        if read:
            made[TREES] = tree_rows(read, self._spec)
        if task.lacking:
            stored = self._stored_trees(slide, task, attempts)
            for name in task.lacking:
                rows = [tree_feature_rows(stored, name)]
                rows += [made[trees_table(name)]] if trees else []
                made[trees_table(name)] = pa.concat_tables(rows)
            trees = [*trees, *stored]
        levels = [str(tree.levels) for tree in trees]
        return made, SlideOutcome(
            slide_id=task.slide_id,
            trees=len(trees),
            nodes=int(sum(tree.node_mask.sum() for tree in trees)),
            levels={level: levels.count(level) for level in sorted(set(levels))},
            quarantined=dict(Counter(tree.fault for tree in read if tree.fault is not None)),
        )

    def _slide(self, slide_id: str) -> dict[str, Any]:
        columns = [
            "slide_id", "uri", "bytes", "mtime_ns", "sha256", "mpp", "mpp_source", "tissue_png",
            "tissue_mpp",
        ]  # fmt: skip
        row: dict[str, Any] = self._archive.slides(
            columns=columns, slide_ids=[slide_id]
        ).to_pylist()[0]
        return row

    def _new_trees(self, slide: dict[str, Any], task: SlideTask, attempts: Attempts) -> list[Tree]:
        """Return the trees of new roots, those with a fault among them."""
        mpp, levels = slide["mpp"], tree_levels(slide["mpp"], spec=self._spec)
        mask = TissueMask.from_png(slide["tissue_png"], mpp=slide["tissue_mpp"], slide_mpp=mpp)
        tissue = np.stack(
            [tree_tissue(mask, tx=tx, ty=ty, mpp=mpp, spec=self._spec) for tx, ty in task.new]
        )
        wanted = wanted_nodes(tissue, levels=levels)
        read = self._read(slide, np.array(task.new), wanted, list(self._encoders), attempts)
        trees = []
        for at, (tx, ty) in enumerate(task.new):
            fault = _fault(wanted[at], ok=read.ok[at], kept=read.kept[at])
            pairs = () if fault else zip(self._encoders, read.features, strict=True)
            trees.append(
                Tree(
                    slide_id=task.slide_id, tx=tx, ty=ty, mpp=mpp, levels=levels, fault=fault,
                    node_mask=read.kept[at] & (fault is None), node_tissue=tissue[at],
                    node_blur=read.blur[at], features={name: one[at] for name, one in pairs},
                )
            )  # fmt: skip
        return trees

    def _stored_trees(
        self, slide: dict[str, Any], task: SlideTask, attempts: Attempts
    ) -> list[Tree]:
        """Return the slide's good stored trees with features of the encoders they lack.

        Every node that the archive says is there must be read again.
        """
        rows = self._rows(TREES, task.slide_id, None)
        rows = rows.filter(rows["fault"].is_null())
        wanted = vectors(rows["node_mask"]) != 0
        tissue, blur = vectors(rows["node_tissue"]), vectors(rows["node_blur"])
        roots = np.stack([rows["tx"].to_numpy(), rows["ty"].to_numpy()], axis=1)
        read = self._read(slide, roots, wanted, task.lacking, attempts)
        if lost := int((wanted & ~read.kept).sum()):
            raise SlideError(
                f"{lost} nodes of {Path(slide['uri']).name} that the archive holds are now damaged "
                "or not finite.",
                hint="Check the file and the new encoder; the trees stay as they were.",
                code="too_many_bad_tiles",
            )
        return [
            Tree(
                slide_id=task.slide_id, tx=int(tx), ty=int(ty), mpp=slide["mpp"],
                levels=rows["levels"][at].as_py(), node_mask=wanted[at], node_tissue=tissue[at],
                node_blur=blur[at],
                features={
                    name: one[at] for name, one in zip(task.lacking, read.features, strict=True)
                },
            )
            for at, (tx, ty) in enumerate(roots)
        ]  # fmt: skip

    def _read(
        self,
        slide: dict[str, Any],
        roots: NDArray[Any],
        wanted: NDArray[np.bool_],
        names: Sequence[str],
        attempts: Attempts,
    ) -> _Read:
        """Read and embed nodes of a slide, level by level.

        Args:
            slide: Its row.
            roots: (tx, ty) of the trees [T, 2].
            wanted: Nodes to read, bool [T, 85].
            names: Encoders.
            attempts: Attempts at the slide.
        """
        encoders = [self._encoders[name] for name in names]
        tree = patch_tree(roots[:, 0], roots[:, 1], mpp=slide["mpp"], spec=self._spec)
        places = list(node_groups(wanted))
        requests = [
            Request(rects=tree.rects[at, node], mpp=float(tree.mpp[node[0]])) for at, node in places
        ]
        shape = (len(roots), TREE_NODES)
        features = [np.zeros((*shape, encoder.dim), np.float16) for encoder in encoders]
        ok, kept = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        blur = np.zeros(shape, np.float32)
        given = slide["mpp"] if slide["mpp_source"] == "override" else None
        file = SlideFile(
            path=slide["path"], bytes=slide["bytes"], mtime_ns=slide["mtime_ns"], mpp=given
        )
        read = read_ahead(
            self._readers,
            file,
            requests,
            px=self._spec.node_px,
            attempts=attempts,
            timeout_s=self._timeout_s,
        )

        def batches() -> Iterator[tuple[tuple[Any, Any, Patches, Any], NDArray[np.uint8]]]:
            for (at, node), patches in zip(places, read, strict=True):
                good = np.flatnonzero(patches.ok)
                if len(good):
                    whole = len(good) == len(at)
                    pixels = patches.pixels if whole else patches.pixels[good]
                    yield (at, node, patches, good), pixels

        for (at, node, patches, good), values in encode_ahead(encoders, batches()):
            finite = np.logical_and.reduce([np.isfinite(one).all(axis=1) for one in values])
            ok[at[good], node[good]] = True
            at, node = at[good][finite], node[good][finite]
            kept[at, node] = True
            blur[at, node] = patches.quality[good[finite], 0]
            for into, one in zip(features, values, strict=True):
                into[at, node] = one[finite]
        return _Read(features=features, ok=ok, kept=kept, blur=blur)

    def _rows(self, table: str, slide_id: str, columns: list[str] | None) -> pa.Table:
        uri = self._archive.uri
        with guarded(uri, f"read the table {table}", damaged=is_local(uri)):
            return self._archive.dataset(table).to_table(
                columns=columns, filter=pc.field("slide_id") == slide_id
            )


def wanted_nodes(tissue: NDArray[np.float32], *, levels: int) -> NDArray[np.bool_]:
    """Return the nodes of trees to read, bool [T, 85]: the root, and those with some tissue."""
    wanted = tissue >= MIN_NODE_TISSUE
    wanted[:, 0] = True
    wanted[:, [*TREE_OFFSETS, TREE_NODES][levels] :] = False
    return wanted


def node_groups(wanted: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return nodes that are read together, as (tree, node) each: one level of one or more trees."""
    groups = []
    for level, first in enumerate(TREE_OFFSETS):
        nodes = 4**level
        trees = NODES_AT_ONCE // nodes
        for start in range(0, len(wanted), trees):
            at, node = np.nonzero(wanted[start : start + trees, first : first + nodes])
            if len(at):
                groups.append((at + start, node + first))
    return groups


def _fault(
    wanted: NDArray[np.bool_], *, ok: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> str | None:
    """Return why a tree is quarantined, if it is: its root or over a tenth of its nodes are bad."""
    bad = wanted & ~kept
    if not bad[0] and bad.sum() <= MAX_BAD_NODES * wanted.sum():
        return None
    return "bad_features" if 2 * (bad & ok).sum() > bad.sum() else "too_many_bad_tiles"
