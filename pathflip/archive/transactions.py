"""Commits to one table, with digests of the new files before and row counts checked after.

Each takes the archive's lock, which the caller holds, and commits to a version that it opened; see
:meth:`pathflip.archive.lock.ArchiveLock.open`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa

from pathflip.archive.fragments import Shard, write_shard
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.schema import conform, files_schema
from pathflip.archive.storage import (
    SELF_DIGEST,
    data_paths,
    digest_file,
    guarded,
    is_local,
    known_digests,
    open_table,
    sql_in,
)
from pathflip.archive.tables import key_of
from pathflip.errors import ArchiveError

_IDS_PER_STATEMENT = 500


def append(lock: ArchiveLock, shard: Shard) -> None:
    """Commit fragments that lie in the archive already; their files must be registered first."""
    import lance
    from lance.fragment import FragmentMetadata

    uri, dataset = lock.uri, lock.open(shard.table)
    if twice := set(shard.files) & set(data_paths(dataset, shard.table)):
        raise ValueError(f"the archive already holds {min(twice)}")
    with guarded(uri, f"commit rows of table {shard.table}"):
        before = dataset.count_rows()
        added = [FragmentMetadata.from_json(json.dumps(item)) for item in shard.fragments]
        done = lance.LanceDataset.commit(
            dataset, lance.LanceOperation.Append(added), read_version=dataset.version
        )
        expected = before + sum(item.physical_rows for item in added)
        check_count(uri, shard.table, done.count_rows(), expected)


def insert(lock: ArchiveLock, table: str, rows: pa.Table) -> None:
    """Insert rows whose keys are not there yet; unlike :func:`upsert` it looks for none of them."""
    shard = write_shard(lock.uri, table, rows, lock.open(table).schema)
    register(lock, shard.files)
    append(lock, shard)


def upsert(lock: ArchiveLock, table: str, rows: pa.Table) -> None:
    """Insert or replace rows by key in one commit; new files are registered before it."""
    import lance

    if rows.num_rows == 0:
        return
    key = key_of(table)
    uri, dataset = lock.uri, lock.open(table)
    rows = conform(rows, dataset.schema)
    if len(set(rows[key].to_pylist())) != rows.num_rows:
        raise ValueError(f"keys of table {table} are there twice")
    with guarded(uri, f"write rows of table {table}"):
        before = dataset.count_rows()
        transaction, stats = (
            dataset.merge_insert(key)
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .execute_uncommitted(rows)
        )
        paths = [
            f"{table}.lance/data/{file.path}"
            for item in transaction.operation.new_fragments
            for file in item.files
        ]
        register(lock, {path: digest_file(uri, path) for path in paths})
        done = lance.LanceDataset.commit(dataset, transaction)
        new = stats["num_inserted_rows"]
        check_count(uri, table, new + stats["num_updated_rows"], rows.num_rows)
        check_count(uri, table, done.count_rows(), before + new)


def delete_rows(lock: ArchiveLock, table: str, column: str, values: Sequence[str]) -> int:
    """Delete the rows with one of these values in a column and return their number."""
    uri, deleted = lock.uri, 0
    with guarded(uri, f"delete rows of table {table}"):
        dataset = lock.open(table)
        for ids in chunks(values):
            where = sql_in(column, ids)
            count = dataset.count_rows(where)
            if count:  # a delete of nothing would still make a version
                dataset.delete(where)
                check_count(uri, table, dataset.count_rows(where), 0)
                deleted += count
    return deleted


def register(lock: ArchiveLock, files: Mapping[str, tuple[str, int]]) -> None:
    """Write digests to ``files``; those of its own data files go into its configuration."""
    if not files:
        return
    rows = pa.table(
        {
            "path": list(files),
            "table": [path.split(".lance/", 1)[0] for path in files],
            "sha256": [sha256 for sha256, _ in files.values()],
            "bytes": pa.array([size for _, size in files.values()], pa.int64()),
        }
    )
    shard = write_shard(lock.uri, "files", rows, files_schema())
    append(lock, shard)
    note_own_digests(lock, shard.files)


def note_own_digests(lock: ArchiveLock, files: Mapping[str, tuple[str, int]]) -> None:
    """Write digests of data files of ``files`` into its configuration."""
    with guarded(lock.uri, "write the digests"):
        dataset = lock.open("files")
        dataset.update_config({SELF_DIGEST + path: d for path, (d, _) in files.items()})


def register_missing(lock: ArchiveLock, tables: Sequence[str]) -> None:
    """Digest the data files of tables that have no digest yet."""
    uri, known = lock.uri, known_digests(lock.uri)
    missing = [
        path
        for table in tables
        for path in data_paths(open_table(uri, table), table)
        if path not in known
    ]
    with guarded(uri, "read new files", damaged=is_local(uri)):
        found = {path: digest_file(uri, path) for path in missing}
    own = {path: d for path, d in found.items() if path.startswith("files.lance/")}
    if own:
        note_own_digests(lock, own)
    register(lock, {path: d for path, d in found.items() if path not in own})


def forget_files(lock: ArchiveLock, paths: Collection[str]) -> None:
    """Drop the digests of files that no longer exist."""
    delete_rows(lock, "files", "path", list(paths))
    forget_own_digests(lock, [path for path in paths if path.startswith("files.lance/")])


def forget_own_digests(lock: ArchiveLock, paths: Collection[str]) -> None:
    """Drop digests of data files of ``files`` from its configuration."""
    if paths:
        with guarded(lock.uri, "drop digests"):
            lock.open("files").delete_config_keys([SELF_DIGEST + path for path in paths])


def check_count(uri: str, table: str, found: int, expected: int) -> None:
    """Refuse a commit that has not left the expected number of rows."""
    if found != expected:
        raise ArchiveError(
            f"Table {table} of {uri} has {found} rows after a commit, not {expected}.",
            hint=f"Is another program writing it? Run: pathflip archive verify --archive {uri}",
            code="commit",
        )


def chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield parts of a list of values that are short enough for one SQL statement."""
    for start in range(0, len(values), _IDS_PER_STATEMENT):
        yield values[start : start + _IDS_PER_STATEMENT]
