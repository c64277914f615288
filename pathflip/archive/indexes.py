"""Indexes for search: vectors, columns that filters name, words of captions.

Search works without them by reading everything. Rows written since an index was last updated are
searched without it, so results never lag behind.
"""

from __future__ import annotations

import logging
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

_MAX_SEGMENTS = 4
"""Rebuild the vector index at this many segments: every query reads all of them, and fragments of
different segments are not merged."""

_SCALAR = {"slide_id": "BTREE", "kind": "BITMAP", "patient_id": "BTREE"}
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


def refresh_indexes(lock: ArchiveLock, table: str) -> Refreshed:
    """Build the indexes a table is large enough for and updates those it has.

    A vector index is measured after each of these. One that finds too few of the nearest rows is
    built again; a new one that does is taken back, for that before it if it was good, else searches
    compare every row.

    Args:
        lock: The archive's lock, which the caller holds.
        table: The table.
    """
    done = Refreshed()
    spec = spec_of(table)
    if spec is None or not spec.per_slide:
        return done
    with guarded(lock.uri, f"index the table {table}"):
        dataset = lock.open(table)
        rows = dataset.count_rows()
        have = indexed_columns(dataset)
        segments = _segments(dataset)
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
            _refresh_vectors(lock, table, rebuild="vector" not in have or segments >= _MAX_SEGMENTS,
                             done=done)  # fmt: skip
    return done


def _refresh_vectors(lock: ArchiveLock, table: str, *, rebuild: bool, done: Refreshed) -> None:
    """Measure the vector index a table has, and build another where that is due or better."""
    dataset, name = lock.open(table), f"{table}.vector"
    before = index_recall(dataset) if _segments(dataset) else 0.0
    if before >= MIN_RECALL and not rebuild:
        return
    version = dataset.version
    _index_vectors(dataset, dataset.count_rows())
    recall = index_recall(dataset)
    if recall >= MIN_RECALL:
        done.made.append(name)
        return
    # Between the two commits a search may have met it: for seconds, and with fewer of the nearest.
    done.refused[name] = recall
    kept = before >= MIN_RECALL and not lock.leased
    if not lock.leased:  # nothing would stop it where the lease was lost meanwhile
        dataset.checkout_version(version).restore()
    if not kept:
        _drop_vector_index(lock.open(table))
    logger.warning(
        "A new vector index of %s in %s finds %.0f %% of the nearest rows, fewer than %.0f %%, and "
        "is not used: %s.",
        table, lock.uri, 100 * recall, 100 * MIN_RECALL,
        "the one before it is kept" if kept else "searches compare every row",
    )  # fmt: skip


def indexed_columns(dataset: Any) -> set[str]:
    """Return the columns of a table that have an index."""
    return {column for index in dataset.describe_indices() for column in index.field_names}


def _segments(dataset: Any) -> int:
    """Return the number of segments of the vector index; every update adds one."""
    indexes = dataset.describe_indices()
    return max((len(i.segments) for i in indexes if "vector" in i.field_names), default=0)


def _index_vectors(dataset: Any, rows: int) -> None:
    # RQ packs bits by bytes; without it, full vectors in partitions.
    width = dataset.schema.field("vector").type.list_size
    kind: dict[str, Any] = {"index_type": "IVF_FLAT"}
    if width % 8 == 0:
        kind = {"index_type": "IVF_RQ", "num_bits": BITS}
    dataset.create_index(
        "vector", metric="cosine", num_partitions=partitions_of(rows), replace=True, **kind
    )


def _drop_vector_index(dataset: Any) -> None:
    for index in dataset.describe_indices():
        if "vector" in index.field_names:
            dataset.drop_index(index.name)
