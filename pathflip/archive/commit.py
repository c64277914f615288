"""Commits to an archive, by its one writer.

Workers write immutable Lance fragments (:func:`pathflip.archive.fragments.write_fragment`), which
stay invisible. The driver of a job holds the archive's lock through :class:`Committer` and is the
only one to commit, in this order: digests of the new files, features and embeddings, regions, and
last the rows of ``slides``. A slide becomes visible when its row in ``slides`` says ready, so a
process that dies between two commits leaves rows that no reader sees; the next committer deletes
them before it does anything else.

Lance accepts the same fragment twice, and upserts by two writers can duplicate keys. Therefore the
ledger (table ``slides``) is checked before anything is appended, the old rows of a slide are
deleted before new ones are written, and row counts are verified after every commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import transactions
from pathflip.archive.archive import READY, Archive
from pathflip.archive.fragments import Shard, create_table, write_shard
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.schema import (
    CHECKSUM,
    slides_schema,
)
from pathflip.archive.settings import meta_rows, read_meta
from pathflip.archive.storage import (
    guarded,
    is_local,
    open_table,
    rows_per_batch,
    sql_in,
)
from pathflip.archive.tables import (
    META,
    SLIDES,
    count_columns,
    dependents_of,
    names_of,
    spec_of,
    tables_of,
)
from pathflip.errors import ArchiveError

FEATURE_BYTES_PER_FRAGMENT = 64 << 20
_SLIDE_COLUMNS = [name for name in slides_schema().names if name != CHECKSUM]


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Result of :meth:`Committer.commit`, as slide ids.

    Attributes:
        written: Slides whose rows were written.
        extended: Ready slides that got the rows of further encoders.
        skipped: Slides already stored with the same fingerprint and encoders.
    """

    written: list[str]
    extended: list[str]
    skipped: list[str]


class Committer:
    """The one writer of an archive, as a context manager that holds its lock.

    Entering deletes what an interrupted writer left behind; see :meth:`recover`.

    Args:
        uri: The archive.

    Raises:
        ArchiveError: On entering, if another process writes the archive (``locked``), or it is
            missing or damaged.
    """

    def __init__(self, uri: str | Path) -> None:
        self.lock = ArchiveLock(uri)
        self.uri = self.lock.uri
        self._stack = ExitStack()

    def __enter__(self) -> Committer:
        read_meta(self.uri)  # do not leave a lock where there is no archive
        with self._stack:
            self._stack.enter_context(self.lock)
            self._refresh()
            self.recovered = self.recover()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def archive(self) -> Archive:
        """The archive as of the last commit of this committer."""
        self._archive.refresh()
        return self._archive

    def ensure_encoder_table(
        self, name: str, *, revision: str, dim: int, mpp: float | None, licence: str
    ) -> str:
        """Create the tables of an encoder unless the archive has them.

        Returns:
            The name of its features table, for :func:`write_fragment`.

        Raises:
            ArchiveError: If the archive holds the encoder in another revision or size, or another
                encoder whose name maps to the same table (``settings``).
        """
        entry: dict[str, Any] = {
            "dim": dim,
            "revision": revision,
            "mpp": mpp,
            "licence": licence,
        }
        entry |= names_of("encoder", name)
        known = self._archive.encoders()
        for other, made in known.items():
            if other != name and made["features_table"] == entry["features_table"]:
                raise ArchiveError(
                    f"Encoders {other} and {name} would share the table {made['features_table']}.",
                    hint="Use another archive for one of them.",
                    code="settings",
                )
        if name in known:
            for key in ("revision", "dim", "mpp"):
                if known[name][key] != entry[key]:
                    raise ArchiveError(
                        f"The archive {self.uri} holds encoder {name} with {key} "
                        f"{known[name][key]}, not {entry[key]}.",
                        hint="Use the same encoder as before, or another archive.",
                        code="settings",
                    )
            return str(entry["features_table"])
        self.add_tables(f"encoder:{name}", entry)
        return str(entry["features_table"])

    def add_tables(self, setting: str, entry: Mapping[str, Any]) -> list[str]:
        """Add an entry to the archive's settings, after creating the tables it names.

        Args:
            setting: Its key: a :attr:`TableSpec.setting`, followed by ``:<name>`` for a family.
            entry: Its value (JSON values).

        Returns:
            The names of the tables that were created.
        """
        settings = self._archive.settings() | {setting: dict(entry)}
        held = self._archive.tables()
        made = [table for name, table in tables_of(settings).items() if name not in (META, *held)]
        with guarded(self.uri, f"make the tables of {setting}"):
            for table in made:
                create_table(self.uri, table.name, table.schema(settings))
        changes: dict[str, Any] = {setting: dict(entry)}
        # A pathflip that knows only an older layout must not write to one with newer tables.
        layout = max((table.spec.since for table in made), default=1)
        if layout > 1:
            changes["schema_version"] = max(layout, settings["schema_version"])
        self.upsert("meta", meta_rows(changes))
        self._refresh()
        return [table.name for table in made]

    def replace_rows(self, table: str, rows: pa.Table) -> None:
        """Replace the rows of some slides in a table computed after ingest, in one commit.

        Args:
            table: The table.
            rows: All rows of those slides; their old rows are deleted first.
        """
        slides = sorted(set(rows["slide_id"].to_pylist()))
        transactions.delete_rows(self.lock, table, "slide_id", slides)
        if shard := self._shard(table, rows, slides):
            transactions.register(self.lock, shard.files)
            transactions.append(self.lock, shard)
        self._refresh()

    def commit(
        self,
        *,
        slides: pa.Table,
        regions: pa.Table | None = None,
        embeddings: Mapping[str, pa.Table] | None = None,
        fragments: Mapping[str, Sequence[str]] | None = None,
        others: Mapping[str, pa.Table] | None = None,
    ) -> Committed:
        """Make slides visible with all of their rows, or leaves the archive as it was.

        A ready slide that is stored with the same fingerprint is skipped, or only gains the rows of
        encoders it lacks. Any other ready slide is rewritten: its old rows are deleted. A slide
        that is not ready (empty, quarantined) gets its row in ``slides`` and nothing else; it never
        replaces a ready slide of the same fingerprint, but does replace one of another.

        Args:
            slides: Rows of ``slides``; ``encoders`` names the encoders embedded in this run.
            regions: Rows of ``regions`` of those slides.
            embeddings: {encoder name: rows of its embeddings table}.
            fragments: {encoder name: shards returned by ``write_fragment``}. They may hold rows of
                slides that are skipped.
            others: {table: rows} of further tables that ingest writes.

        Returns:
            Slides written, extended and skipped.

        Raises:
            ArchiveError: If the disk is full or a commit had no effect; the slides are then not
                visible, and the call may be repeated.
            ValueError: If rows are missing: a slide needs ``n_regions`` regions, as many rows of
                features, and one more of embeddings (the slide's own).
        """
        try:
            rows = {} if regions is None else {"regions": regions}
            for name, of_encoder in (embeddings or {}).items():
                _, entry = self._archive.encoder(name)
                rows[entry["embeddings_table"]] = of_encoder
            shards = [
                Shard.from_json(text)
                for texts in (fragments or {}).values()
                for text in dict.fromkeys(texts)
            ]
            return self._commit(slides, rows | dict(others or {}), shards)
        except BaseException:
            self._stale = True  # part of it may have happened
            raise

    def _commit(
        self,
        slides: pa.Table,
        given: Mapping[str, pa.Table],
        shards: Sequence[Shard],
    ) -> Committed:
        if self._stale:
            self._refresh()
        ledger = self._archive.ledger()
        write: list[str] = []  # all rows anew
        extend: dict[str, list[str]] = {}  # encoders to add
        note: list[str] = []  # only the row in slides
        skipped: list[str] = []
        incoming: dict[str, dict[str, Any]] = {}
        for row in slides.select(
            ["slide_id", "status", "fingerprint", "mpp", "encoders", *count_columns()]
        ).to_pylist():
            slide = row["slide_id"]
            if slide in incoming:
                raise ValueError(f"slide {slide} is there twice")
            incoming[slide] = row
            old = ledger.get(slide)
            same = (
                old is not None
                and old["status"] == READY
                and old["fingerprint"] == row["fingerprint"]
            )
            if row["status"] != READY:
                (skipped if same else note).append(slide)
            elif not same or old is None:
                write.append(slide)
            elif more := sorted(set(row["encoders"] or ()) - set(old["encoders"] or ())):
                extend[slide] = more
            else:
                skipped.append(slide)
        new: list[Shard] = []
        for shard in shards:
            wanted = self._wanted(shard.table, write, extend, incoming)
            if kept := self._narrowed(shard, wanted):
                new.append(kept)
        for table, rows in given.items():
            wanted = self._wanted(table, write, extend, incoming)
            if made := self._shard(table, rows, wanted):
                new.append(made)
        # Regions last: without them nothing finds a slide's rows in other tables.
        new.sort(key=lambda shard: shard.table == "regions")
        self._assert_complete(new, write, extend, incoming)

        chosen = [*write, *extend, *note]
        if not chosen:
            return Committed(written=[], extended=[], skipped=skipped)
        replaced = [slide for slide in (*write, *note) if slide in ledger]
        self._hide([slide for slide in replaced if ledger[slide]["status"] == READY])
        self._delete_rows([*write, *note])
        self._delete_places(
            [s for s in write if s in ledger and ledger[s]["mpp"] not in (None, incoming[s]["mpp"])]
        )
        for slide, names in extend.items():
            self._delete_rows([slide], encoders=names)
        rows = slides.filter(pc.is_in(slides["slide_id"], pa.array([*write, *note], pa.string())))
        extended = {
            slide: {"encoders": sorted({*(ledger[slide]["encoders"] or ()), *names})}
            for slide, names in extend.items()
        }
        rows = pa.concat_tables([rows.select(_SLIDE_COLUMNS), self._changed(extended)])
        transactions.register(
            self.lock, {path: d for shard in new for path, d in shard.files.items()}
        )
        for table in dict.fromkeys(shard.table for shard in new):
            transactions.append(
                self.lock, Shard.joined([shard for shard in new if shard.table == table])
            )
        self.upsert("slides", rows)
        self._refresh()
        return Committed(written=[*write, *note], extended=list(extend), skipped=skipped)

    def recover(self) -> dict[str, int]:
        """Delete rows of slides that are not ready and digest files that have no digest yet.

        Returns:
            {table: rows deleted}.
        """
        removed: dict[str, int] = {}
        for table in self._archive.tables():
            if self._archive.table(table).spec.derived_from is None:
                continue  # imported rows could not be computed again
            dataset = self._archive.dataset(table)
            allowed = self._archive.ready_ids(self._archive.encoder_of(table))
            with guarded(self.uri, f"read the table {table}", damaged=is_local(self.uri)):
                there = pc.unique(dataset.to_table(columns=["slide_id"])["slide_id"]).to_pylist()
            if stray := [slide for slide in there if slide not in allowed]:
                removed[table] = transactions.delete_rows(self.lock, table, "slide_id", stray)
        transactions.register_missing(self.lock, ["meta", *self._archive.tables()])
        self._refresh()
        return removed

    def drop_slides(self, slide_ids: Collection[str], *, keep_imported: bool = False) -> None:
        """Remove slides and all of their rows, as when the file behind a URI has changed.

        Args:
            slide_ids: The slides.
            keep_imported: Whether to keep imported rows, such as captions.
        """
        self._hide(slide_ids)
        self._delete_rows(slide_ids)
        for table in self._archive.tables():
            if self._archive.table(table).spec.imported and not keep_imported:
                transactions.delete_rows(self.lock, table, "slide_id", list(slide_ids))
        self._refresh()

    def drop_rows(self, table: str, slide_ids: Collection[str]) -> None:
        """Remove rows of slides from a table, and from the tables computed from it."""
        tables = {name: self._archive.table(name) for name in self._archive.tables()}
        for name in (*dependents_of(table, tables), table):
            transactions.delete_rows(self.lock, name, "slide_id", list(slide_ids))
        self._refresh()

    def update_slides(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Change columns of slides: paths, patients, labels; the patient in every table.

        Args:
            changes: {slide_id: {column of ``slides``: value}}.
        """
        for ids in transactions.chunks(list(changes)):
            self.upsert("slides", self._changed({slide: changes[slide] for slide in ids}))
        patients = {
            slide: change["patient_id"]
            for slide, change in changes.items()
            if "patient_id" in change
        }
        for table in self._archive.tables():
            if table == SLIDES or "patient_id" not in self._archive.dataset(table).schema.names:
                continue
            for ids in transactions.chunks(list(patients)):
                rows = open_table(self.uri, table).to_table(filter=sql_in("slide_id", ids))
                named = [patients[slide] for slide in rows["slide_id"].to_pylist()]
                at = rows.schema.get_field_index("patient_id")
                rows = rows.set_column(at, "patient_id", pa.array(named, pa.string()))
                self.upsert(table, rows.drop_columns([CHECKSUM]))
        self._refresh()

    def upsert(self, table: str, rows: pa.Table) -> None:
        """Insert or replace rows by key in one commit.

        Slides with rows in other tables go through :meth:`commit`. In ``slides`` this only serves
        to change columns that no other table depends on (aliases, labels, attempts).
        """
        transactions.upsert(self.lock, table, rows)

    def compact(self) -> dict[str, int]:
        """Merge small fragments and drop deleted rows from the files; digest the new files.

        Returns:
            {table: fragments now}.
        """
        fragments: dict[str, int] = {}
        for table in ("meta", *self._archive.tables()):
            dataset = self.lock.open(table)
            rows = dataset.count_rows()
            target = 1 << 20
            spec = spec_of(table)
            if spec is not None and spec.wide:
                target = rows_per_batch(dataset.schema, budget=FEATURE_BYTES_PER_FRAGMENT)
            with guarded(self.uri, f"compact the table {table}"):
                dataset.optimize.compact_files(
                    target_rows_per_fragment=target,
                    batch_size=rows_per_batch(dataset.schema),
                    num_threads=1,
                )
            dataset = open_table(self.uri, table)
            transactions.check_count(self.uri, table, dataset.count_rows(), rows)
            fragments[table] = len(dataset.get_fragments())
        transactions.register_missing(self.lock, ["meta", *self._archive.tables()])
        self._refresh()
        return fragments

    def forget_files(self, paths: Collection[str]) -> None:
        """Drop the digests of files that no longer exist."""
        transactions.forget_files(self.lock, paths)

    # ---- pieces ----------------------------------------------------------------------------

    def _refresh(self) -> None:
        self._archive = Archive(self.uri)
        self._stale = False

    def _wanted(
        self,
        table: str,
        write: Sequence[str],
        extend: Mapping[str, Sequence[str]],
        incoming: Mapping[str, Mapping[str, Any]],
    ) -> list[str]:
        """Return the slides whose rows of a table are to be written."""
        encoder = self._archive.encoder_of(table)
        if encoder is None:
            return list(write)
        anew = [slide for slide in write if encoder in (incoming[slide]["encoders"] or ())]
        return anew + [slide for slide, names in extend.items() if encoder in names]

    def _shard(self, table: str, rows: pa.Table, slides: Sequence[str]) -> Shard | None:
        rows = rows.filter(pc.is_in(rows["slide_id"], pa.array(slides, pa.string())))
        if rows.num_rows == 0:
            return None
        return write_shard(self.uri, table, rows, self._archive.dataset(table).schema)

    def _narrowed(self, shard: Shard, slides: Sequence[str]) -> Shard | None:
        """Return a shard that holds rows of these slides only, rewritten if it must be."""
        if set(shard.rows) <= set(slides):
            return shard
        if not set(shard.rows) & set(slides):
            return None
        from lance.file import LanceFileReader

        with guarded(self.uri, f"read rows of table {shard.table}"):
            rows = pa.concat_tables(
                LanceFileReader(f"{self.uri}/{path}").read_all().to_table() for path in shard.files
            )
        return self._shard(shard.table, rows, slides)

    def _assert_complete(
        self,
        shards: Sequence[Shard],
        write: Sequence[str],
        extend: Mapping[str, Sequence[str]],
        incoming: Mapping[str, Mapping[str, Any]],
    ) -> None:
        have: dict[str, Counter[str]] = {}
        for shard in shards:
            have.setdefault(shard.table, Counter()).update(shard.rows)
        tables = [self._archive.table(name) for name in self._archive.tables()]
        for slide in (*write, *extend):
            row = (self._archive.ledger() if slide in extend else incoming)[slide]
            encoders = extend.get(slide, incoming[slide]["encoders"] or ())
            for name in encoders:
                self._archive.encoder(name)  # refuses those the archive does not hold
            made = [
                table
                for table in tables
                if table.ingested
                and (slide in write if table.encoder is None else table.encoder in encoders)
            ]
            expected = {table.name: table.spec.rows_of(row) for table in made}
            for table, count in expected.items():
                if count is not None and (found := have.get(table, Counter())[slide]) != count:
                    raise ValueError(f"slide {slide} has {found} rows for {table}, not {count}")

    def _changed(self, changes: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        """Return the stored rows of slides with some of their columns changed."""
        schema = pa.schema([field for field in slides_schema() if field.name != CHECKSUM])
        rows = []
        for ids in transactions.chunks(list(changes)):
            stored = open_table(self.uri, "slides").to_table(filter=sql_in("slide_id", ids))
            for row in stored.drop_columns([CHECKSUM]).to_pylist():
                rows.append(row | dict(changes[row["slide_id"]]))
        return pa.Table.from_pylist(rows, schema=schema).select(_SLIDE_COLUMNS)

    def _hide(self, slide_ids: Collection[str]) -> None:
        transactions.delete_rows(self.lock, "slides", "slide_id", list(slide_ids))

    def _delete_rows(
        self, slide_ids: Collection[str], *, encoders: Collection[str] | None = None
    ) -> None:
        """Delete rows computed from slides, in all tables or in those of some encoders.

        Imported rows, such as captions, stay.
        """
        for table in self._archive.tables():
            if self._archive.table(table).spec.derived_from is None:
                continue
            if encoders is None or self._archive.encoder_of(table) in encoders:
                transactions.delete_rows(self.lock, table, "slide_id", list(slide_ids))

    def _delete_places(self, slide_ids: Sequence[str]) -> None:
        """Delete imported rows of slides that belong to places on the grid of their old mpp."""
        for table in self._archive.tables() if slide_ids else ():
            if self._archive.table(table).spec.on_grid:
                transactions.delete_rows(self.lock, table, "slide_id", list(slide_ids))
