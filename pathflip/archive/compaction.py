"""Merges small fragments of an archive's tables and frees what nobody reads any more.

A fragment of :data:`FRAGMENT_BYTES` or more is never written again, so the bytes that an archive
writes while it grows are in proportion to what it holds. What a merge replaces stays for a day, for
readers of older states. So while an ingest goes on, only tables with many small fragments are
merged, and as long as what is left behind is less than :data:`ALLOWED` of what the archive holds.
A merge then has to make a fragment at least twice as large as any of its parts: a row is written
again as often as its fragment doubles before it has that size, and no oftener.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pathflip.archive import transactions
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.storage import (
    data_paths,
    digest_file,
    filesystem,
    guarded,
    is_local,
    open_table,
    own_digests,
    rows_per_batch,
)
from pathflip.archive.tables import FILES

if TYPE_CHECKING:
    from lance.optimize import CompactionOptions

FRAGMENT_BYTES = 16 << 20
"""Bytes of a fragment's files from which on it stays as it is."""
KEEP_HOURS = 24
"""Hours for which replaced versions are kept: readers keep their snapshot, fences their effect."""
ALLOWED = 0.2
"""Bytes that merges may leave behind during an ingest, as a share of those of the archive."""
_LITTLE = 64 << 20
"""Bytes that merges may leave behind in any archive."""
_MANY, _TOO_MANY = 128, 1024
"""Small fragments of a table from which on they are merged, and merged whatever that takes: each
commit writes the list of all fragments."""
_TIERS = (256, 16, 1)
"""Sizes below which fragments are merged, as parts of ``FRAGMENT_BYTES``, smallest first."""
_ROW_BYTES = 64
"""Least bytes of a row, where a table is too small to tell."""


def merge_all(lock: ArchiveLock, tables: Sequence[str]) -> dict[str, int]:
    """Merge all small fragments, and rewrite those of which a tenth of the rows is deleted.

    Args:
        lock: The archive's lock, which the caller holds.
        tables: The tables, ``files`` last: the others have their new files registered there.

    Returns:
        {table: fragments now}.
    """
    for table in tables:
        _merge(lock, table, tiers=_TIERS[-1:], chosen=lambda rows, size: True)
    return {table: len(open_table(lock.uri, table).get_fragments()) for table in tables}


def merge_some(lock: ArchiveLock, tables: Sequence[str]) -> None:
    """Merge what is due while an archive is being written.

    Args:
        lock: The archive's lock, which the caller holds.
        tables: The tables, ``files`` last.
    """
    small = {table: _small_fragments(lock.open(table)) for table in tables}
    due = [table for table in tables if small[table] >= _MANY]
    if not due:
        return
    held, left = _bytes_of(lock, tables)
    for table in due:
        forced = small[table] >= _TOO_MANY

        def affordable(rows: list[int], size: float, forced: bool = forced) -> bool:
            nonlocal left
            if len(rows) < 2 or sum(rows) < 2 * max(rows):
                return False
            if not forced and left + size > max(_LITTLE, ALLOWED * held):
                return False
            left += size
            return True

        _merge(lock, table, tiers=_TIERS, chosen=affordable)


def _merge(
    lock: ArchiveLock,
    table: str,
    *,
    tiers: Sequence[int],
    chosen: Callable[[list[int], float], bool],
) -> None:
    """Merge small fragments of a table and digest the new files.

    Args:
        lock: The archive's lock.
        table: The table.
        tiers: Sizes below which fragments are merged, one after another.
        chosen: Function of rows of the fragments of a merge, and of their bytes.
    """
    uri, dataset = lock.uri, lock.open(table)
    rows, before = dataset.count_rows(), set(data_paths(dataset, table))
    changed = False
    for tier in tiers:
        with guarded(uri, f"compact the table {table}"):
            done = merge_below(dataset, FRAGMENT_BYTES // tier, chosen)
        if done:
            changed, dataset = True, lock.open(table)
    if not changed:
        return
    transactions.check_count(uri, table, dataset.count_rows(), rows)
    now = set(data_paths(dataset, table))
    with guarded(uri, "read new files", damaged=is_local(uri)):
        made = {path: digest_file(uri, path) for path in sorted(now - before)}
    if table == FILES:
        transactions.note_own_digests(lock, made)
        # Older versions do without: the row of every file has a checksum of its own.
        transactions.forget_own_digests(lock, set(own_digests(dataset.config())) - now)
    else:
        transactions.register(lock, made)


def merge_below(dataset: Any, size: int, chosen: Callable[[list[int], float], bool]) -> bool:
    """Merge the fragments of a table that are smaller than a size in bytes."""
    from lance.optimize import Compaction

    row_bytes = _row_bytes(dataset)
    tasks = []
    for task in Compaction.plan(dataset, _options(dataset, size, row_bytes)).tasks:
        rows = [item.physical_rows for item in task.fragments]
        if chosen(rows, row_bytes * sum(rows)):
            tasks.append(task)
    if tasks:
        Compaction.commit(dataset, [task.execute(dataset) for task in tasks])
    return bool(tasks)


def _options(dataset: Any, size: int, row_bytes: float) -> CompactionOptions:
    """Options for a merge of the fragments of a table that are smaller than a size in bytes."""
    return {
        "target_rows_per_fragment": max(1, int(size / row_bytes)),
        "batch_size": rows_per_batch(dataset.schema),
        "num_threads": 1,
    }


def _small_fragments(dataset: Any) -> int:
    target = FRAGMENT_BYTES / _row_bytes(dataset)
    return sum(fragment.physical_rows < target for fragment in dataset.get_fragments())


def _row_bytes(dataset: Any) -> float:
    """Return the mean bytes of a row in a table's files."""
    size = count = 0
    for fragment in dataset.get_fragments():
        parts = [file.file_size_bytes for file in fragment.metadata.files]
        if all(parts):
            size, count = size + sum(parts), count + fragment.physical_rows
    return max(_ROW_BYTES, size / count) if count else _ROW_BYTES


def _bytes_of(lock: ArchiveLock, tables: Sequence[str]) -> tuple[float, float]:
    """Return the bytes of the newest versions' data files, and of all others that are there."""
    held = there = 0.0
    for table in tables:
        dataset = lock.open(table)
        rows = sum(fragment.physical_rows for fragment in dataset.get_fragments())
        held += _row_bytes(dataset) * rows
        for batch in dataset.all_files():
            files = zip(batch["path"].to_pylist(), batch["size_bytes"].to_pylist(), strict=True)
            there += sum(size for path, size in files if path.startswith("data/"))
    return held, max(0.0, there - held)


def day_ago() -> datetime:
    """Return the time until which what nobody reads any more is kept."""
    return datetime.now(UTC) - timedelta(hours=KEEP_HOURS)


def free_versions(lock: ArchiveLock, tables: Sequence[str], *, before: datetime) -> int:
    """Delete the versions that were the newest no longer at a time: who read one began earlier.

    A version's own age says nothing: one that was the newest for a week has readers until the next
    commit. Writes no rows, so that it works where the disk is full.

    Returns:
        Bytes removed.
    """
    removed = 0
    for table in tables:
        with guarded(lock.uri, f"clean the table {table}"):
            dataset = lock.open(table)
            if done := _replaced(dataset, before):
                removed += dataset.cleanup_old_versions(versions=done).bytes_removed
    return removed


def _replaced(dataset: Any, before: datetime) -> list[int]:
    """Return the versions that another one had replaced at a time."""
    made = [(int(one["version"]), one["timestamp"].astimezone(UTC)) for one in dataset.versions()]
    made.sort()
    return [version for (version, _), (_, then) in pairwise(made) if then < before]


def free_files(lock: ArchiveLock, tables: Sequence[str], *, before: datetime) -> int:
    """Delete data files that no version refers to and that were written before a time.

    Not while a job writes: it may be about to commit files that it wrote before it was suspended.

    Returns:
        Bytes removed.
    """
    removed = 0
    system, root = filesystem(lock.uri)
    for table in tables:
        with guarded(lock.uri, f"clean the table {table}"):
            for path, size in _orphans(lock.open(table), before):
                system.delete_file(f"{root}/{table}.lance/{path}")
                removed += size
    return removed


def _orphans(dataset: Any, before: datetime) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of each data file of a table that :func:`free_files` deletes."""
    named = {path for batch in dataset.tracked_files() for path in batch["path"].to_pylist()}
    for batch in dataset.all_files():
        for row in batch.to_pylist():
            path = row["path"]
            if path.startswith("data/") and path not in named and row["last_modified"] < before:
                yield path, row["size_bytes"]


def due(uri: str, tables: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Say what :func:`merge_all`, :func:`free_versions` and :func:`free_files` would find to do.

    Args:
        uri: The archive.
        tables: {table: its ``lance.LanceDataset``}.

    Returns:
        Of the tables with any of it: {"fragments": {table: fragments that would be merged or
        rewritten}, "versions": {table: versions that would be deleted}, "unused_bytes": {table:
        bytes of files of no version that would be deleted}}.
    """
    from lance.optimize import Compaction

    before = day_ago()
    found: dict[str, dict[str, int]] = {"fragments": {}, "versions": {}, "unused_bytes": {}}
    for table, dataset in tables.items():
        with guarded(uri, f"look at the table {table}"):
            options = _options(dataset, FRAGMENT_BYTES, _row_bytes(dataset))
            tasks = Compaction.plan(dataset, options).tasks
            found["fragments"][table] = sum(len(task.fragments) for task in tasks)
            found["versions"][table] = len(_replaced(dataset, before))
            found["unused_bytes"][table] = sum(size for _, size in _orphans(dataset, before))
    return {key: {name: n for name, n in of.items() if n} for key, of in found.items()}
