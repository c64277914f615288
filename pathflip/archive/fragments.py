"""New tables, and fragments of rows that are written but not committed.

Workers write immutable Lance fragments with :func:`write_fragment`; nothing of them is visible
until :class:`pathflip.archive.commit.Committer` commits them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pathflip.archive.schema import conform
from pathflip.archive.storage import (
    digest_file,
    filesystem,
    find_table,
    guarded,
    has_version,
    is_local,
    normalise,
    open_table,
    table_uri,
)
from pathflip.errors import ArchiveError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Fragments of one table that are stored in the archive but not committed.

    Attributes:
        table: The table.
        rows: {slide_id: number of rows}.
        files: {path relative to the archive: (sha256, bytes)}.
        fragments: Lance's description of the fragments (JSON values).
    """

    table: str
    rows: dict[str, int]
    files: dict[str, tuple[str, int]]
    fragments: list[dict[str, Any]] = field(repr=False)

    def to_json(self) -> str:
        """Return the shard as one JSON line."""
        return json.dumps(
            {
                "table": self.table,
                "rows": self.rows,
                "files": self.files,
                "fragments": self.fragments,
            }
        )

    @classmethod
    def joined(cls, shards: Sequence[Shard]) -> Shard:
        """Return shards of one table as one, so that they become visible in one commit."""
        rows: Counter[str] = Counter()
        for shard in shards:
            rows.update(shard.rows)
        return cls(
            table=shards[0].table,
            rows=dict(rows),
            files={path: digest for shard in shards for path, digest in shard.files.items()},
            fragments=[item for shard in shards for item in shard.fragments],
        )

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """Read what :meth:`to_json` wrote."""
        raw = json.loads(text)
        files = {path: (sha256, size) for path, (sha256, size) in raw["files"].items()}
        return cls(table=raw["table"], rows=raw["rows"], files=files, fragments=raw["fragments"])


def write_fragment(uri: str | Path, table: str, data: pa.Table) -> str:
    """Write rows as immutable fragments of an existing table, invisible until committed.

    For workers; safe to call from any number of processes at once.

    Args:
        uri: The archive.
        table: The table, as from :func:`pathflip.archive.schema.features_table`.
        data: Its columns (any order); ``checksum`` is computed here.

    Returns:
        A :class:`Shard` as JSON, for :meth:`pathflip.archive.commit.Committer.commit`.

    Raises:
        ArchiveError: If the disk is full or the archive cannot be written.
        ValueError: If the columns are not those of the table.
    """
    where = normalise(uri)
    return write_shard(where, table, data, open_table(where, table).schema).to_json()


def write_shard(uri: str, table: str, data: pa.Table, schema: pa.Schema) -> Shard:
    """Write rows as fragments of a table and digests their files; see :func:`write_fragment`."""
    from lance.fragment import write_fragments

    rows = conform(data, schema)
    with guarded(uri, f"write rows of table {table}"):
        written = write_fragments(rows, table_uri(uri, table))
    owner = rows["slide_id"].to_pylist() if "slide_id" in rows.column_names else []
    return _shard(uri, table, written, dict(Counter(owner)))


def _shard(uri: str, table: str, written: Sequence[Any], rows: dict[str, int]) -> Shard:
    """Return the shard of fragments that were written, with digests of their files."""
    paths = [f"{table}.lance/data/{file.path}" for item in written for file in item.files]
    with guarded(uri, f"write rows of table {table}"):
        files = {path: digest_file(uri, path) for path in paths}
    fragments = [item.to_json() for item in written]
    return Shard(table=table, rows=rows, files=files, fragments=fragments)


def merge_small(
    uri: str, shards: Sequence[Shard], *, small: int, size: int
) -> tuple[list[Shard], list[str]]:
    """Write small fragments that nobody has seen yet as fewer large ones.

    Rows are taken over with their checksums, so damage to a file in between is found later.

    Args:
        uri: The archive.
        shards: Shards of any tables.
        small: Bytes below which a shard is merged with others.
        size: Bytes from which on a new fragment takes no further shard.

    Returns:
        The shards to commit, and the files that are not needed once they are.
    """
    from lance.file import LanceFileReader
    from lance.fragment import write_fragments

    kept: list[Shard] = []
    groups: list[list[Shard]] = []
    for shard in sorted(shards, key=lambda shard: shard.table):
        last = groups[-1] if groups else []
        if _bytes(shard) >= small:
            kept.append(shard)
        elif last and last[0].table == shard.table and sum(map(_bytes, last)) < size:
            last.append(shard)
        else:
            groups.append([shard])
    spent: list[str] = []
    for group in groups:
        if len(group) < 2:
            kept += group
            continue
        table, paths = group[0].table, [path for shard in group for path in shard.files]
        with guarded(uri, f"read rows of table {table}"):
            rows = pa.concat_tables(
                LanceFileReader(f"{uri}/{path}").read_all().to_table() for path in paths
            )
        with guarded(uri, f"write rows of table {table}"):
            written = write_fragments(
                rows.cast(open_table(uri, table).schema), table_uri(uri, table)
            )
        kept.append(_shard(uri, table, written, Shard.joined(group).rows))
        spent += paths
    return kept, spent


def remove_files(uri: str, paths: Sequence[str]) -> None:
    """Remove files that were never committed; those that cannot be removed maintain removes."""
    system, root = filesystem(uri)
    for path in paths:
        with suppress(OSError):
            system.delete_file(f"{root}/{path}")


def _bytes(shard: Shard) -> int:
    return sum(size for _, size in shard.files.values())


def create_table(uri: str, table: str, schema: pa.Schema, rows: pa.Table | None = None) -> None:
    """Create a table, empty or with its first rows; for a new archive and for repair."""
    import lance

    where = table_uri(uri, table)
    mode, left = "create", _left_behind(uri, table)
    if left is not None:
        # A creation that was killed left it, empty; nothing refers to it yet.
        if left.count_rows():
            raise not_empty(uri, f"{table}.lance")
        if not is_local(uri):
            # Whoever has lost the lease could overwrite what another has filled since: no commit
            # stands in the way of an overwriting one.
            if _described(left.schema) != _described(schema):
                raise not_empty(uri, f"{table}.lance")
            return
        mode = "overwrite"
    data = schema.empty_table() if rows is None else rows
    lance.write_dataset(data, where, schema=schema, mode=mode)


def _left_behind(uri: str, table: str) -> Any:
    """Return the dataset at the place of a table, None if there is none."""
    import lance

    if is_local(uri):
        return lance.dataset(table_uri(uri, table)) if has_version(uri, table) else None
    return find_table(uri, table)


def _described(schema: pa.Schema) -> tuple[pa.Schema, dict[bytes, bytes]]:
    """Return fields and metadata of a schema, but for when and by which version it was made."""
    noted = dict(schema.metadata or {})
    for key in (b"created_at", b"package_version"):
        noted.pop(key, None)
    return schema.remove_metadata(), noted


def not_empty(uri: str, name: str) -> ArchiveError:
    """Return the error for a folder that holds other files."""
    return ArchiveError(
        f"{uri} is not an archive and not empty (it holds {name}).",
        hint="Give a new or empty folder.",
        code="not_empty",
    )
