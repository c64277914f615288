"""Is an archive whole?

What Lance does not tell: one flipped bit in a data file comes back as data, ``count_rows`` counts
rows whose data is gone, and a newest manifest that is lost or zeroed opens as an older or empty
table. So every data file has a digest in ``files``, every row a checksum, and :func:`verify` reads
all of it.

Bytes that fail their digest are decoded in a child process only: damaged lengths can make native
code panic, abort or hang.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pathflip.archive.archive import READY
from pathflip.archive.recover import salvage
from pathflip.archive.schema import (
    intact_rows,
    key_of,
)
from pathflip.archive.settings import CAPTIONS, entries_of, read_meta
from pathflip.archive.storage import (
    FIXED_TABLES,
    data_paths,
    digest_file,
    guarded,
    is_failure,
    is_local,
    local_tables,
    normalise,
    open_table,
    own_digests,
    rows_per_batch,
)
from pathflip.errors import ArchiveError

_OLD = " Only older versions refer to it."


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        table: The table.
        kind: ``table`` (cannot be opened), ``file`` (gone, or its digest differs), ``row`` (its
            checksum differs), ``missing`` (row of a ready slide is not there), ``duplicate``.
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
        slides: Ready slides whose rows are not whole.
        reindex: {table of a trained model: slides some of whose vectors are lost}.
        notes: What is not damage but worth knowing.
        files: Data files whose digest was checked.
        rows: Rows whose checksum was checked.
        bytes: Bytes of those files.
        seconds: Wall time.
    """

    damaged: list[Damage]
    slides: list[str]
    reindex: dict[str, list[str]]
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
    incomplete: set[str] = field(default_factory=set)
    reindex: dict[str, set[str]] = field(default_factory=dict)
    salvaged: dict[tuple[str, int], tuple[Any, list[tuple[str, str | None]]]] = field(
        default_factory=dict
    )
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
    meta: dict[str, Any] = {}
    settings_fault = ""
    try:
        meta = read_meta(where)
    except ArchiveError as error:
        if error.code not in ("damaged", "missing_table"):
            raise
        settings_fault = error.message
    encoders, models = entries_of(meta, "encoder"), entries_of(meta, "model")
    tables = {"meta", *FIXED_TABLES} | {entry["embeddings_table"] for entry in models.values()}
    if CAPTIONS in meta:
        tables.add(CAPTIONS)
    for entry in encoders.values():
        tables |= {entry["features_table"], entry["embeddings_table"]}
    if is_local(where):
        tables |= set(local_tables(where))
    known = _trusted_digests(where, scan)
    for table in sorted(tables):
        try:
            dataset = open_table(where, table)
            with guarded(where, f"list the files of table {table}", damaged=True):
                paths = data_paths(dataset, table)
        except ArchiveError as error:
            scan.damaged.append(Damage(table=table, kind="table", id=table, detail=error.message))
            continue
        _check_table(where, table, dataset, paths, known, scan)
    if settings_fault and not any(damage.table == "meta" for damage in scan.damaged):
        scan.damaged.append(Damage(table="meta", kind="table", id="meta", detail=settings_fault))
    _check_old_files(where, known, scan)
    _check_slides(encoders, {entry["embeddings_table"] for entry in models.values()}, scan)
    _check_models(models, scan)
    order = {"table": 0, "file": 1}
    scan.damaged.sort(key=lambda d: (order.get(d.kind, 2), d.table, d.id, d.kind))
    return Report(
        damaged=scan.damaged,
        slides=sorted(scan.incomplete),
        reindex={table: sorted(slides) for table, slides in sorted(scan.reindex.items())},
        notes=scan.notes,
        files=scan.files,
        rows=scan.rows,
        bytes=scan.bytes,
        seconds=time.perf_counter() - start,
    )


def _trusted_digests(uri: str, scan: _Scan) -> dict[str, tuple[str, int]]:
    """Returns the digests of all files, from rows of ``files`` that are intact themselves."""
    try:
        dataset = open_table(uri, "files")
        with guarded(uri, "read the table files", damaged=True):
            known = own_digests(dataset.config())
            numbers = {number: path for path, number in data_paths(dataset, "files").items()}
            for fragment in dataset.get_fragments():
                path = numbers[fragment.fragment_id]
                if _file_fault(uri, path, known.get(path), _Scan()):
                    rows, _ = _salvaged(uri, "files", fragment.fragment_id, scan)
                else:
                    rows = fragment.to_table()
                    rows = rows.filter(pa.array(intact_rows(rows)))
                for row in [] if rows is None else rows.to_pylist():
                    known[row["path"]] = (row["sha256"], row["bytes"])
    except ArchiveError as error:
        scan.notes.append(f"Not every file digest could be checked: {error.message}")
        return {}
    return known


def _salvaged(
    uri: str, table: str, fragment: int, scan: _Scan
) -> tuple[pa.Table | None, list[tuple[str, str | None]]]:
    if (table, fragment) not in scan.salvaged:
        scan.salvaged[table, fragment] = salvage(uri, table, fragment)
    return scan.salvaged[table, fragment]


def _check_table(
    uri: str,
    table: str,
    dataset: Any,
    paths: dict[str, int],
    known: dict[str, tuple[str, int]],
    scan: _Scan,
) -> None:
    key = key_of(table)
    suspect: set[int] = set()
    undigested = 0
    for path, number in sorted(paths.items()):
        fault = _file_fault(uri, path, known.get(path), scan)
        undigested += path not in known
        if fault:
            suspect.add(number)
            scan.damaged.append(
                Damage(table=table, kind="file", id=path, detail=fault, fragment=number)
            )
    if undigested and known:
        scan.notes.append(
            f"{undigested} files of table {table} have no digest yet; the next ingest or "
            "maintain digests them."
        )
    for fragment in dataset.get_fragments():
        number = fragment.fragment_id
        bad: list[tuple[str, str | None]] = []
        if number not in suspect:
            try:
                for batch in _batches(fragment, dataset.schema):
                    ok = intact_rows(batch)
                    wrong = batch.filter(pa.array(~ok))
                    ids = wrong.column(key).to_pylist()
                    bad += [(str(row), None) for row in ids]
                    _note_rows(table, key, batch.filter(pa.array(ok)), scan)
                    scan.rows += batch.num_rows
            except BaseException as error:
                if not is_failure(error):
                    raise
                text = " ".join(str(error).split())[:200]
                path = next((p for p, n in paths.items() if n == number), table)
                detail = f"The rows cannot be read: {text}"
                scan.damaged.append(
                    Damage(table=table, kind="file", id=path, detail=detail, fragment=number)
                )
        else:
            good, bad = _salvaged(uri, table, number, scan)
            if good is not None:
                _note_rows(table, key, good, scan)
                scan.rows += good.num_rows + len(bad)
        scan.damaged += [
            Damage(
                table=table,
                kind="row",
                id=row,
                detail="The row's values do not match its checksum.",
                slide_id=slide,
                fragment=number,
            )
            for row, slide in bad
        ]


def _file_fault(uri: str, path: str, known: tuple[str, int] | None, scan: _Scan) -> str | None:
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
    yield from fragment.to_batches(batch_size=rows_per_batch(schema), batch_readahead=2)


def _note_rows(table: str, key: str, rows: pa.Table | pa.RecordBatch, scan: _Scan) -> None:
    ids = rows.column(key).to_pylist()
    if table == "slides":
        columns = ["slide_id", "status", "n_regions", "encoders"]
        scan.slides |= {row["slide_id"]: row for row in rows.select(columns).to_pylist()}
    owners = rows.column("slide_id").to_pylist() if "slide_id" in rows.schema.names else ids
    scan.keys.setdefault(table, []).extend(zip(ids, owners, strict=True))


def _check_old_files(uri: str, known: dict[str, tuple[str, int]], scan: _Scan) -> None:
    """Checks digested files that only older versions refer to; gone ones were cleaned up."""
    current: set[str] = set()
    for table in sorted({_table_of(path) for path in known}):
        try:
            current |= set(data_paths(open_table(uri, table), table))
        except ArchiveError:
            continue
    for path in sorted(set(known) - current):
        fault = _file_fault(uri, path, known[path], scan)
        if fault and fault != "The file is missing.":
            scan.damaged.append(
                Damage(table=_table_of(path), kind="file", id=path, detail=fault + _OLD)
            )


def _table_of(path: str) -> str:
    return path.split(".lance/", 1)[0]


def _check_slides(encoders: dict[str, dict[str, Any]], attached: set[str], scan: _Scan) -> None:
    """Checks that ready slides have exactly their rows, each once.

    Captions, and the vectors of models (``attached``), can be lost without the slide.
    """
    held: dict[str, dict[str, set[str]]] = {}  # table -> slide -> keys
    for table, rows in scan.keys.items():
        for item, count in Counter(rows).items():
            held.setdefault(table, {}).setdefault(item[1], set()).add(item[0])
            if count > 1:
                if table in attached:
                    scan.reindex.setdefault(table, set()).add(item[1])
                else:
                    scan.incomplete.add(item[1])
                scan.damaged.append(
                    Damage(
                        table=table,
                        kind="duplicate",
                        id=item[0],
                        detail=f"The key is there {count} times.",
                        slide_id=item[1],
                    )
                )
    ready = {slide: row for slide, row in scan.slides.items() if row["status"] == READY}
    for table, owned in held.items():
        hidden = sum(len(keys) for slide, keys in owned.items() if slide not in ready)
        if hidden and table not in ("meta", "slides", "files", CAPTIONS):
            scan.notes.append(
                f"{hidden} rows of table {table} belong to no ready slide; nobody sees them and "
                "the next ingest deletes them."
            )
    listed = {(damage.table, damage.id) for damage in scan.damaged}
    for slide, row in sorted(ready.items()):
        names = [name for name in row["encoders"] or () if name in encoders]
        tables = ["regions", *(encoders[name]["features_table"] for name in names)]
        pooled = [encoders[name]["embeddings_table"] for name in names]
        # What one table has lost the others still name.
        keys = {key for t in (*tables, *pooled) for key in held.get(t, {}).get(slide, ())} - {slide}
        if len(keys) != row["n_regions"] or len(names) != len(row["encoders"] or ()):
            scan.incomplete.add(slide)
            scan.damaged.append(
                Damage(
                    table="slides",
                    kind="missing",
                    id=slide,
                    detail=f"{len(keys)} of the slide's {row['n_regions']} regions are found.",
                    slide_id=slide,
                )
            )
        for table in (*tables, *pooled):
            wanted = keys | {slide} if table in pooled else keys
            lost = wanted - held.get(table, {}).get(slide, set())
            if lost:
                scan.incomplete.add(slide)
            scan.damaged += [
                Damage(
                    table=table,
                    kind="missing",
                    id=key,
                    detail="The row of a ready slide is not there.",
                    slide_id=slide,
                )
                for key in sorted(lost)
                if (table, key) not in listed
            ]


def _check_models(models: dict[str, dict[str, Any]], scan: _Scan) -> None:
    """Checks that a slide has all of its vectors of a model, or none: then it waits for index."""
    listed = {(damage.table, damage.id) for damage in scan.damaged}
    for name, entry in models.items():
        table = entry["embeddings_table"]
        held = Counter(slide for _, slide in set(scan.keys.get(table, ())))
        waiting = 0
        for slide, row in sorted(scan.slides.items()):
            if row["status"] != READY or entry["encoder"] not in (row["encoders"] or ()):
                continue
            waiting += slide not in held
            if held[slide] in (0, row["n_regions"] + 1):
                continue
            scan.reindex.setdefault(table, set()).add(slide)
            if (table, slide) not in listed:
                scan.damaged.append(
                    Damage(
                        table=table,
                        kind="missing",
                        id=slide,
                        detail=f"{held[slide]} of {row['n_regions'] + 1} vectors are there.",
                        slide_id=slide,
                    )
                )
        if waiting:
            scan.notes.append(f"{waiting} slides have no vectors of model {name}: pathflip index.")
