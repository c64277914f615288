"""Maintenance of an archive: compaction, indexes, cleaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathflip.archive.annotation_table import maintain_annotations
from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.compaction import day_ago, due, free_files, free_versions
from pathflip.archive.indexes import indexes_due, refresh_indexes
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.settings import open_meta
from pathflip.archive.storage import filesystem, known_digests, normalise
from pathflip.archive.tables import META


def maintain(uri: str | Path) -> dict[str, Any]:
    """Compact, index and clean an archive.

    Deletes versions that were replaced more than 24 hours ago, and files of that age that no
    version refers to: first of all, so that a full disk has room again. Readers keep their snapshot
    for that long. Then merges small fragments and builds or updates the indexes of
    :mod:`pathflip.archive.indexes`. Annotations may be saved meanwhile.

    Returns:
        {"fragments": {table: n}, "indexed": [table.column], "refused": {table.column: recall},
        "bytes_removed": n}; see :class:`pathflip.archive.indexes.Refreshed`.

    Raises:
        ArchiveError: If the archive is being written (``locked``), missing or damaged.
    """
    where = normalise(uri)
    tables = [META, *Archive(where).tables()]
    with ArchiveLock(where) as lock:  # a committer may have to write before it can go on
        # First: a process suspended after it would take for old what others have written meanwhile.
        before = day_ago()
        removed = free_versions(lock, tables, before=before)
        removed += free_files(lock, tables, before=before)
    with Committer(where) as committer:
        fragments = committer.compact()
        indexed: list[str] = []
        refused: dict[str, float] = {}
        for table in committer.archive.tables():
            refreshed = refresh_indexes(committer.lock, table)
            indexed += refreshed.made
            refused |= refreshed.refused
        fragments |= maintain_annotations(committer.lock)
        system, root = filesystem(where)
        known = known_digests(where)
        infos = system.get_file_info([f"{root}/{path}" for path in known])
        gone = [path for path, info in zip(known, infos, strict=True) if info.size is None]
        committer.forget_files(gone)
    return {
        "fragments": fragments, "indexed": indexed, "refused": refused, "bytes_removed": removed,
    }  # fmt: skip


def plan_maintenance(uri: str | Path) -> dict[str, Any]:
    """Say what :func:`maintain` would find to do, annotations left out; write nothing.

    Returns:
        The counts of :func:`pathflip.archive.compaction.due`, and {"indexes": [table whose indexes
        would be made or updated]}.

    Raises:
        ArchiveError: If the archive is missing or damaged.
    """
    archive = Archive(uri)
    tables = {table: archive.dataset(table) for table in archive.tables()}
    indexes = [table for table, dataset in tables.items() if indexes_due(dataset, table)]
    return {**due(archive.uri, {META: open_meta(archive.uri), **tables}), "indexes": indexes}
