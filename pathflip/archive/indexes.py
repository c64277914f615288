"""Indexes for search: vectors, columns that filters name, words of captions.

Search works without them by reading everything. Rows written since an index was last updated are
searched without it, so results never lag behind.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pathflip.archive.ann import partitions_of
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.recall import MIN_RECALL, index_recall
from pathflip.archive.storage import guarded
from pathflip.archive.tables import spec_of

logger = logging.getLogger(__name__)

VECTOR_INDEX_ROWS = 50_000
"""Rows from which an embeddings table gets a vector index; below that, a scan is fast."""

SCALAR_INDEX_ROWS = 10_000

BITS = 5
"""Bits of a number in the vector index: ten nearest are among sixteen candidates; of three bits one
in a hundred is not, and eight cost twice the time to make (docs/notes/performance.md)."""

_MEASURED = "pathflip.vector_index"
"""Key in a table's configuration: segments of the vector index whose recall was measured."""

RECALL = "pathflip.vector_index_recall"
"""Key in a table's configuration: recall of the vector index when it was last changed."""

Build = Callable[[Any, int], None]
"""Makes the vector index of a Lance dataset of so many rows."""

_MAX_SEGMENTS = 4
"""Rebuild the vector index at this many segments: every query reads all of them, and fragments of
different segments are not merged."""

_SCALAR = {"slide_id": "BTREE", "kind": "BITMAP"}
"""Without an index on ``kind``, every query would read that column of all rows."""


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """Result of :func:`refresh_indexes`.

    Attributes:
        made: Indexes built, as ``table.column``.
        refused: {``table.column``: recall} of vector indexes that lose too many of the nearest rows
            to be used; see :data:`pathflip.archive.recall.MIN_RECALL`.
    """

    made: list[str] = field(default_factory=list)
    refused: dict[str, float] = field(default_factory=dict)


def refresh_indexes(lock: ArchiveLock, table: str, *, build: Build | None = None) -> Refreshed:
    """Build the indexes a table is large enough for and updates those it has.

    A vector index is measured whenever this changed it. One that finds too few of the nearest rows
    is built again; a new one that does is taken back, for that before it if it was good, else
    searches compare every row.

    Args:
        lock: The archive's lock, which the caller holds.
        table: The table.
        build: Builds the vector index where that is due; None means this process.
    """
    done = Refreshed()
    spec = spec_of(table)
    if spec is None or not spec.per_slide:
        return done
    with guarded(lock.uri, f"index the table {table}"):
        dataset = lock.open(table)
        rows = dataset.count_rows()
        have = indexed_columns(dataset)
        segments = len(_segment_ids(dataset))
        if have:
            dataset.optimize.optimize_indices()
        if rows >= SCALAR_INDEX_ROWS:
            for column, kind in _SCALAR.items():
                if column in dataset.schema.names and column not in have:
                    dataset.create_scalar_index(column, kind)
                    done.made.append(f"{table}.{column}")
        for column, kind in spec.indexes.items():
            if kind != "VECTOR" and rows and column not in have:
                dataset.create_scalar_index(column, kind)
                done.made.append(f"{table}.{column}")
        if "vector" in have or ("vector" in spec.indexes and rows >= VECTOR_INDEX_ROWS):
            _refresh_vectors(
                lock,
                table,
                rebuild="vector" not in have or segments >= _MAX_SEGMENTS,
                build=build or _index_vectors,
                done=done,
            )
    return done


def indexes_due(dataset: Any, table: str) -> bool:
    """Return whether :func:`refresh_indexes` would find something to do, without reading rows.

    A vector index that was refused is not due: the next rows, or ``archive maintain``, try again.
    """
    spec = spec_of(table)
    if spec is None or not spec.per_slide:
        return False
    rows = dataset.count_rows()
    found = dataset.describe_indices()
    if any(index.num_rows_indexed < rows for index in found):
        return True
    have = {column for index in found for column in index.field_names}
    wanted = {column for column, kind in spec.indexes.items() if kind != "VECTOR" and rows}
    if rows >= SCALAR_INDEX_ROWS:
        wanted |= {column for column in _SCALAR if column in dataset.schema.names}
    if "vector" in spec.indexes and rows >= VECTOR_INDEX_ROWS and "vector" not in have:
        return _measured(dataset) is None
    return not wanted <= have


def _refresh_vectors(
    lock: ArchiveLock, table: str, *, rebuild: bool, build: Build, done: Refreshed
) -> None:
    """Measure the vector index a table has, and build another where that is due or better."""
    dataset, name = lock.open(table), f"{table}.vector"
    segments = _segment_ids(dataset)
    if segments and not rebuild and _measured(dataset) == segments:
        return
    before = index_recall(dataset) if segments else 0.0
    if before >= MIN_RECALL and not rebuild:
        _note_measured(lock.open(table), before)
        return
    version = dataset.version
    build(dataset, dataset.count_rows())
    recall = index_recall(dataset)
    if recall >= MIN_RECALL:
        done.made.append(name)
        _note_measured(lock.open(table), recall)
        return
    # Between the two commits a search may have met it: for seconds, and with fewer of the nearest.
    done.refused[name] = recall
    kept = before >= MIN_RECALL and not lock.leased
    if not lock.leased:  # nothing would stop it where the lease was lost meanwhile
        dataset.checkout_version(version).restore()
    if not kept:
        _drop_vector_index(lock.open(table))
    _note_measured(lock.open(table), before if kept else None)
    logger.warning(
        "A new vector index of %s in %s finds %.0f %% of the nearest rows, fewer than %.0f %%, and "
        "is not used: %s.",
        table, lock.uri, 100 * recall, 100 * MIN_RECALL,
        "the one before it is kept" if kept else "searches compare every row",
    )  # fmt: skip


def indexed_columns(dataset: Any) -> set[str]:
    """Return the columns of a table that have an index."""
    return {column for index in dataset.describe_indices() for column in index.field_names}


def _segment_ids(dataset: Any) -> list[str]:
    """Return the ids of the segments of the vector index; every change of one gives it another."""
    return sorted(
        str(segment.uuid)
        for index in dataset.describe_indices()
        if "vector" in index.field_names
        for segment in index.segments
    )


def _measured(dataset: Any) -> list[str] | None:
    """Return the segments that were measured last; None if none were, [] if none was good."""
    noted = dataset.config().get(_MEASURED)
    return None if noted is None else list(json.loads(noted))


def _note_measured(dataset: Any, recall: float | None) -> None:
    found = "" if recall is None else f"{recall:.4f}"
    dataset.update_config({_MEASURED: json.dumps(_segment_ids(dataset)), RECALL: found})


def noted_recall(dataset: Any) -> float | None:
    """Return the recall of a table's vector index when it was last changed, None without one."""
    noted = dataset.config().get(RECALL)
    return float(noted) if noted else None


def vector_index(dataset: Any, rows: int) -> dict[str, Any]:
    """Return the arguments of Lance that say which vector index a table of so many rows gets."""
    kind: dict[str, Any] = {"metric": "cosine", "num_partitions": partitions_of(rows)}
    # RQ packs bits by bytes; without it, full vectors in partitions.
    if dataset.schema.field("vector").type.list_size % 8:
        return kind | {"index_type": "IVF_FLAT"}
    return kind | {"index_type": "IVF_RQ", "num_bits": BITS}


def _index_vectors(dataset: Any, rows: int) -> None:
    dataset.create_index("vector", replace=True, **vector_index(dataset, rows))


def _drop_vector_index(dataset: Any) -> None:
    for index in dataset.describe_indices():
        if "vector" in index.field_names:
            dataset.drop_index(index.name)
