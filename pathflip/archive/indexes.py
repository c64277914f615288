"""Indexes for search: vectors, columns that filters name, words of captions.

Search works without them by reading everything. Rows written since an index was last updated are
searched without it, so results never lag behind.
"""

from __future__ import annotations

import math
from typing import Any

from pathflip.archive.storage import guarded, open_table
from pathflip.archive.tables import spec_of

VECTOR_INDEX_ROWS = 50_000
"""Rows from which an embeddings table gets a vector index; below that, a scan is fast."""

SCALAR_INDEX_ROWS = 10_000

_MAX_SEGMENTS = 4
"""Rebuild the vector index at this many segments: every query reads all of them, and fragments of
different segments are not merged."""

_SCALAR = {"slide_id": "BTREE", "kind": "BITMAP", "patient_id": "BTREE"}
"""Without an index on ``kind``, every query would read that column of all rows."""


def refresh_indexes(uri: str, table: str) -> list[str]:
    """Build the indexes a table is large enough for and updates those it has.

    Only for the process that holds the archive's lock.

    Returns:
        The indexes built now, as ``table.column``.
    """
    spec = spec_of(table)
    if spec is None or not spec.per_slide:
        return []
    with guarded(uri, f"index the table {table}"):
        dataset = open_table(uri, table)
        rows = dataset.count_rows()
        have = indexed_columns(dataset)
        made: list[str] = []
        segments = _segments(dataset)
        if have:
            dataset.optimize.optimize_indices()
        if rows >= SCALAR_INDEX_ROWS:
            for column, kind in _SCALAR.items():
                if column in dataset.schema.names and column not in have:
                    dataset.create_scalar_index(column, kind)
                    made.append(f"{table}.{column}")
        for column, kind in spec.indexes.items():
            if kind != "VECTOR" and rows and column not in have:
                dataset.create_scalar_index(column, kind)
                made.append(f"{table}.{column}")
        wanted = "vector" in spec.indexes and rows >= VECTOR_INDEX_ROWS
        if (wanted and "vector" not in have) or segments >= _MAX_SEGMENTS:
            _index_vectors(dataset, rows)
            made.append(f"{table}.vector")
    return made


def indexed_columns(dataset: Any) -> set[str]:
    """Return the columns of a table that have an index."""
    return {column for index in dataset.describe_indices() for column in index.field_names}


def _segments(dataset: Any) -> int:
    """Return the number of segments of the vector index; every update adds one."""
    indexes = dataset.describe_indices()
    return max((len(i.segments) for i in indexes if "vector" in i.field_names), default=0)


def partitions_of(rows: int) -> int:
    """Return the number of partitions of a vector index over so many rows."""
    return max(16, min(4096, math.isqrt(rows) // 4))


def _index_vectors(dataset: Any, rows: int) -> None:
    # RQ packs bits by bytes; without it, full vectors in partitions.
    width = dataset.schema.field("vector").type.list_size
    kind = "IVF_FLAT" if width % 8 else "IVF_RQ"
    dataset.create_index(
        "vector", kind, metric="cosine", num_partitions=partitions_of(rows), replace=True
    )
