"""Repair a damaged archive, giving up only what cannot be read any more."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive.annotation_table import count_again
from pathflip.archive.commit import Committer
from pathflip.archive.damage import Report
from pathflip.archive.fragments import create_table
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.recover import Salvager, salvage
from pathflip.archive.settings import meta_rows, read_meta
from pathflip.archive.storage import (
    damaged_error,
    data_paths,
    guarded,
    is_local,
    known_digests,
    local_tables,
    newest_known_version,
    normalise,
    open_table,
    table_uri,
)
from pathflip.archive.tables import META, Table, count_columns, spec_of, specs_of, tables_of
from pathflip.archive.verify import verify_with
from pathflip.errors import ArchiveError


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """Result of :func:`repair`.

    Attributes:
        actions: Sentences, one for each action taken.
        redo: Ids of slides that lost rows; the next ingest of their files writes them again.
        report: State of the archive after the repair.
    """

    actions: list[str]
    redo: list[str]
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"actions": self.actions, "redo": self.redo, "report": self.report.to_json()}


def repair(uri: str | Path) -> Repaired:
    """Repair a damaged archive, giving up only what cannot be read any more.

    * A table that does not open: manifests are moved aside, newest first, until a version opens; a
      table without any is created again, empty. ``meta`` is completed from the other tables.
    * A damaged data file: rows with a correct checksum are copied to a new file and the old file is
      moved aside. Versions older than the repair may no longer open.
    * A slide that has lost rows of a table computed after ingest (vectors of a trained model)
      loses its other rows there too, and the command that computed them does so again. Captions
      that are lost have to be imported again, and annotations that are lost drawn again.
    * A ready slide that has lost rows written by ingest: all of its rows are deleted, and its row
      in ``slides`` becomes ``quarantined``, reason ``damaged_rows``, with an empty fingerprint, so
      that the same ingest command processes it again. A slide whose own row is lost is unknown to
      the archive, which has the same effect.

    Files that were moved aside are in ``<archive>/.damaged``.

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
    with Salvager() as salvager:
        return _repaired(salvager, where)


def _repaired(salvager: Salvager, where: str) -> Repaired:
    actions: list[str] = []
    with ArchiveLock(where):
        for table in sorted({*tables_of({}), *local_tables(where)}):
            if spec_of(table) is not None:
                actions += _restore_table(where, table)
        report = verify_with(salvager, where)
        broken = {(d.table, d.fragment) for d in report.damaged if d.fragment is not None}
        moved = {d.id for d in report.damaged if d.kind == "file"}
        for table, fragment in sorted(broken):
            paths = data_paths(open_table(where, table), table)
            moved |= {path for path, number in paths.items() if number == fragment}
            actions.append(_rewrite_fragment(salvager, where, table, fragment))
        for path in sorted(moved):
            if Path(where, path).exists():
                _move_aside(where, Path(where, path))
                actions.append(f"Moved the damaged file {path} aside.")
        actions += _complete_meta(where)
        actions += count_again(where)
        if actions:
            report = verify_with(salvager, where)
    with Committer(where) as committer:
        rows = committer.archive.dataset("slides").to_table()
        rows = rows.filter(pc.is_in(rows["slide_id"], pa.array(report.slides, pa.string())))
        committer.drop_slides(report.slides, keep_imported=True)
        committer.upsert("slides", _unready(rows))
        for table, slides in report.reindex.items():
            committer.drop_rows(table, slides)
            command = committer.archive.table(table).spec.made_by
            actions.append(
                f"Table {table}: removed the rows of {len(slides)} slides; make them again: "
                f"pathflip {command}."
            )
        committer.forget_files([p for p in known_digests(where) if not Path(where, p).exists()])
    if report.slides:
        actions.append(f"{len(report.slides)} slides have lost rows; ingest them again.")
    return Repaired(actions=actions, redo=report.slides, report=verify_with(salvager, where))


def _restore_table(uri: str, table: str) -> list[str]:
    """Restore the newest version of a table that opens."""
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
            if not any(spec.family for spec in specs_of(table)):
                raise damaged_error(uri, f"the settings and every version of {table} are lost")
            # Its width is not known; the next ingest adds the encoder again.
            _move_aside(uri, Path(table_uri(uri, table)))
            return [f"Table {table}: no version opens, moved aside."]
        if Path(table_uri(uri, table)).exists():
            _move_aside(uri, Path(table_uri(uri, table)))
        with guarded(uri, f"make the table {table}"):
            create_table(uri, table, schema)
        return [f"Table {table}: no version opens, created again, empty."]


def _manifests(folder: Path) -> dict[int, Path]:
    """Return {version: manifest}. Lance names them by 2**64 - 1 - version, or by version."""
    found: dict[int, Path] = {}
    for path in folder.glob("*.manifest"):
        if path.stem.isdigit():
            number = int(path.stem)
            found[number if number < 2**63 else 2**64 - 1 - number] = path
    return found


def _schema_of(uri: str, table: str) -> pa.Schema | None:
    """Return the schema of a table whose versions are lost, from what the settings say."""
    settings: dict[str, Any] = {}
    if table != META:
        with suppress(ArchiveError):
            settings = read_meta(uri)
    known = tables_of(settings).get(table)
    if known is None and (spec := spec_of(table)) is not None and not spec.family:
        known = Table(name=table, spec=spec)
    try:
        return None if known is None else known.schema(settings)
    except KeyError:
        return None


def _rewrite_fragment(salvager: Salvager, uri: str, table: str, fragment: int) -> str:
    """Replace a damaged fragment by its intact rows, in one commit."""
    import lance
    from lance.fragment import write_fragments

    good, _ = salvage(salvager, uri, table, fragment)
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
    """Add settings that ``meta`` has lost, and tables that it names and that are gone."""
    actions: list[str] = []
    dataset = open_table(uri, "meta")
    rows = dataset.to_table()
    meta = {row["key"]: json.loads(row["value"]) for row in rows.to_pylist()}
    found: dict[str, Any] = {}
    for table in local_tables(uri):
        if not (specs := specs_of(table)):
            continue
        noted = open_table(uri, table).schema.metadata or {}
        if table == "regions":
            found |= {key.decode(): json.loads(value) for key, value in noted.items()}
        for spec in specs:
            value = noted.get((spec.setting or "").encode())
            if spec.family and value is not None:
                entry = json.loads(value)
                found[f"{spec.setting}:{entry.pop('name')}"] = entry
            elif spec.setting is not None and not spec.family:
                found[spec.setting] = {} if value is None else json.loads(value)
    if "schema_version" in found:  # as ``regions`` noted it; tables may have been added since
        layouts = [table.spec.since for table in tables_of(found).values()]
        found["schema_version"] = max(found["schema_version"], *layouts)
    lost = {key: value for key, value in found.items() if key not in meta}
    if lost:
        import lance

        with guarded(uri, "complete the settings"):
            lance.write_dataset(meta_rows(lost), table_uri(uri, "meta"), mode="append")
        actions.append(f"Table meta: brought back {', '.join(sorted(lost))}.")
    for table in tables_of(read_meta(uri)):
        actions += _restore_table(uri, table)
    return actions


def _move_aside(uri: str, path: Path) -> None:
    folder = Path(uri, ".damaged", datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ"))
    target = folder / path.relative_to(uri)
    target.parent.mkdir(parents=True)
    shutil.move(path, target)


def _unready(rows: pa.Table) -> pa.Table:
    """Return rows of ``slides`` that make the next ingest process these slides again."""
    by_id = {row["slide_id"]: row for row in rows.to_pylist()}
    change = {
        "status": "quarantined",
        "reason": "damaged_rows",
        "message": "Rows of this slide in the archive were damaged and have been removed; run the "
        "same ingest command again.",
        "stage": "repair",
        "fingerprint": "",
        "encoders": [],
        "n_patches": 0,
        **dict.fromkeys(count_columns(), 0),
    }
    return pa.Table.from_pylist([row | change for row in by_id.values()], schema=rows.schema)
