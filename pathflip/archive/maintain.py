"""Maintenance of an archive: compaction, indexes, cleaning."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.storage import filesystem, guarded, known_digests, normalise

KEEP_HOURS = 24


def maintain(uri: str | Path) -> dict[str, Any]:
    """Compact, index and clean an archive.

    Merges small fragments, builds or updates the indexes of :mod:`pathflip.archive.indexes`, and
    deletes versions, and files that no version refers to, that are older than 24 hours. Readers
    keep their snapshot for that long.

    Returns:
        {"fragments": {table: n}, "indexed": [table.column], "refused": {table.column: recall},
        "bytes_removed": n}; see :class:`pathflip.archive.indexes.Refreshed`.

    Raises:
        ArchiveError: If the archive is being written (``locked``), missing or damaged.
    """
    where = normalise(uri)
    with Committer(where) as committer:
        fragments = committer.compact()
        indexed: list[str] = []
        refused: dict[str, float] = {}
        for table in committer.archive.tables():
            refreshed = refresh_indexes(committer.lock, table)
            indexed += refreshed.made
            refused |= refreshed.refused
        removed = 0
        for table in fragments:
            with guarded(where, f"clean the table {table}"):
                dataset = committer.lock.open(table)
                keep = timedelta(hours=KEEP_HOURS)
                removed += dataset.cleanup_old_versions(older_than=keep).bytes_removed
                removed += _remove_orphans(committer.lock, table)
        system, root = filesystem(where)
        known = known_digests(where)
        infos = system.get_file_info([f"{root}/{path}" for path in known])
        gone = [path for path, info in zip(known, infos, strict=True) if info.size is None]
        committer.forget_files(gone)
    return {
        "fragments": fragments, "indexed": indexed, "refused": refused, "bytes_removed": removed,
    }  # fmt: skip


def _remove_orphans(lock: ArchiveLock, table: str) -> int:
    """Remove data files that no version refers to and that are older than a day."""
    # First: a process suspended after it would take for old what others have written meanwhile.
    before = datetime.now(UTC) - timedelta(hours=KEEP_HOURS)
    dataset = lock.open(table)
    named = {path for batch in dataset.tracked_files() for path in batch["path"].to_pylist()}
    system, root = filesystem(lock.uri)
    removed = 0
    for batch in dataset.all_files():
        for row in batch.to_pylist():
            path = row["path"]
            if path.startswith("data/") and path not in named and row["last_modified"] < before:
                system.delete_file(f"{root}/{table}.lance/{path}")
                removed += row["size_bytes"]
    return removed
