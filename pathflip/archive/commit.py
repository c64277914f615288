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

import functools
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip import tracing
from pathflip.archive import transactions
from pathflip.archive.archive import READY, Archive, ledger_of
from pathflip.archive.compaction import (
    FRAGMENT_BYTES,
    day_ago,
    free_versions,
    merge_all,
    merge_some,
)
from pathflip.archive.fragments import (
    Shard,
    create_table,
    merge_small,
    remove_files,
    write_shard,
)
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.schema import CHECKSUM, PATIENT, PICTURE_COLUMNS, slides_schema
from pathflip.archive.settings import meta_rows, read_meta
from pathflip.archive.slide_index import index_slide_ids
from pathflip.archive.storage import guarded, is_local, open_table, sql_in
from pathflip.archive.tables import (
    FILES,
    META,
    PICTURES,
    SLIDES,
    count_columns,
    dependents_of,
    names_of,
    tables_of,
)
from pathflip.errors import ArchiveError

MERGED_BYTES = 64 << 20
"""Bytes of a fragment that is made of the small ones of a commit."""
FREE_EVERY_S = 3600.0
"""Seconds between two cleanings of an archive that is written all the time."""
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
        self._freed = time.monotonic()
        self._failed = False
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
        self._refresh()
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
        entry: dict[str, Any] = dict(dim=dim, revision=revision, mpp=mpp, licence=licence)
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
        if entry["embeddings_table"] in self._archive.tables():
            raise ArchiveError(
                f"The table {entry['embeddings_table']} of {self.uri} holds vectors of a model or "
                "of a slide encoder.",
                hint="Use another archive for one of them.",
                code="settings",
            )
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
            with tracing.span("commit", slides=len(slides)):
                return self._commit(slides, rows | dict(others or {}), shards)
        except BaseException:
            self._failed = True  # part of it may have happened
            raise

    def _commit(
        self,
        slides: pa.Table,
        given: Mapping[str, pa.Table],
        shards: Sequence[Shard],
    ) -> Committed:
        if self._failed:
            self._refresh()
            self.recover()
            self._failed = False
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
        slides, pictures = self._parted(slides)
        new: list[Shard] = []
        for shard in shards:
            wanted = self._wanted(shard.table, write, note, extend, incoming)
            if kept := self._narrowed(shard, wanted):
                new.append(kept)
        for table, rows in {**given, **pictures}.items():
            wanted = self._wanted(table, write, note, extend, incoming)
            if made := self._shard(table, rows, wanted, slides):
                new.append(made)
        self._assert_complete(new, write, extend, incoming)

        chosen = [*write, *extend, *note]
        if not chosen:
            return Committed(written=[], extended=[], skipped=skipped)
        new, spent = merge_small(self.uri, new, small=FRAGMENT_BYTES, size=MERGED_BYTES)
        # Regions last: without them nothing finds a slide's rows in other tables.
        new.sort(key=lambda shard: shard.table == "regions")
        # Slides the ledger does not know have no rows: see recover.
        replaced = [slide for slide in (*write, *note) if slide in ledger]
        self._hide([slide for slide in replaced if ledger[slide]["status"] == READY])
        self._delete_rows(replaced)
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
        transactions.register(
            self.lock, {path: d for shard in new for path, d in shard.files.items()}
        )
        for table in dict.fromkeys(shard.table for shard in new):
            transactions.append(
                self.lock, Shard.joined([shard for shard in new if shard.table == table])
            )
        columns = [name for name in _SLIDE_COLUMNS if name in rows.column_names]
        changed = self._changed(extended).select(columns)
        fresh = not replaced and not extend
        self.upsert(SLIDES, pa.concat_tables([rows.select(columns), changed]), fresh=fresh)
        self._refresh(ledger | ledger_of(rows) | _encoders(ledger, extended))
        remove_files(self.uri, spent)
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
            if self._archive.table(table).spec.any_status:
                allowed = set(self._archive.ledger())
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
        apart = PICTURES in self._archive.tables()
        for ids in [list(changes)] if apart else transactions.chunks(list(changes)):
            self.upsert(SLIDES, self._changed({slide: changes[slide] for slide in ids}))
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

    def upsert(self, table: str, rows: pa.Table, *, fresh: bool = False) -> None:
        """Insert or replace rows by key in one commit; ``fresh`` rows are known to be new.

        Slides with rows in other tables go through :meth:`commit`. In ``slides`` this only serves
        to change columns that no other table depends on (aliases, labels, attempts).
        """
        if table == SLIDES:
            rows, pictures = self._parted(rows, every=False)
            for name, of_slides in pictures.items():
                transactions.upsert(self.lock, name, of_slides)
        if fresh:
            transactions.insert(self.lock, table, rows)
        else:
            transactions.upsert(self.lock, table, rows)

    def compact(self) -> dict[str, int]:
        """Merge small fragments, drop deleted rows from the files, digest the new files.

        Returns:
            {table: fragments now}.
        """
        fragments = merge_all(self.lock, self._all_tables())
        self._refresh(self._archive.ledger())
        return fragments

    def tidy(self) -> None:
        """Merge and free what is due while an archive is being written, at little cost."""
        merge_some(self.lock, self._all_tables())
        if time.monotonic() - self._freed > FREE_EVERY_S:
            free_versions(self.lock, self._all_tables(), before=day_ago())
            self._freed = time.monotonic()
        self._refresh(self._archive.ledger())

    def index_slides(self) -> None:
        """Make a slide's rows quick to find in every large table; see :mod:`slide_index`."""
        for table in self._archive.tables():
            if self._archive.table(table).spec.per_slide:
                index_slide_ids(self.lock, table)
        self._refresh()

    def forget_files(self, paths: Collection[str]) -> None:
        """Drop the digests of files that no longer exist."""
        transactions.forget_files(self.lock, paths)

    # ---- pieces ----------------------------------------------------------------------------

    def _refresh(self, ledger: dict[str, dict[str, Any]] | None = None) -> None:
        """Open the newest state; its ledger need not be read where the caller knows it."""
        self._archive = Archive(self.uri, ledger=ledger)

    def _parted(
        self, slides: pa.Table, *, every: bool = True
    ) -> tuple[pa.Table, dict[str, pa.Table]]:
        """Part rows of ``slides`` from the rows of ``pictures``, in archives that have the table.

        Args:
            slides: Rows with or without columns of pictures.
            every: Whether ready slides get a row of pictures although they have none.
        """
        stored = self._archive.dataset(SLIDES).schema
        pictures = {}
        there = [name for name in PICTURE_COLUMNS if name in slides.column_names]
        if PICTURES in self._archive.tables() and there:
            own = slides.select(["slide_id", *there])
            known = [pc.is_valid(slides[name]) for name in there]
            if every:
                known.append(pc.equal(slides["status"], READY))
            pictures = {PICTURES: own.filter(functools.reduce(pc.or_, known))}
        kept = [name for name in slides.column_names if name in stored.names or name not in there]
        return slides.select(kept), pictures

    def _all_tables(self) -> list[str]:
        """Return all tables, ``files`` last: others have their new files registered there."""
        return [META, *(name for name in self._archive.tables() if name != FILES), FILES]

    def _wanted(
        self,
        table: str,
        write: Sequence[str],
        note: Sequence[str],
        extend: Mapping[str, Sequence[str]],
        incoming: Mapping[str, Mapping[str, Any]],
    ) -> list[str]:
        """Return the slides whose rows of a table are to be written."""
        encoder = self._archive.encoder_of(table)
        if encoder is None:
            return [*write, *note] if self._archive.table(table).spec.any_status else list(write)
        anew = [slide for slide in write if encoder in (incoming[slide]["encoders"] or ())]
        return anew + [slide for slide, names in extend.items() if encoder in names]

    def _shard(
        self, table: str, rows: pa.Table, slides: Sequence[str], incoming: pa.Table | None = None
    ) -> Shard | None:
        rows = rows.filter(pc.is_in(rows["slide_id"], pa.array(slides, pa.string())))
        if rows.num_rows == 0:
            return None
        schema = self._archive.dataset(table).schema
        if PATIENT in rows.column_names and PATIENT not in schema.names:
            rows = rows.drop_columns([PATIENT])  # that of slides holds
        if table != SLIDES and PATIENT in schema.names and PATIENT not in rows.column_names:
            # Embeddings of archives before layout 4 repeat the patient.
            of = self._archive.slides(columns=["slide_id", PATIENT], slide_ids=slides)
            people = pa.concat_tables(
                [of if incoming is None else incoming.select(of.column_names), of]
            )
            at = pc.index_in(rows["slide_id"], people["slide_id"].combine_chunks())
            rows = rows.append_column(PATIENT, people[PATIENT].take(at))
        return write_shard(self.uri, table, rows, schema)

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
        stored = open_table(self.uri, SLIDES)
        schema = pa.schema([field for field in stored.schema if field.name != CHECKSUM])
        if not changes:
            return schema.empty_table()
        where = pc.field("slide_id").isin(list(changes))
        rows = stored.to_table(columns=schema.names, filter=where).to_pylist()
        return pa.Table.from_pylist(
            [row | dict(changes[row["slide_id"]]) for row in rows], schema=schema
        )

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


def _encoders(
    ledger: Mapping[str, dict[str, Any]], extended: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the ledger's rows of slides that got further encoders."""
    return {slide: ledger[slide] | dict(change) for slide, change in extended.items()}
