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
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import CAPTIONS, READY, entries_of, read_meta, slots_of
from pathflip.archive.commit import (
    ArchiveLock,
    Committer,
    create_table,
    known_digests,
    meta_rows,
    own_digests,
)
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.recover import salvage
from pathflip.archive.schema import (
    captions_schema,
    embeddings_schema,
    features_schema,
    files_schema,
    intact_rows,
    key_of,
    meta_schema,
    regions_schema,
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

KEEP_HOURS = 24
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


# ---- repair ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What :func:`repair` did.

    Attributes:
        actions: One sentence each.
        redo: Ids of slides that lost rows; the next ingest of their files writes them anew.
        report: The state after repair.
    """

    actions: list[str]
    redo: list[str]
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {"actions": self.actions, "redo": self.redo, "report": self.report.to_json()}


def repair(uri: str | Path) -> Repaired:
    """Brings a damaged archive back to a whole one, without what cannot be read any more.

    * A table that does not open: manifests are moved aside, newest first, until a version opens; a
      table with none left is made anew, empty. ``meta`` is completed from the other tables.
    * A damaged data file: rows whose checksum is right move to a new file; the old one is moved
      aside, and versions older than this repair may not open any more.
    * A slide some of whose vectors of a trained model are lost loses the rest of them too, and
      ``pathflip index`` makes them again. Captions that are lost have to be imported again.
    * A ready slide that is not whole then: its rows go, and its row in ``slides`` says
      ``quarantined``, reason ``damaged_rows``, with an empty fingerprint: the ledger does not know
      its content any more, so the same ingest command as before does it again. A slide whose own
      row is lost is unknown again, which has the same effect.

    What is moved aside lies in ``<archive>/.damaged``.

    Raises:
        ArchiveError: If the archive is not local (``remote``; copy it first), locked, or its
            settings are lost in all tables.
    """
    where = normalise(uri)
    if not is_local(where):
        raise ArchiveError(
            f"{where} is not a local archive; only those can be repaired.",
            hint="Copy it to a disk, repair the copy, and copy it back.",
            code="remote",
        )
    if not {"slides", "regions", "meta"} & set(local_tables(where)):
        read_meta(where)  # says what is wrong
    actions: list[str] = []
    with ArchiveLock(where):
        for table in sorted({"meta", *FIXED_TABLES, *local_tables(where)}):
            actions += _restore_table(where, table)
        report = verify(where)
        broken = {(d.table, d.fragment) for d in report.damaged if d.fragment is not None}
        moved = {d.id for d in report.damaged if d.kind == "file"}
        for table, fragment in sorted(broken):
            paths = data_paths(open_table(where, table), table)
            moved |= {path for path, number in paths.items() if number == fragment}
            actions.append(_rewrite_fragment(where, table, fragment))
        for path in sorted(moved):
            if Path(where, path).exists():
                _move_aside(where, Path(where, path))
                actions.append(f"Moved the damaged file {path} aside.")
        actions += _complete_meta(where)
        if actions:
            report = verify(where)
    with Committer(where) as committer:
        rows = committer.archive.dataset("slides").to_table()
        rows = rows.filter(pc.is_in(rows["slide_id"], pa.array(report.slides, pa.string())))
        committer.drop_slides(report.slides, keep_captions=True)
        committer.upsert("slides", _unready(rows))
        for table, slides in report.reindex.items():
            committer.drop_rows(table, slides)
            actions.append(f"Table {table}: {len(slides)} slides are to be indexed again.")
        committer.forget_files([p for p in known_digests(where) if not Path(where, p).exists()])
    if report.slides:
        actions.append(f"{len(report.slides)} slides were not whole; ingest them again.")
    return Repaired(actions=actions, redo=report.slides, report=verify(where))


def _restore_table(uri: str, table: str) -> list[str]:
    """Makes a table open again at its newest version that does."""
    actions: list[str] = []
    while True:
        try:
            dataset = open_table(uri, table)
            with guarded(uri, f"read the table {table}", damaged=True):
                dataset.count_rows()
                data_paths(dataset, table)
        except ArchiveError as error:
            if error.code not in ("damaged", "missing_table"):
                raise
        else:
            return actions
        folder = Path(table_uri(uri, table), "_versions")
        versions = _manifests(folder)
        newest = max(versions, default=0)
        if newest and newest_known_version(uri, table) <= newest:
            _move_aside(uri, versions.pop(newest))
            newest = max(versions, default=0)
        if newest:
            note = folder / "latest_version_hint.json"
            note.write_text(json.dumps({"version": newest}))
            actions.append(f"Table {table}: went back to version {newest}.")
            continue
        if (schema := _schema_of(uri, table)) is None:
            if table == "meta" or not table.startswith(("features_", "embeddings_")):
                raise damaged_error(uri, f"the settings and every version of {table} are lost")
            # Nothing says how wide it was; the encoder is added anew by the next ingest.
            _move_aside(uri, Path(table_uri(uri, table)))
            return [f"Table {table}: no version opens, moved aside."]
        if Path(table_uri(uri, table)).exists():
            _move_aside(uri, Path(table_uri(uri, table)))
        with guarded(uri, f"make the table {table}"):
            create_table(uri, table, schema)
        return [f"Table {table}: no version opens, made anew and empty."]


def _manifests(folder: Path) -> dict[int, Path]:
    """Returns {version: manifest}. Lance names them by 2**64 - 1 - version, or by version."""
    found: dict[int, Path] = {}
    for path in folder.glob("*.manifest"):
        if path.stem.isdigit():
            number = int(path.stem)
            found[number if number < 2**63 else 2**64 - 1 - number] = path
    return found


def _schema_of(uri: str, table: str) -> pa.Schema | None:
    """Returns the schema of a table whose versions are lost, from what the settings say."""
    fixed = {
        "meta": meta_schema,
        "slides": slides_schema,
        "files": files_schema,
        CAPTIONS: captions_schema,
    }
    if table in fixed:
        return fixed[table]()
    try:
        meta = read_meta(uri)
    except ArchiveError:
        return None
    slots = slots_of(meta["tiling"])
    if table == "regions":
        return regions_schema(slots, {k: json.dumps(v) for k, v in meta.items() if ":" not in k})
    for kind in ("encoder", "model"):
        for name, entry in entries_of(meta, kind).items():
            noted = {kind: json.dumps({"name": name, **entry})}
            if table == entry.get("features_table"):
                return features_schema(slots, entry["dim"], noted)
            if table == entry["embeddings_table"]:
                return embeddings_schema(entry["dim"], noted)
    return None


def _rewrite_fragment(uri: str, table: str, fragment: int) -> str:
    """Replaces a damaged fragment by its intact rows, in one commit."""
    import lance
    from lance.fragment import write_fragments

    good, _ = salvage(uri, table, fragment)
    with guarded(uri, f"rewrite a fragment of table {table}"):
        dataset = open_table(uri, table)
        lost = dataset.get_fragment(fragment).physical_rows
        new = []
        if good is not None and good.num_rows:
            lost -= good.num_rows
            new = write_fragments(good, table_uri(uri, table))
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=[fragment],
            updated_fragments=[],
            new_fragments=new,
            fields_modified=[],
        )
        lance.LanceDataset.commit(dataset, operation, read_version=dataset.version)
    return f"Table {table}: rewrote fragment {fragment}, at most {lost} rows are lost."


def _complete_meta(uri: str) -> list[str]:
    """Adds settings that ``meta`` has lost, and tables that it names and that are gone."""
    actions: list[str] = []
    dataset = open_table(uri, "meta")
    rows = dataset.to_table()
    meta = {row["key"]: json.loads(row["value"]) for row in rows.to_pylist()}
    found: dict[str, Any] = {}
    for table in local_tables(uri):
        noted = open_table(uri, table).schema.metadata or {}
        if table == "regions":
            found |= {key.decode(): json.loads(value) for key, value in noted.items()}
        elif table.startswith("features_") and b"encoder" in noted:
            entry = json.loads(noted[b"encoder"])
            found[f"encoder:{entry.pop('name')}"] = entry
        elif table.startswith("embeddings_") and b"model" in noted:
            entry = json.loads(noted[b"model"])
            found[f"model:{entry.pop('name')}"] = entry
        elif table == CAPTIONS:
            found[CAPTIONS] = {}
    lost = {key: value for key, value in found.items() if key not in meta}
    if lost:
        import lance

        with guarded(uri, "complete the settings"):
            lance.write_dataset(meta_rows(lost), table_uri(uri, "meta"), mode="append")
        actions.append(f"Table meta: brought back {', '.join(sorted(lost))}.")
    meta = read_meta(uri)
    for entry in (*entries_of(meta, "encoder").values(), *entries_of(meta, "model").values()):
        for table in filter(None, (entry.get("features_table"), entry["embeddings_table"])):
            actions += _restore_table(uri, table)
    if CAPTIONS in meta:
        actions += _restore_table(uri, CAPTIONS)
    return actions


def _move_aside(uri: str, path: Path) -> None:
    folder = Path(uri, ".damaged", datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ"))
    target = folder / path.relative_to(uri)
    target.parent.mkdir(parents=True)
    shutil.move(path, target)


def _unready(rows: pa.Table) -> pa.Table:
    """Returns rows of ``slides`` that make the next ingest do these slides again."""
    by_id = {row["slide_id"]: row for row in rows.to_pylist()}
    change = {
        "status": "quarantined",
        "reason": "damaged_rows",
        "message": "Rows of this slide in the archive were damaged and have been removed; run the "
        "same ingest command again.",
        "stage": "repair",
        "fingerprint": "",
        "encoders": [],
        "n_regions": 0,
        "n_patches": 0,
    }
    return pa.Table.from_pylist([row | change for row in by_id.values()], schema=rows.schema)


# ---- maintenance ----------------------------------------------------------------------------


def maintain(uri: str | Path) -> dict[str, Any]:
    """Compacts, indexes and cleans an archive.

    Merges small fragments; builds the indexes of :mod:`pathflip.archive.indexes`, or brings them up
    to date; drops versions older than 24 hours and files no version refers to that are older than
    that. Readers
    keep their snapshot for 24 hours.

    Returns:
        {"fragments": {table: n}, "indexed": [table.column], "bytes_removed": n}.

    Raises:
        ArchiveError: If the archive is being written (``locked``), missing or damaged.
    """
    where = normalise(uri)
    with Committer(where) as committer:
        fragments = committer.compact()
        indexed: list[str] = []
        for table in committer.archive.tables():
            indexed += refresh_indexes(where, table)
        removed = 0
        for table in fragments:
            with guarded(where, f"clean the table {table}"):
                dataset = open_table(where, table)
                keep = timedelta(hours=KEEP_HOURS)
                removed += dataset.cleanup_old_versions(older_than=keep).bytes_removed
                removed += _remove_orphans(where, table)
        system, root = filesystem(where)
        known = known_digests(where)
        infos = system.get_file_info([f"{root}/{path}" for path in known])
        gone = [path for path, info in zip(known, infos, strict=True) if info.size is None]
        committer.forget_files(gone)
    return {"fragments": fragments, "indexed": indexed, "bytes_removed": removed}


def _remove_orphans(uri: str, table: str) -> int:
    """Removes data files that no version refers to and that are older than a day."""
    dataset = open_table(uri, table)
    named = {path for batch in dataset.tracked_files() for path in batch["path"].to_pylist()}
    before = datetime.now(UTC) - timedelta(hours=KEEP_HOURS)
    system, root = filesystem(uri)
    removed = 0
    for batch in dataset.all_files():
        for row in batch.to_pylist():
            path = row["path"]
            if path.startswith("data/") and path not in named and row["last_modified"] < before:
                system.delete_file(f"{root}/{table}.lance/{path}")
                removed += row["size_bytes"]
    return removed
