"""Checks that an archive is complete and undamaged.

Lance does not notice damage: it returns a flipped bit as data, ``count_rows`` counts rows whose
data is gone, and a lost or zeroed newest manifest opens as an older or empty table. Therefore every
data file has a digest in the table ``files`` and every row a checksum, and :func:`verify` reads
everything. Of the keys it keeps hashes (:mod:`pathflip.archive.keys`); only those of slides that
lack something are read again to say what it is.

Bytes that fail their digest are only decoded in a child process: damaged lengths can make native
code panic, abort or hang.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive.annotation_table import COUNTER, find_annotations
from pathflip.archive.archive import READY
from pathflip.archive.damage import Damage, Report
from pathflip.archive.keys import Keys, RowKeys, Tally, keys_in
from pathflip.archive.recover import Salvager, salvage
from pathflip.archive.schema import intact_rows
from pathflip.archive.settings import entries_of, read_meta
from pathflip.archive.storage import (
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
from pathflip.archive.suspects import suspected
from pathflip.archive.tables import (
    ANNOTATIONS,
    SLIDES,
    Table,
    key_of,
    spec_of,
    tables_of,
    unlocked_tables,
)
from pathflip.cpus import cpus_here
from pathflip.errors import ArchiveError

THREADS = min(8, cpus_here())
"""Files digested, and batches of rows checked, at the same time."""
_BATCH_BYTES = 8 << 20
_SLIDES_AT_ONCE = 1000
"""Slides whose keys are in memory at once where something is wrong."""
_OLD = " Only older versions refer to it."
_MISSING = "The file is missing."

_Held = dict[str, dict[str, set[str]]]  # table -> slide -> keys


@dataclass(kw_only=True)
class _Scan:
    """State of one verification."""

    damaged: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: Keys = field(default_factory=Keys)
    bad: dict[tuple[str, int], set[str]] = field(default_factory=dict)  # keys of damaged rows
    unread: set[tuple[str, int]] = field(default_factory=set)  # fragments
    slides: dict[str, dict[str, Any]] = field(default_factory=dict)
    quarantined: dict[str, set[str]] = field(default_factory=dict)  # table -> keys
    flawed: dict[str, set[str]] = field(default_factory=dict)  # table -> their slides
    incomplete: set[str] = field(default_factory=set)
    reindex: dict[str, set[str]] = field(default_factory=dict)
    opened: dict[str, Any] = field(default_factory=dict)  # the version of each table
    salvager: Salvager
    salvaged: dict[tuple[str, int], tuple[Any, list[tuple[str, str | None]]]] = field(
        default_factory=dict
    )
    pool: Executor
    files: int = 0
    rows: int = 0
    bytes: int = 0


def verify(uri: str | Path) -> Report:
    """Read everything in an archive and reports what is damaged.

    Checks the digests of all data files, including those that only older versions refer to (repair
    falls back on them), the checksums of all rows, fragment by fragment, and that every ready slide
    has exactly its rows in every table. Changes nothing and takes no lock: run it while no job
    writes to the archive. Annotations may be saved meanwhile.

    Raises:
        ArchiveError: If there is no archive at ``uri``. Damage is reported, never raised.
    """
    with Salvager() as salvager:
        return verify_with(salvager, normalise(uri))


def verify_with(salvager: Salvager, where: str) -> Report:
    """Verify an archive as :func:`verify` does, with a process that others use as well."""
    with ThreadPoolExecutor(THREADS) as pool:
        return _verified(_Scan(salvager=salvager, pool=pool), where)


def _verified(scan: _Scan, where: str) -> Report:
    start = time.perf_counter()
    meta: dict[str, Any] = {}
    settings_fault = ""
    try:
        meta = read_meta(where)
    except ArchiveError as error:
        if error.code not in ("damaged", "missing_table"):
            raise
        settings_fault = error.message
    named = tables_of(meta)
    tables = named | _unnamed(where, named, scan)
    known = _trusted_digests(where, scan)
    for table in sorted(tables):
        try:
            dataset = scan.opened[table] = open_table(where, table)
            with guarded(where, f"list the files of table {table}", damaged=True):
                paths = data_paths(dataset, table)
        except ArchiveError as error:
            scan.damaged.append(Damage(table=table, kind="table", id=table, detail=error.message))
            continue
        _check_table(where, table, dataset, paths, known, scan)
    if settings_fault and not any(damage.table == "meta" for damage in scan.damaged):
        scan.damaged.append(Damage(table="meta", kind="table", id="meta", detail=settings_fault))
    if ANNOTATIONS in tables and COUNTER not in scan.keys.slides:
        scan.damaged.append(
            Damage(
                table=ANNOTATIONS, kind="missing", id=COUNTER,
                detail="The row that counts the table's commits is not there.",
            )
        )  # fmt: skip
    _check_old_files(where, known, scan)
    _check_keys(named, tables, set(entries_of(meta, "encoder")), scan)
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


def _unnamed(uri: str, named: Mapping[str, Table], scan: _Scan) -> dict[str, Table]:
    """Return the tables that the settings do not name: never, or no longer."""
    found: dict[str, Table] = {}
    if not is_local(uri) and find_annotations(uri) is not None:
        found = {table.name: table for table in unlocked_tables()}
    for name in local_tables(uri) if is_local(uri) else ():
        if name in named:
            continue
        if (spec := spec_of(name)) is None:
            scan.notes.append(f"{name}.lance is no table of an archive and was not checked.")
        else:
            found[name] = Table(name=name, spec=spec)
    return found


def _trusted_digests(uri: str, scan: _Scan) -> dict[str, tuple[str, int]]:
    """Return the digests of all files, from rows of ``files`` that are intact themselves."""
    try:
        dataset = scan.opened["files"] = open_table(uri, "files")
        with guarded(uri, "read the table files", damaged=True):
            known = own_digests(dataset.config())
            numbers = {number: path for path, number in data_paths(dataset, "files").items()}
            for fragment in dataset.get_fragments():
                path = numbers[fragment.fragment_id]
                if _digested(uri, path, known.get(path))[0]:
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
        version = scan.opened[table].version
        scan.salvaged[table, fragment] = salvage(
            scan.salvager, uri, table, fragment, version=version
        )
    return scan.salvaged[table, fragment]


def _check_table(
    uri: str,
    table: str,
    dataset: Any,
    paths: dict[str, int],
    known: dict[str, tuple[str, int]],
    scan: _Scan,
) -> None:
    key, spec = key_of(table), spec_of(table)
    unlocked = spec is not None and spec.unlocked
    suspect: set[int] = set()
    undigested: set[int] = set()
    for path, fault in _file_faults(uri, sorted(paths), known, scan):
        if path not in known:
            undigested.add(paths[path])
        if fault:
            suspect.add(paths[path])
            scan.damaged.append(
                Damage(table=table, kind="file", id=path, detail=fault, fragment=paths[path])
            )
    if undigested and known and not unlocked:
        scan.notes.append(
            f"{len(undigested)} files of table {table} have no digest yet; the next ingest or "
            "maintain digests them."
        )
    for fragment in dataset.get_fragments():
        number = fragment.fragment_id
        bad: list[tuple[str, str | None]] = []
        # Only maintain digests files of such a table: their bytes are trusted no further.
        aside = number in suspect or (unlocked and number in undigested)
        if not aside:
            try:
                for good, wrong in _checked(fragment, dataset.schema, table, key, scan):
                    bad += [(row, None) for row in wrong]
                    _note_rows(table, good, scan)
                    scan.rows += good.rows + len(wrong)
            except BaseException as error:
                if not is_failure(error):
                    raise
                text = " ".join(str(error).split())[:200]
                path = next((p for p, n in paths.items() if n == number), table)
                detail = f"The rows cannot be read: {text}"
                scan.unread.add((table, number))
                scan.damaged.append(
                    Damage(table=table, kind="file", id=path, detail=detail, fragment=number)
                )
        else:
            rows, bad = _salvaged(uri, table, number, scan)
            if rows is not None:
                _note_rows(table, keys_in(rows, table, key), scan)
                scan.rows += rows.num_rows + len(bad)
            read = 0 if rows is None else rows.num_rows + len(bad)
            if number not in suspect and read < fragment.count_rows():
                path = next((p for p, n in paths.items() if n == number), table)
                detail = f"Only {read} of its {fragment.count_rows()} rows can be read."
                scan.damaged.append(
                    Damage(table=table, kind="file", id=path, detail=detail, fragment=number)
                )
        scan.bad[table, number] = {row for row, _ in bad}
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


def _file_faults(
    uri: str, paths: Sequence[str], known: Mapping[str, tuple[str, int]], scan: _Scan
) -> Iterator[tuple[str, str | None]]:
    """Yield each file with what is wrong with it, digested side by side."""
    found = scan.pool.map(lambda path: _digested(uri, path, known.get(path)), paths)
    for path, (fault, size) in zip(paths, found, strict=True):
        if size is not None:
            scan.files += 1
            scan.bytes += size
        yield path, fault


def _digested(uri: str, path: str, known: tuple[str, int] | None) -> tuple[str | None, int | None]:
    """Return what is wrong with a file, and its size if it could be read."""
    try:
        sha256, size = digest_file(uri, path)
    except FileNotFoundError:
        return _MISSING, None
    except OSError as error:
        return f"The file cannot be read: {error}", None
    if known is not None and known[0] != sha256:
        return "The file's bytes are not those that were written (sha256 differs).", size
    return None, size


def _checked(
    fragment: Any, schema: pa.Schema, table: str, key: str, scan: _Scan
) -> Iterator[tuple[RowKeys, list[str]]]:
    """Yield the good rows of a fragment and the keys of the bad ones, batch by batch."""

    def check(batch: pa.RecordBatch) -> tuple[RowKeys, list[str]]:
        ok = pa.array(intact_rows(batch))
        wrong = batch.filter(pc.invert(ok)).column(key).to_pylist()
        return keys_in(batch.filter(ok), table, key), [str(row) for row in wrong]

    waiting: deque[Future[tuple[RowKeys, list[str]]]] = deque()
    fault = None
    try:
        for batch in _batches(fragment, schema):
            waiting.append(scan.pool.submit(check, batch))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
    except BaseException as error:
        if not is_failure(error):
            raise
        fault = error  # what was read before it counts
    while waiting:
        yield waiting.popleft().result()
    if fault is not None:
        raise fault


def _batches(fragment: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    size = rows_per_batch(schema, budget=_BATCH_BYTES)
    yield from fragment.to_batches(batch_size=size, batch_readahead=1)


def _note_rows(table: str, rows: RowKeys, scan: _Scan) -> None:
    scan.slides |= rows.slides
    if rows.quarantined:
        scan.quarantined.setdefault(table, set()).update(rows.quarantined)
        scan.flawed.setdefault(table, set()).update(rows.quarantined.values())
    scan.keys.add(table, rows.hashes, rows.owners, rows.of)


def _check_old_files(uri: str, known: dict[str, tuple[str, int]], scan: _Scan) -> None:
    """Check digested files that only older versions refer to; gone ones were cleaned up."""
    current: set[str] = set()
    for table in sorted({_table_of(path) for path in known}):
        try:
            current |= set(data_paths(open_table(uri, table), table))
        except ArchiveError:
            continue
    for path, fault in _file_faults(uri, sorted(set(known) - current), known, scan):
        if fault and fault != _MISSING:
            scan.damaged.append(
                Damage(table=_table_of(path), kind="file", id=path, detail=fault + _OLD)
            )


def _table_of(path: str) -> str:
    return path.split(".lance/", 1)[0]


def _check_keys(
    named: Mapping[str, Table],
    tables: Mapping[str, Table],
    encoders: Collection[str],
    scan: _Scan,
) -> None:
    """Check that slides have the rows they must have, and no key twice."""
    tallies = {table: scan.keys.tally(table) for table in scan.keys.tables()}
    _note_hidden(tallies, scan)
    suspects, waiting = suspected(
        named, tallies, scan.keys.slides, scan.slides, scan.flawed, encoders
    )
    for start in range(0, len(suspects), _SLIDES_AT_ONCE):
        slides = suspects[start : start + _SLIDES_AT_ONCE]
        held = _held(tables, slides, scan)
        own = {slide: scan.slides[slide] for slide in slides if slide in scan.slides}
        _check_slides(named, held, encoders, own, scan)
        waiting += _check_derived(named, held, own, scan)
    for table, count in waiting.items():
        if count:
            scan.notes.append(
                f"{count} slides have no rows in table {table} yet; make them: "
                f"pathflip {named[table].spec.made_by}."
            )


def _note_hidden(tallies: Mapping[str, Tally], scan: _Scan) -> None:
    for table, tally in tallies.items():
        spec = spec_of(table)
        if spec is None or spec.derived_from is None:
            continue
        seen = [
            number
            for slide, number in scan.keys.slides.items()
            if (row := scan.slides.get(slide)) and (spec.any_status or row["status"] == READY)
        ]
        if hidden := int(tally.rows.sum() - tally.rows[seen].sum()):
            scan.notes.append(
                f"{hidden} rows of table {table} belong to no ready slide; readers do not see "
                "them, and the next ingest deletes them."
            )


def _held(tables: Mapping[str, Table], slides: Sequence[str], scan: _Scan) -> _Held:
    """Return the keys of good rows of some slides, read again, and report duplicates."""
    held: _Held = {}
    for table in scan.keys.tables():
        rows: Counter[tuple[str, str]] = Counter()
        dataset, key = scan.opened[table], key_of(table)
        for fragment in dataset.get_fragments():
            bad = scan.bad.get((table, fragment.fragment_id), ())
            for found in _read_again(fragment, dataset.schema, table, key, slides, scan):
                owners = found.column("slide_id" if "slide_id" in found.schema.names else key)
                pairs = zip(found.column(key).to_pylist(), owners.to_pylist(), strict=True)
                rows.update(pair for pair in pairs if pair[0] not in bad)
        for (one, slide), count in rows.items():
            held.setdefault(table, {}).setdefault(slide, set()).add(one)
            if count > 1:
                _lose(tables[table], slide, scan)
                scan.damaged.append(
                    Damage(
                        table=table,
                        kind="duplicate",
                        id=one,
                        detail=f"The key is there {count} times.",
                        slide_id=slide,
                    )
                )
    return held


def _read_again(
    fragment: Any, schema: pa.Schema, table: str, key: str, slides: Sequence[str], scan: _Scan
) -> Iterator[pa.Table | pa.RecordBatch]:
    """Yield the rows of some slides in a fragment, as far as they were read before."""
    owner = "slide_id" if "slide_id" in schema.names else key
    at, where = (table, fragment.fragment_id), pc.field(owner).isin(list(slides))
    if at in scan.salvaged:
        good, _ = scan.salvaged[at]
        if good is not None:
            yield good.filter(where)
    elif at in scan.unread:
        try:
            for batch in _batches(fragment, schema):
                yield batch.filter(where)
        except BaseException as error:
            if not is_failure(error):
                raise
    else:
        yield fragment.to_table(columns=list(dict.fromkeys([key, owner])), filter=where)


def _lose(table: Table, slide: str, scan: _Scan) -> None:
    """Note that a slide has lost rows of a table, for whichever command wrote them."""
    if table.ingested or table.name == SLIDES:
        scan.incomplete.add(slide)
    elif table.spec.derived_from is not None:
        scan.reindex.setdefault(table.name, set()).add(slide)


def _check_slides(
    named: Mapping[str, Table],
    held: _Held,
    encoders: Collection[str],
    slides: Mapping[str, Mapping[str, Any]],
    scan: _Scan,
) -> None:
    """Check that ready slides have exactly the rows that ingest wrote.

    Imported rows, and rows computed after ingest, can be lost without losing the slide.
    """
    ready = {slide: row for slide, row in slides.items() if row["status"] == READY}
    listed = {(damage.table, damage.id) for damage in scan.damaged}
    made = [table for table in named.values() if table.ingested and table.spec.one_per]
    for slide, row in sorted(ready.items()):
        names = set(row["encoders"] or ())
        own = [table for table in made if table.encoder is None or table.encoder in names]
        lost_encoders = not names <= set(encoders)
        for root in dict.fromkeys(table.spec.one_per for table in own):
            group = [table for table in own if table.spec.one_per == root]
            # What one table has lost the others still name.
            keys = _keys(group, slide, held)
            wanted = named[str(root)].spec.rows_of(row)
            if lost_encoders or wanted not in (None, len(keys)):
                scan.incomplete.add(slide)
                scan.damaged.append(
                    Damage(
                        table=SLIDES,
                        kind="missing",
                        id=slide,
                        detail=f"{len(keys)} of the slide's {wanted} {root} are found.",
                        slide_id=slide,
                    )
                )
            for member in group:
                lost = keys | ({slide} if member.spec.and_slide else set())
                lost -= held.get(member.name, {}).get(slide, set())
                if lost:
                    scan.incomplete.add(slide)
                scan.damaged += [
                    Damage(
                        table=member.name,
                        kind="missing",
                        id=key,
                        detail="The row of a ready slide is not there.",
                        slide_id=slide,
                    )
                    for key in sorted(lost)
                    if (member.name, key) not in listed
                ]


def _keys(tables: Iterable[Table], slide: str, held: _Held) -> set[str]:
    """Return the keys any of the tables holds for a slide, except the slide's own id."""
    return {key for t in tables for key in held.get(t.name, {}).get(slide, ())} - {slide}


def _check_derived(
    named: Mapping[str, Table],
    held: _Held,
    slides: Mapping[str, Mapping[str, Any]],
    scan: _Scan,
) -> Counter[str]:
    """Check that a slide has all or none of its rows in each table computed after ingest.

    Returns:
        {table: slides that have none yet}.
    """
    none: Counter[str] = Counter()
    listed = {(damage.table, damage.id) for damage in scan.damaged}
    later = [t for t in named.values() if not t.ingested and t.spec.derived_from and t.spec.one_per]
    for table in later:
        siblings = [other for other in later if other.spec.one_per == table.spec.one_per]
        # What a killed writer left of them it deletes the next time, and nobody reads it.
        alone = scan.quarantined.get(str(table.spec.one_per), set())
        alone = set() if table.name == table.spec.one_per else alone
        for slide, row in sorted(slides.items()):
            if row["status"] != READY or table.encoder not in (None, *(row["encoders"] or ())):
                continue
            there = len(held.get(table.name, {}).get(slide, set()) - alone)
            wanted = table.spec.rows_of(row)
            if wanted is None:  # as many as any of those with the same keys has
                wanted = len(_keys(siblings, slide, held) - alone) + table.spec.and_slide
            if there == wanted:
                continue
            if not there:
                none[table.name] += 1
                continue
            scan.reindex.setdefault(table.name, set()).add(slide)
            if (table.name, slide) not in listed:
                scan.damaged.append(
                    Damage(
                        table=table.name,
                        kind="missing",
                        id=slide,
                        detail=f"{there} of the slide's {wanted} rows are there.",
                        slide_id=slide,
                    )
                )
    return none
