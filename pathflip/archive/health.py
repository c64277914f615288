"""Is an archive whole? Verify, repair, maintain.

What Lance does not tell: one flipped bit in a data file comes back as data, ``count_rows`` counts
rows whose data is gone, and a newest manifest that is lost or zeroed opens as an older or empty
table. So every data file has a digest in ``files``, every row a checksum, and :func:`verify` reads
all of it.

Bytes that fail their digest are decoded in a child process only: damaged lengths can make native
code panic, abort or hang.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import READY, read_meta
from pathflip.archive.commit import ArchiveLock, Committer, Shard, known_digests, meta_rows
from pathflip.archive.commit import _create_table as create_table
from pathflip.archive.schema import (
    SCHEMA_VERSION,
    embeddings_schema,
    features_schema,
    files_schema,
    intact_rows,
    key_of,
    meta_schema,
    slides_schema,
)
from pathflip.archive.storage import (
    FIXED_TABLES,
    damaged_error,
    data_paths,
    digest_file,
    filesystem,
    guarded,
    is_failure,
    is_local,
    local_tables,
    newest_known_version,
    normalise,
    open_table,
    rows_per_batch,
    table_uri,
)
from pathflip.errors import ArchiveError

VECTOR_INDEX_ROWS = 50_000
"""Embeddings from which on :func:`maintain` builds a vector index; below, a scan is fast."""

SCALAR_INDEX_ROWS = 10_000
KEEP_HOURS = 24
_SALVAGE_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        table: The table.
        kind: ``table`` (cannot be opened), ``file`` (digest differs or file gone), ``row`` (checksum
            differs), ``missing`` (row of a ready slide is not there), ``duplicate``.
        id: The row's key, or the file's path relative to the archive.
        detail: One sentence.
        slide_id: The slide the row belongs to, where known.
        fragment: The Lance fragment it lies in; None for files only older versions refer to.
    """

    table: str
    kind: str
    id: str
    detail: str
    slide_id: str | None = None
    fragment: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        damaged: Everything wrong, tables first.
        notes: What is not damage but worth knowing.
        files: Data files whose digest was checked.
        rows: Rows whose checksum was checked.
        bytes: Bytes of those files.
        seconds: Wall time.
    """

    damaged: list[Damage]
    notes: list[str]
    files: int
    rows: int
    bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.damaged

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(kw_only=True)
class _Scan:
    """State of one verification."""

    damaged: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    slides: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: int = 0
    rows: int = 0
    bytes: int = 0


def verify(uri: str | Path) -> Report:
    """Reads everything in an archive and reports what is damaged.

    Digests of all data files, also of those only older versions refer to (repair falls back on
    them); checksums of all rows, fragment by fragment; and that every ready slide has exactly its
    rows in every table. Changes nothing, takes no lock; run it when nobody writes.

    Raises:
        ArchiveError: If there is no archive at ``uri``. Damage is reported, never raised.
    """
    start = time.perf_counter()
    where = normalise(uri)
    scan = _Scan()
    encoders: dict[str, dict[str, Any]] = {}
    try:
        meta = read_meta(where)
        encoders = {k[8:]: v for k, v in meta.items() if k.startswith("encoder:")}
    except ArchiveError as error:
        if error.code not in ("damaged", "missing_table"):
            raise
    tables = {"meta", *FIXED_TABLES}
    for entry in encoders.values():
        tables |= {entry["features_table"], entry["embeddings_table"]}
    if is_local(where):
        tables |= set(local_tables(where))
    known: dict[str, tuple[str, int]] = {}
    try:
        known = known_digests(where)
    except ArchiveError as error:
        scan.notes.append(f"No file digest could be checked: {error.message}")
    for table in sorted(tables):
        try:
            dataset = open_table(where, table)
            with guarded(where, f"list the files of table {table}", damaged=True):
                paths = data_paths(dataset, table)
        except ArchiveError as error:
            scan.damaged.append(
                Damage(table=table, kind="table", id=table, detail=error.message)
            )
            continue
        _check_table(where, table, dataset, paths, known, scan)
    _check_old_files(where, known, scan)
    _check_slides(encoders, scan)
    order = {"table": 0, "file": 1}
    scan.damaged.sort(key=lambda d: (order.get(d.kind, 2), d.table, d.id, d.kind))
    return Report(
        damaged=scan.damaged,
        notes=scan.notes,
        files=scan.files,
        rows=scan.rows,
        bytes=scan.bytes,
        seconds=time.perf_counter() - start,
    )


def _check_table(
    uri: str,
    table: str,
    dataset: Any,
    paths: dict[str, int],
    known: dict[str, tuple[str, int]],
    scan: _Scan,
) -> None:
    suspect: dict[int, str] = {}  # fragment -> path
    undigested = 0
    for path, fragment in sorted(paths.items()):
        detail = _file_fault(uri, path, known.get(path), scan)
        undigested += path not in known
        if detail:
            suspect[fragment] = path
            scan.damaged.append(
                Damage(table=table, kind="file", id=path, detail=detail, fragment=fragment)
            )
    if undigested and known:
        scan.notes.append(
            f"{undigested} files of table {table} have no digest yet; the next ingest or "
            "maintain digests them."
        )
    key = key_of(table)
    for fragment in dataset.get_fragments():
        number = fragment.fragment_id
        if number in suspect:
            bad = _salvage(uri, table, number, None)
        else:
            try:
                bad = [
                    row for batch in _batches(fragment, dataset.schema)
                    for row in _check_batch(table, key, batch, scan)
                ]  # fmt: skip
            except BaseException as error:
                if not is_failure(error):
                    raise
                path = next((p for p, n in paths.items() if n == number), table)
                text = " ".join(str(error).split())[:200]
                detail = f"The fragment cannot be read: {text}"
                scan.damaged.append(
                    Damage(table=table, kind="file", id=path, detail=detail, fragment=number)
                )
                continue
        scan.damaged += [
            Damage(
                table=table, kind="row", id=row_id, slide_id=slide, fragment=number,
                detail="The row's values do not match its checksum.",
            )
            for row_id, slide in bad
        ]  # fmt: skip
        if number in suspect:  # what is left of it counts as present
            intact = _salvaged_keys(uri, table, number)
            for batch in intact:
                _note_rows(table, key, batch, scan)


def _file_fault(
    uri: str, path: str, known: tuple[str, int] | None, scan: _Scan
) -> str | None:
    try:
        sha256, size = digest_file(uri, path)
    except FileNotFoundError:
        return "The file is missing."
    except OSError as error:
        return f"The file cannot be read: {error}"
    scan.files += 1
    scan.bytes += size
    if known is not None and known[0] != sha256:
        return "The file's bytes are not those that were written (sha256 differs)."
    return None


def _batches(fragment: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    yield from fragment.to_batches(
        batch_size=rows_per_batch(schema), batch_readahead=2, io_buffer_size=256 << 20
    )


def _check_batch(
    table: str, key: str, batch: pa.RecordBatch, scan: _Scan
) -> list[tuple[str, str | None]]:
    """Notes the intact rows of a batch and returns (key, slide) of the others."""
    ok = intact_rows(batch)
    scan.rows += batch.num_rows
    bad = batch.filter(pa.array(~ok))
    _note_rows(table, key, batch.filter(pa.array(ok)), scan)
    owners = bad.column("slide_id").to_pylist() if "slide_id" in bad.schema.names else None
    ids = bad.column(key).to_pylist()
    return [(str(row), owners[i] if owners else None) for i, row in enumerate(ids)]


def _note_rows(table: str, key: str, batch: pa.RecordBatch, scan: _Scan) -> None:
    ids = batch.column(key).to_pylist()
    if table == "slides":
        columns = ["slide_id", "status", "n_regions", "encoders"]
        scan.slides |= {row["slide_id"]: row for row in batch.select(columns).to_pylist()}
    owners = batch.column("slide_id").to_pylist() if "slide_id" in batch.schema.names else ids
    scan.keys.setdefault(table, []).extend(zip(ids, owners, strict=True))


def _check_old_files(uri: str, known: dict[str, tuple[str, int]], scan: _Scan) -> None:
    """Checks digested files that only older versions refer to."""
    current: set[str] = set()
    for table in sorted({path.split(".lance/", 1)[0] for path in known}):
        try:
            current |= set(data_paths(open_table(uri, table), table))
        except ArchiveError:
            continue
    for path in sorted(set(known) - current):
        table = path.split(".lance/", 1)[0]
        fault = _file_fault(uri, path, known[path], scan)
        if fault and fault != "The file is missing.":
            detail = f"{fault} Only older versions refer to it."
            scan.damaged.append(Damage(table=table, kind="file", id=path, detail=detail))


def _check_slides(encoders: dict[str, dict[str, Any]], scan: _Scan) -> None:
    """Checks that ready slides have exactly their rows."""
    for table, rows in scan.keys.items():
        twice = [item for item, count in Counter(rows).items() if count > 1]
        scan.damaged += [
            Damage(table=table, kind="duplicate", id=row, slide_id=slide, detail="The key is there twice.")
            for row, slide in twice
        ]  # fmt: skip
    unreadable = {damage.table for damage in scan.damaged if damage.kind == "table"}
    by_slide: dict[str, dict[str, set[str]]] = {}
    for table, rows in scan.keys.items():
        owned = by_slide.setdefault(table, {})
        for row, slide in rows:
            owned.setdefault(slide, set()).add(row)
    hidden: Counter[str] = Counter()
    ready = {slide for slide, row in scan.slides.items() if row["status"] == READY}
    for table, owned in by_slide.items():
        if table not in ("meta", "files", "slides"):
            hidden[table] = sum(len(rows) for slide, rows in owned.items() if slide not in ready)
    for table, count in hidden.items():
        if count:
            scan.notes.append(
                f"{count} rows of table {table} belong to no ready slide; nobody sees them and the "
                "next ingest deletes them."
            )
    listed = {(d.table, d.id) for d in scan.damaged if d.kind == "row"}
    for slide in sorted(ready):
        row = scan.slides[slide]
        regions = by_slide.get("regions", {}).get(slide, set())
        expected: dict[str, set[str]] = {}
        for name in row["encoders"] or ():
            if name in encoders:
                expected[encoders[name]["features_table"]] = regions
                expected[encoders[name]["embeddings_table"]] = regions | {slide}
                # What one table lost, the others may still name.
                regions = regions | by_slide.get(encoders[name]["features_table"], {}).get(slide, set())
        if "regions" not in unreadable and len(regions) != row["n_regions"]:
            scan.damaged.append(
                Damage(
                    table="regions", kind="missing", id=slide, slide_id=slide,
                    detail=f"The slide has {len(regions)} regions, not {row['n_regions']}.",
                )
            )  # fmt: skip
        expected["regions"] = regions
        for table in expected:
            wanted = regions | {slide} if table.startswith("embeddings_") else regions
            lost = wanted - by_slide.get(table, {}).get(slide, set())
            scan.damaged += [
                Damage(
                    table=table, kind="missing", id=name, slide_id=slide,
                    detail="The row of a ready slide is not there.",
                )
                for name in sorted(lost)
                if table not in unreadable and (table, name) not in listed
            ]  # fmt: skip


# ---- reading damaged fragments in a child -------------------------------------------------------


def _salvage(uri: str, table: str, fragment: int, out: str | None) -> list[tuple[str, str | None]]:
    raise NotImplementedError


def _salvaged_keys(uri: str, table: str, fragment: int) -> list[pa.RecordBatch]:
    raise NotImplementedError
