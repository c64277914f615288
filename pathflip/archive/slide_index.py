"""Index of slide ids on each large table: finds a slide's rows without reading all ids."""

from __future__ import annotations

from typing import Any

from pathflip.archive.lock import ArchiveLock
from pathflip.archive.storage import guarded

COLUMN = "slide_id"
SLIDE_INDEX_ROWS = 10_000
"""Rows from which on a table has the index; below that, a scan is fast."""
_UNINDEXED = 0.1
"""Share of rows without an entry from which on the index is updated, all of it: so updating costs
in proportion to what is written."""


def index_slide_ids(lock: ArchiveLock, table: str) -> bool:
    """Build or update the index of slide ids of a table where that is due.

    Args:
        lock: The archive's lock, which the caller holds.
        table: The table; it has a column ``slide_id``.

    Returns:
        Whether the index was built or updated.
    """
    with guarded(lock.uri, f"index the table {table}"):
        dataset = lock.open(table)
        rows = dataset.count_rows()
        if rows < SLIDE_INDEX_ROWS:
            return False
        name = _index_name(dataset)
        if name is None:
            dataset.create_scalar_index(COLUMN, "BTREE")
            return True
        missing = dataset.stats.index_stats(name)["num_unindexed_rows"]
        if missing < _UNINDEXED * rows:
            return False
        dataset.optimize.optimize_indices(index_names=[name])
        return True


def _index_name(dataset: Any) -> str | None:
    names = (index.name for index in dataset.describe_indices() if index.field_names == [COLUMN])
    return next(names, None)
