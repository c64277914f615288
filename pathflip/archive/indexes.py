"""The indexes that make search fast: vectors, the columns filters name, the words of captions.

None of them is needed for an answer: without, search reads everything. Rows written since an index
was brought up to date are searched without it, so results never lag behind.
"""

from __future__ import annotations

import math
from typing import Any

from pathflip.archive.storage import guarded, open_table
from pathflip.archive.tables import spec_of

VECTOR_INDEX_ROWS = 50_000
"""Embeddings from which on they get a vector index; below, a scan is fast."""

SCALAR_INDEX_ROWS = 10_000

_PIECES = 4
"""A vector index of so many pieces is made anew: every query asks all of them, and the fragments of
different pieces are not merged."""

_SCALAR = {"slide_id": "BTREE", "kind": "BITMAP", "patient_id": "BTREE"}
"""Without one on ``kind``, every query would read that column of all rows."""


def refresh_indexes(uri: str, table: str) -> list[str]:
    """Makes the indexes a table is large enough for and brings those it has up to date.

    Only for the process that holds the archive's lock.

    Returns:
        Those made now, as ``table.column``.
    """
    spec = spec_of(table)
    if spec is None or not spec.per_slide:
        return []
    with guarded(uri, f"index the table {table}"):
        dataset = open_table(uri, table)
        rows = dataset.count_rows()
        have = indexed_columns(dataset)
        made: list[str] = []
        pieces = _pieces(dataset)
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
        if (wanted and "vector" not in have) or pieces >= _PIECES:
            _index_vectors(dataset, rows)
            made.append(f"{table}.vector")
    return made


def indexed_columns(dataset: Any) -> set[str]:
    """Returns the columns of a table that have an index."""
    return {column for index in dataset.describe_indices() for column in index.field_names}


def _pieces(dataset: Any) -> int:
    """Returns of how many pieces the vector index is: bringing it up to date adds one."""
    indexes = dataset.describe_indices()
    return max((len(i.segments) for i in indexes if "vector" in i.field_names), default=0)


def partitions_of(rows: int) -> int:
    """Returns into how many partitions the vectors of a table of that size are divided."""
    return max(16, min(4096, math.isqrt(rows) // 4))


def _index_vectors(dataset: Any, rows: int) -> None:
    # RQ packs bits by bytes; without it, full vectors in partitions.
    width = dataset.schema.field("vector").type.list_size
    kind = "IVF_FLAT" if width % 8 else "IVF_RQ"
    dataset.create_index(
        "vector", kind, metric="cosine", num_partitions=partitions_of(rows), replace=True
    )
