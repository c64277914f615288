"""Patch trees of an archive: their settings and encoders, and their rows, written and read.

A tree counts once its row is in ``trees``, the ledger of trees, which is written last: rows of
``trees_<encoder>`` without one are what a writer that was killed left, and :func:`delete_strays`
removes them. Features of a further encoder are added to the trees there are.

A tree too damaged to be used is quarantined: its row in ``trees`` names the reason (``fault``), and
it has no other. No run reads it again unless asked to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import transactions
from pathflip.archive.archive import Archive, vectors
from pathflip.archive.fragments import write_shard
from pathflip.archive.schema import intact_rows, tree_id, trees_table
from pathflip.archive.settings import entries_of
from pathflip.archive.storage import damaged_error, guarded, is_local
from pathflip.errors import ArchiveError
from pathflip.geometry import TREE_NODES, TreeSpec, patch_tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathflip.archive.commit import Committer

TREES, TREE_TEXTS = "trees", "tree_texts"
_FIXED = ("parent_um", "node_px", "seed", "min_tissue")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Patch tree of a slide with the features of its nodes.

    Attributes:
        slide_id: The slide.
        tx: Grid column of the root.
        ty: Grid row of the root.
        mpp: Level-0 µm/px of the slide.
        levels: Levels, 1 to 4.
        node_mask: bool [85]: nodes that were read and have features.
        node_tissue: float32 [85]: share of tissue.
        node_blur: float32 [85]: blur score.
        fault: Reason why the tree is quarantined; it has no node and no features then.
        features: {encoder: float [85, dim]}; masked nodes are stored as zeros.
    """

    slide_id: str
    tx: int
    ty: int
    mpp: float
    levels: int
    node_mask: NDArray[np.bool_]
    node_tissue: NDArray[np.float32]
    node_blur: NDArray[np.float32]
    fault: str | None = None
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def tree_id(self) -> str:
        """Key of the tree."""
        return tree_id(self.slide_id, tx=self.tx, ty=self.ty)


def tree_settings(archive: Archive) -> dict[str, Any] | None:
    """Return {parent_um, node_px, seed, per_slide, min_tissue}; None before the first trees."""
    settings: dict[str, Any] | None = archive.settings().get(TREES)
    return settings


def tree_spec(archive: Archive) -> TreeSpec:
    """Return the sizes of the archive's trees.

    Raises:
        ArchiveError: If it has none (``no_trees``).
    """
    settings = tree_settings(archive)
    if settings is None:
        raise ArchiveError(
            f"The archive {archive.uri} has no patch trees.",
            hint=f"Make them: pathflip trees --archive {archive.uri}",
            code="no_trees",
        )
    return TreeSpec(parent_um=settings["parent_um"], node_px=settings["node_px"])


def tree_encoders(archive: Archive) -> dict[str, dict[str, Any]]:
    """Return {encoder: {dim, revision, mpp, licence, table}} of the encoders trees have."""
    return entries_of(archive.settings(), "tree_encoder")


def tree_encoder(archive: Archive, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return an encoder of the trees and its entry; without a name, the only one.

    Raises:
        ArchiveError: If the trees have no features of it, or the choice is not clear
            (``unknown_encoder``).
    """
    known = tree_encoders(archive)
    if name is None and len(known) == 1:
        name = next(iter(known))
    if name is None or name not in known:
        asked = "no encoder was named" if name is None else f"none of them is {name!r}"
        raise ArchiveError(
            f"The patch trees of {archive.uri} have features of {len(known)} encoders and {asked}.",
            hint=f"Name one of: {', '.join(known)}."
            if known
            else f"Make them: pathflip trees --archive {archive.uri}",
            code="unknown_encoder",
        )
    return name, known[name]


def ensure_trees(
    committer: Committer, spec: TreeSpec, *, seed: int, per_slide: int, min_tissue: float
) -> None:
    """Create the table of trees, or note that more of them are chosen.

    Raises:
        ArchiveError: If the archive's trees were cut or chosen otherwise (``settings``).
    """
    wanted = {
        "parent_um": spec.parent_um,
        "node_px": spec.node_px,
        "seed": seed,
        "per_slide": per_slide,
        "min_tissue": min_tissue,
    }
    made = tree_settings(committer.archive)
    for key in _FIXED if made else ():
        if made and made[key] != wanted[key]:
            raise ArchiveError(
                f"The patch trees of {committer.uri} have {key} {made[key]}, not {wanted[key]}.",
                hint="Leave it out, or use another archive.",
                code="settings",
            )
    if made is None or made["per_slide"] < per_slide:
        committer.add_tables(TREES, wanted)


def ensure_tree_encoder(
    committer: Committer, name: str, *, dim: int, revision: str, mpp: float | None, licence: str
) -> str:
    """Create the table of an encoder's features of trees; return its name.

    Raises:
        ArchiveError: If the archive has it of another revision or size, or for another encoder
            whose name maps to the same table (``settings``).
    """
    entry = {"dim": dim, "revision": revision, "mpp": mpp, "licence": licence}
    entry["table"] = table = trees_table(name)
    known = tree_encoders(committer.archive)
    for other, made in known.items():
        if other != name and made["table"] == table:
            raise ArchiveError(
                f"Encoders {other} and {name} would share the table {table}.",
                hint="Use another archive for one of them.",
                code="settings",
            )
    if name in known:
        for key in ("revision", "dim"):
            if known[name][key] != entry[key]:
                raise ArchiveError(
                    f"The patch trees of {committer.uri} have encoder {name} with {key} "
                    f"{known[name][key]}, not {entry[key]}.",
                    hint="Use the same encoder as before, or another archive.",
                    code="settings",
                )
    else:
        committer.add_tables(f"tree_encoder:{name}", entry)
    return table


def ensure_tree_texts(committer: Committer, *, terms: Sequence[str] | None = None) -> None:
    """Create the table of the nodes' captions, or note other terms of their keywords.

    Args:
        committer: The open writer of the archive.
        terms: Terms of one's own; None leaves those that are stored.
    """
    made = committer.archive.settings().get(TREE_TEXTS)
    if made is None:
        made = {"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    elif terms is None or list(terms) == made.get("terms", []):
        return
    committer.add_tables(TREE_TEXTS, made | {"terms": list(terms or ())})


def write_trees(committer: Committer, trees: Sequence[Tree]) -> None:
    """Write trees with their features; of a tree that is there, features of further encoders.

    Tables must exist: :func:`ensure_trees`, :func:`ensure_tree_encoder`. Rows that are there are
    not written again, so that the call may be repeated.

    Args:
        committer: The open writer of the archive.
        trees: Trees of ready slides.
    """
    archive = committer.archive
    by_encoder = {
        name: [tree for tree in trees if name in tree.features] for name in tree_encoders(archive)
    }
    if unknown := {name for tree in trees for name in tree.features} - set(by_encoder):
        raise ValueError(f"no table of encoder {min(unknown)}")
    tables = {
        trees_table(name): tree_feature_rows(given, name)
        for name, given in by_encoder.items()
        if given
    }
    append_trees(committer, tree_rows(trees, tree_spec(archive)), tables)


def append_trees(committer: Committer, trees: pa.Table, features: Mapping[str, pa.Table]) -> None:
    """Write rows that are not there, features first: a tree is there once ``trees`` says so.

    The row of a quarantined tree is replaced.

    Args:
        committer: The open writer of the archive.
        trees: Rows of :func:`tree_rows`.
        features: {table: rows of :func:`tree_feature_rows`}.
    """
    for table, rows in [*features.items(), (TREES, trees)]:
        there = _keys(committer.archive, table)
        new = rows.filter(pc.invert(_is_in(rows, there)))
        if new.num_rows:
            shard = write_shard(committer.uri, table, new, committer.archive.dataset(table).schema)
            transactions.register(committer.lock, shard.files)
            transactions.append(committer.lock, shard)
        if table == TREES and new.num_rows < rows.num_rows:
            bad = set(there) - set(_keys(committer.archive, TREES, good=True))
            committer.upsert(TREES, rows.filter(_is_in(rows, sorted(bad))))


def delete_strays(committer: Committer) -> int:
    """Delete features of trees that ``trees`` does not name as good ones; return their number."""
    archive, deleted = committer.archive, 0
    trees = set(_keys(archive, TREES, good=True)) if TREES in archive.tables() else set()
    for entry in tree_encoders(archive).values():
        stray = sorted(set(_keys(archive, entry["table"])) - trees)
        deleted += transactions.delete_rows(committer.lock, entry["table"], "tree_id", stray)
    return deleted


def tree_rows(trees: Sequence[Tree], spec: TreeSpec) -> pa.Table:
    """Return rows of the table ``trees``."""
    rects = [patch_tree(t.tx, t.ty, mpp=t.mpp, levels=1, spec=spec).rects[0, 0] for t in trees]
    return pa.table(
        {
            "tree_id": pa.array([tree.tree_id for tree in trees], pa.string()),
            "slide_id": pa.array([tree.slide_id for tree in trees], pa.string()),
            "tx": pa.array([tree.tx for tree in trees], pa.int32()),
            "ty": pa.array([tree.ty for tree in trees], pa.int32()),
            "x0": pa.array([int(rect[0]) for rect in rects], pa.int64()),
            "y0": pa.array([int(rect[1]) for rect in rects], pa.int64()),
            "size0": pa.array([round(spec.parent_um / tree.mpp) for tree in trees], pa.int32()),
            "mpp": pa.array([tree.mpp for tree in trees], pa.float64()),
            "levels": pa.array([tree.levels for tree in trees], pa.int32()),
            "fault": pa.array([tree.fault for tree in trees], pa.string()),
            "node_mask": _fixed([tree.node_mask for tree in trees], np.uint8, TREE_NODES),
            "node_tissue": _fixed([tree.node_tissue for tree in trees], np.float32, TREE_NODES),
            "node_blur": _fixed([tree.node_blur for tree in trees], np.float32, TREE_NODES),
        }
    )


def tree_feature_rows(trees: Sequence[Tree], encoder: str) -> pa.Table:
    """Return rows of the table ``trees_<encoder>``; masked nodes are zeros."""
    features = [np.where(t.node_mask[:, None], t.features[encoder], 0).ravel() for t in trees]
    return pa.table(
        {
            "tree_id": pa.array([tree.tree_id for tree in trees], pa.string()),
            "slide_id": pa.array([tree.slide_id for tree in trees], pa.string()),
            "features": _fixed(features, np.float16, len(features[0])),
        }
    )


def read_trees(
    archive: Archive,
    *,
    columns: Collection[str] | None = None,
    encoder: str | None = None,
    quarantined: bool = False,
) -> pa.Table:
    """Return the good trees of ready slides, sorted by ``tree_id``; empty if there are none.

    Args:
        archive: The archive.
        columns: Columns of ``trees``; by default all but the checksum.
        encoder: Only trees that have features of this encoder, with a column ``row``: where they
            are in its table, for :func:`take_features`.
        quarantined: The quarantined trees instead, whose column ``fault`` says why.
    """
    from pathflip.archive.schema import CHECKSUM, trees_schema

    names = [name for name in trees_schema().names if name != CHECKSUM]
    wanted = list(columns or names)
    if TREES not in archive.tables():
        return trees_schema().empty_table().select(wanted)
    with guarded(archive.uri, f"read the table {TREES}", damaged=is_local(archive.uri)):
        good = pc.field("fault").is_null()
        rows = archive.dataset(TREES).to_table(
            columns=list(dict.fromkeys([*wanted, "tree_id", "slide_id"])),
            filter=~good if quarantined else good,
        )
    ready = pa.array(sorted(archive.ready_ids()), pa.string())
    rows = rows.filter(pc.is_in(rows["slide_id"], ready)).sort_by("tree_id")
    if encoder is None:
        return rows.select(wanted)
    _, entry = tree_encoder(archive, encoder)
    keys = pa.array(_keys(archive, entry["table"]), pa.string())
    at = pc.index_in(rows["tree_id"], keys)
    rows = rows.select(wanted).append_column("row", at.cast(pa.int64()))
    return rows.filter(at.is_valid())


def take_features(
    archive: Archive, rows: Sequence[int] | NDArray[np.int64], *, encoder: str | None = None
) -> NDArray[np.float16]:
    """Return features by row number of an encoder's table, checked as they are read.

    Args:
        archive: The archive.
        rows: Column ``row`` of :func:`read_trees`, in any order.
        encoder: The encoder; may be left out when trees have one.

    Returns:
        float16 [n, 85, dim], zero where a node is masked.

    Raises:
        ArchiveError: If rows are not what was written (``damaged``).
    """
    _, entry = tree_encoder(archive, encoder)
    table, dim = entry["table"], int(entry["dim"])
    places = np.asarray(rows, np.int64)
    features = np.zeros((len(places), TREE_NODES, dim), np.float16)
    if not len(places):
        return features
    order = np.argsort(places)
    with guarded(archive.uri, f"read the table {table}", damaged=True):
        taken = archive.dataset(table).take(places[order])
    read = vectors(taken["features"]).reshape(features.shape)
    if not intact_rows(taken).all() or not np.isfinite(read).all():
        raise damaged_error(archive.uri, f"rows of {table} are not what was written")
    features[order] = read
    return features


def _keys(archive: Archive, table: str, *, good: bool = False) -> list[str]:
    """Return the keys of a table, or of its good trees, in the order of its rows."""
    where = pc.field("fault").is_null() if good else None
    with guarded(archive.uri, f"read the table {table}", damaged=is_local(archive.uri)):
        rows = archive.dataset(table).to_table(columns=["tree_id"], filter=where)
    keys: list[str] = rows["tree_id"].to_pylist()
    return keys


def _is_in(rows: pa.Table, trees: Sequence[str]) -> pa.Array:
    return pc.is_in(rows["tree_id"], pa.array(trees, pa.string()))


def _fixed(rows: Sequence[Any], kind: Any, width: int) -> pa.Array:
    """Return arrays [n, width] as a column of fixed-size lists."""
    values = np.asarray(rows, kind).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
