"""Reading an archive: a snapshot of its tables, of which only ready slides have visible rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pathflip.archive.settings import CAPTIONS, entries_of, open_meta, settings_in, slots_of
from pathflip.archive.slide_names import NAME_COLUMNS, SlideNames
from pathflip.archive.storage import (
    damaged_error,
    guarded,
    is_local,
    normalise,
    open_table,
)
from pathflip.errors import ArchiveError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pathflip.archive.tables import Table
    from pathflip.viewer import Viewer

T = TypeVar("T")

READY = "ready"
LEDGER_COLUMNS = ("status", "fingerprint", "mpp", "encoders", "uri", "aliases")


class _Kept(NamedTuple):
    """A value that was computed, and the tables of whose rows it is made; None for all of them."""

    value: Any
    of: Collection[str] | None


class Archive:
    """A snapshot of an archive, for reading.

    The tables are opened once, ``slides`` before the rest, so every slide that is ready here has
    all of its rows here, whatever is being written meanwhile; :meth:`refresh` moves to the newest
    state, :meth:`successor` opens it beside this one. Only ready slides have visible rows.

    Args:
        uri: Path or URI of the archive.
        ledger: Result of :meth:`ledger`, where the caller knows it.

    Raises:
        ArchiveError: If there is no archive (``missing_archive``), it is damaged (``damaged``; the
            hint names the repair command), unreachable, or of a newer layout (``schema_version``).
    """

    def __init__(self, uri: str | Path, *, ledger: dict[str, dict[str, Any]] | None = None) -> None:
        self.uri = normalise(uri)
        self._datasets: dict[str, Any] = {}
        self._cache: dict[str, _Kept] = {}
        self.refresh()
        if ledger is not None:
            self.cached("ledger", lambda: ledger, of=("slides",))

    def __repr__(self) -> str:
        return f"Archive({self.uri!r})"

    def _repr_html_(self) -> str:
        from pathflip.display import archive_page

        return archive_page(self)

    def view(
        self,
        slide: str | None = None,
        *,
        run: str | Path | None = None,
        region: tuple[int, int, int] | None = None,
        height: int = 600,
    ) -> Viewer:
        """Return the viewer of a slide, or of the whole archive, to show in a notebook.

        Its server, ``pathflip view`` in another process, listens on this machine and ends with
        this process.

        Args:
            slide: The slide, see :meth:`slide`.
            run: Folder of the run that searches and grounds in the viewer.
            region: Square to fly to: x0, y0 and side, level-0 px.
            height: Height of the frame, px.

        Raises:
            ArchiveError: If there is no such slide (``unknown_slide``).
            ConfigError: If the server does not start (``not_started``).
        """
        from pathflip.viewer import open_viewer

        slide_id = None if slide is None else self.resolve(slide)
        return open_viewer(self.uri, slide_id, run=run, region=region, height=height)

    def refresh(self) -> None:
        """Move to the newest committed state, with what is known of tables that did not change."""
        from pathflip.archive.tables import META, tables_of

        self._meta_dataset = open_meta(self.uri)
        self._meta = settings_in(self.uri, self._meta_dataset)
        self._tables = tables_of(self._meta)
        before, self._datasets = self._datasets, {}
        for name in self._tables:
            if name != META:
                self._datasets[name] = self._open(name, before)
        same = {name for name, item in self._datasets.items() if item is before.get(name)}
        # Another object: a successor begins with what its predecessor still uses, and adds to.
        self._cache = {
            key: kept
            for key, kept in list(self._cache.items())
            if kept.of is not None and same.issuperset(kept.of)
        }

    def _open(self, table: str, before: Mapping[str, Any]) -> Any:
        """Open a table's newest version; the one that was open before if it is that."""
        held = before.get(table)
        if held is not None:
            with guarded(self.uri, "look for new commits"):
                if held.version == held.latest_version:
                    return held
        # Versions of a table share what Lance keeps of it: its files' metadata, parts of indexes.
        return open_table(self.uri, table, session=None if held is None else held.session())

    def successor(self) -> Archive:
        """Return the newest committed state; this one stays as it is.

        Raises:
            ArchiveError: See :class:`Archive`.
        """
        found = copy(self)
        found.refresh()
        return found

    def is_newest(self) -> bool:
        """Return whether nothing was committed since this state was read."""
        opened = (self._meta_dataset, *self._datasets.values())
        with guarded(self.uri, "look for new commits"):
            return all(item.version == item.latest_version for item in opened)

    def cached(self, key: str, make: Callable[[], T], *, of: Collection[str] | None = None) -> T:
        """Return the value of ``make()``, computed once for each snapshot.

        Args:
            key: Name of the value.
            make: Computes it.
            of: Tables of whose rows alone it is made: while none of them changes, later states have
                it as well. None makes it anew for every state.
        """
        kept = self._cache.get(key)
        if kept is None:
            kept = self._cache[key] = _Kept(make(), of)
        value: T = kept.value
        return value

    def dataset(self, table: str) -> Any:
        """Return the ``lance.LanceDataset`` of a table at this snapshot, unfiltered."""
        return self._datasets[table]

    def tables(self) -> list[str]:
        """Return the names of all tables but ``meta``."""
        return list(self._datasets)

    def table(self, name: str) -> Table:
        """Return a table's spec with the encoder or model it belongs to."""
        return self._tables[name]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the archive: its table ``meta``."""
        return dict(self._meta)

    def tiling(self) -> dict[str, Any]:
        """Return the grid slides are cut on: the fields of :class:`pathflip.geometry.Tiling`."""
        return dict(self._meta["tiling"])

    @property
    def slots(self) -> int:
        """Patch slots of a region."""
        return slots_of(self._meta["tiling"])

    def encoders(self) -> dict[str, dict[str, Any]]:
        """Return {name: {dim, revision, mpp, licence, features_table, embeddings_table}}."""
        return entries_of(self._meta, "encoder")

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the trained models whose vectors of slides and regions are here.

        {name: {dim, fingerprint, encoder, encoder_revision, run, created_at, embeddings_table}}.
        """
        return entries_of(self._meta, "model")

    def slide_encoders(self) -> dict[str, dict[str, Any]]:
        """Return {name: {dim, revision, licence, created_at, embeddings_table}} of imports."""
        return entries_of(self._meta, "slide_encoder")

    def model(self, name: str | None = None) -> tuple[str, dict[str, Any]]:
        """Return a model's name and entry; without a name, those of the only one.

        Raises:
            ArchiveError: If the archive does not hold it (``not_indexed``), or the choice is not
                clear (``unknown_model``).
        """
        known = self.models()
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name is None or name not in known:
            asked = "no model was named" if name is None else f"none of them is {name!r}"
            raise ArchiveError(
                f"The archive {self.uri} holds vectors of {len(known)} models and {asked}.",
                hint=f"Make them: pathflip index --archive {self.uri} --run RUN"
                + (f"; it holds {', '.join(known)}." if known else "."),
                code="unknown_model" if name is None and known else "not_indexed",
            )
        return name, known[name]

    def encoder(self, name: str | None = None) -> tuple[str, dict[str, Any]]:
        """Return an encoder's name and entry; without a name, those of the only one.

        Raises:
            ArchiveError: If the archive does not hold it, or the choice is not clear.
        """
        known = self.encoders()
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name is None or name not in known:
            asked = "no encoder was named" if name is None else f"it has no encoder {name!r}"
            raise ArchiveError(
                f"The archive {self.uri} holds {len(known)} encoders and {asked}.",
                hint=f"Name one of: {', '.join(known) or '(none yet)'}.",
                code="unknown_encoder",
            )
        return name, known[name]

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Return the slides: {slide_id: row}.

        A row has status, fingerprint, mpp, encoders, uri, aliases and the counts of rows that the
        slide has in other tables (n_regions).
        """
        from pathflip.archive.tables import count_columns

        def read() -> dict[str, dict[str, Any]]:
            rows = self._read("slides", columns=["slide_id", *LEDGER_COLUMNS, *count_columns()])
            return ledger_of(rows)

        return self.cached("ledger", read, of=("slides",))

    def slides(
        self,
        status: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        slide_ids: Sequence[str] | None = None,
    ) -> pa.Table:
        """Return the slides, sorted by ``slide_id``.

        Args:
            status: Only slides of this status (ready, empty, quarantined).
            columns: Columns to return; by default all but the two images.
            slide_ids: Only these slides.
        """
        import pyarrow.compute as pc

        from pathflip.archive.schema import PICTURE_COLUMNS

        names = self._datasets["slides"].schema.names
        wanted = list(columns or [name for name in names if name not in PICTURE_COLUMNS])
        where = None if status is None else pc.field("status") == status
        if slide_ids is None:
            return self._slides(wanted, where=where)
        own = pc.field("slide_id").isin(list(slide_ids))
        return self._slides(wanted, where=own if where is None else where & own, own=own)

    def slide(self, name: str) -> dict[str, Any]:
        """Return one slide's row, images included.

        Args:
            name: A ``slide_id``, or another name that only this slide goes by; see
                :mod:`pathflip.archive.slide_names`.

        Raises:
            ArchiveError: If no slide, or more than one, goes by that name.
        """
        import pyarrow.compute as pc

        from pathflip.archive.schema import PICTURE_COLUMNS

        columns = dict.fromkeys((*self._datasets["slides"].schema.names, *PICTURE_COLUMNS))
        where = pc.field("slide_id") == self.resolve(name)
        row: dict[str, Any] = self._slides(list(columns), where=where, own=where).to_pylist()[0]
        return row

    def resolve(self, name: str) -> str:
        """Return the ``slide_id`` for an id or a name of one slide; see :meth:`slide`."""
        import difflib

        if name in self.ledger():
            return name
        found = self.names().find(name)
        if len(found) == 1:
            return found[0]
        if found:
            hint = f"Use the id: {', '.join(found[:5])}."
            message = f"{len(found)} slides of {self.uri} are called {name!r}."
        else:
            near = difflib.get_close_matches(name, self.names().short(), n=3, cutoff=0.4)
            hint = f"Did you mean {', '.join(near)}?" if near else "List them: pathflip slides list"
            message = f"The archive {self.uri} has no slide {name!r}."
        raise ArchiveError(message, hint=hint, code="unknown_slide")

    def names(self) -> SlideNames:
        """Return the names that the slides go by, whatever their status."""
        return self.cached(
            "names",
            lambda: SlideNames.from_rows(self.slides(columns=NAME_COLUMNS).to_pylist()),
            of=("slides",),
        )

    def regions(
        self, slide_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return the regions of one ready slide, or of all, sorted by ``region_id``."""
        if slide_id is None:
            return self._ready_rows("regions", columns)
        return self._slide_rows("regions", self._ready(slide_id), columns)

    def features(self, slide_id: str, encoder: str | None = None) -> pa.Table:
        """Return a ready slide's patch features, sorted by ``region_id``.

        Columns: region_id, slide_id, features (fp16 [slots * dim], slot-major, masked slots zero).

        Args:
            slide_id: The slide, see :meth:`slide`.
            encoder: The encoder; may be left out when the archive holds one.
        """
        name, entry = self.encoder(encoder)
        slide = self._ready(slide_id)
        if name not in self.ledger()[slide]["encoders"]:
            raise ArchiveError(
                f"Slide {slide} has no features of encoder {name}.",
                hint=f"Run: pathflip ingest … --archive {self.uri} --encoder {name}",
                code="unknown_encoder",
            )
        columns = ["region_id", "slide_id", "features"]
        return self._slide_rows(entry["features_table"], slide, columns)

    def written(self, slide_id: str, encoder: str) -> str:
        """Return a digest of what was written of a ready slide: its regions and their features.

        What is computed from these may be kept for as long as this stays the same.
        """
        from pathflip.archive.schema import CHECKSUM

        tables = ("regions", self.encoder(encoder)[1]["features_table"])

        def read() -> str:
            digest = sha256()
            for table in tables:
                rows = self._slide_rows(table, slide_id, [CHECKSUM])
                digest.update("\n".join([table, *rows[CHECKSUM].to_pylist()]).encode())
            return digest.hexdigest()

        return self.cached(f"written/{encoder}/{slide_id}", read, of=tables)

    def features_array(
        self, slide_id: str, encoder: str | None = None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
        """Return a slide's features as arrays.

        Returns:
            features float16 [R, slots, dim]; mask bool [R, slots], True where a patch is; the
            region ids [R], in the order of :meth:`regions`.
        """
        name, entry = self.encoder(encoder)
        rows = self.features(slide_id, name)
        regions = self.regions(slide_id, columns=["region_id", "patch_mask"])
        ids: list[str] = rows["region_id"].to_pylist()
        if ids != regions["region_id"].to_pylist():
            raise damaged_error(self.uri, f"regions and features of slide {slide_id} differ")
        shape = (len(ids), self.slots, entry["dim"])
        features = vectors(rows["features"]).reshape(shape)
        mask = vectors(regions["patch_mask"]).reshape(shape[:2]) != 0
        return features, mask, ids

    def embeddings(self, encoder: str | None = None, *, model: str | None = None) -> pa.Table:
        """Return the embeddings of ready slides and their regions, sorted by ``id``.

        Args:
            encoder: Means of this encoder's features, or the imported vectors of this slide
                encoder; may be left out when there is one patch encoder.
            model: The vectors of this trained model instead.
        """
        entry = self.slide_encoders().get(encoder or "") if model is None else None
        if entry is None:
            _, entry = self.encoder(encoder) if model is None else self.model(model)
        return self._with_patients(self._ready_rows(entry["embeddings_table"], None))

    def slide_embeddings(self, slide_id: str, encoder: str | None = None) -> pa.Table:
        """Return a ready slide's rows of an encoder's embeddings, sorted by ``id``."""
        _, entry = self.encoder(encoder)
        return self._with_patients(
            self._slide_rows(entry["embeddings_table"], self._ready(slide_id), None)
        )

    def captions(self, source: str | None = None) -> pa.Table:
        """Return the text of ready slides, sorted by slide, then source.

        Columns: caption_id, slide_id, source, text, sentences, statements, model, qa. Empty when
        no captions were imported.

        Args:
            source: Only captions from this source.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        from pathflip.archive.schema import CHECKSUM, captions_schema

        names = [name for name in captions_schema().names if name != CHECKSUM]
        if CAPTIONS not in self._datasets:
            return captions_schema().empty_table().select(names)
        where = None if source is None else pc.field("source") == source
        rows = self._read(CAPTIONS, columns=names, where=where)
        rows = rows.filter(
            pc.is_in(rows["slide_id"], pa.array(sorted(self.ready_ids()), pa.string()))
        )
        return rows.sort_by([("slide_id", "ascending"), ("source", "ascending")])

    def stats(self) -> dict[str, Any]:
        """Return counts over ready slides, the encoders, slides by status, and bytes stored."""
        from collections import Counter

        import pyarrow.compute as pc

        from pathflip.archive.annotations import AnnotationStore

        slides = self.slides(columns=["slide_id", "status", "n_patches"])
        ready = slides.filter(pc.field("status") == READY)
        regions = self._ready_rows("regions", ["slide_id"]).num_rows
        encoders = {
            name: {
                "dim": entry["dim"],
                "regions": self._ready_rows(entry["features_table"], ["slide_id"]).num_rows,
                "revision": entry["revision"],
                "licence": entry["licence"],
            }
            for name, entry in self.encoders().items()
        }
        with guarded(self.uri, "list the files"):
            size = sum(
                sum(batch.column("size_bytes").to_pylist())
                for dataset in self._datasets.values()
                for batch in dataset.all_files()
            )
        return {
            "slides": ready.num_rows,
            "regions": regions,
            "patches": int(pc.sum(ready["n_patches"]).as_py() or 0),
            "encoders": encoders,
            "models": {name: entry["encoder"] for name, entry in self.models().items()},
            "slide_encoders": {
                name: {key: entry[key] for key in ("dim", "revision", "licence")}
                for name, entry in self.slide_encoders().items()
            },
            "captions": self.captions().filter(pc.field("text") != "").num_rows,
            "annotations": AnnotationStore(self.uri).count(),
            "bytes": size,
            "status": dict(Counter(slides["status"].to_pylist())),
        }

    def ready_ids(self, encoder: str | None = None) -> set[str]:
        """Return the ids of ready slides, or of those that have an encoder's features."""
        return {
            slide_id
            for slide_id, row in self.ledger().items()
            if row["status"] == READY and (encoder is None or encoder in row["encoders"])
        }

    def encoder_of(self, table: str) -> str | None:
        """Return the encoder a table's rows were computed with; None if it depends on none."""
        return self._tables[table].encoder

    def _ready(self, name: str) -> str:
        slide_id = self.resolve(name)
        status = self.ledger()[slide_id]["status"]
        if status != READY:
            raise ArchiveError(
                f"Slide {slide_id} is {status} and has no regions.",
                hint=f"See: pathflip slides show {slide_id} --archive {self.uri}",
                code="not_ready",
            )
        return slide_id

    def _slides(self, columns: Sequence[str], *, where: Any, own: Any = None) -> pa.Table:
        """Return columns of slides, sorted; pictures come from their table, where there is one.

        Args:
            columns: Columns of ``slides`` and of ``pictures``.
            where: Condition on slides.
            own: Condition on pictures; all are read without.
        """
        import pyarrow.compute as pc

        from pathflip.archive.schema import PICTURE_COLUMNS
        from pathflip.archive.tables import PICTURES

        apart = [c for c in columns if c in PICTURE_COLUMNS and PICTURES in self._datasets]
        if not apart:
            return self._read("slides", columns=columns, where=where, sort=True)
        wanted = [column for column in columns if column not in apart]
        read = list(dict.fromkeys([*wanted, "slide_id"]))
        rows = self._read("slides", columns=read, where=where, sort=True)
        pictures = self._read(PICTURES, columns=["slide_id", *apart], where=own)
        at = pc.index_in(rows["slide_id"], pictures["slide_id"].combine_chunks())
        for name in apart:
            rows = rows.append_column(name, pictures[name].take(at))
        return rows.select(list(columns))

    def _with_patients(self, rows: pa.Table) -> pa.Table:
        """Return rows of embeddings with the patient of each slide behind its id."""
        import pyarrow.compute as pc

        from pathflip.archive.schema import PATIENT

        if PATIENT in rows.column_names:  # archives before layout 4 keep it there
            return rows
        slides = self.cached(
            "patients", lambda: self.slides(columns=["slide_id", PATIENT]), of=("slides",)
        )
        at = pc.index_in(rows["slide_id"], slides["slide_id"].combine_chunks())
        place = rows.column_names.index("slide_id") + 1
        return rows.add_column(place, PATIENT, slides[PATIENT].take(at))

    def _slide_rows(self, table: str, slide_id: str, columns: Sequence[str] | None) -> pa.Table:
        import pyarrow.compute as pc

        return self._read(table, columns=columns, where=pc.field("slide_id") == slide_id, sort=True)

    def _ready_rows(self, table: str, columns: Sequence[str] | None) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = None if columns is None else list(dict.fromkeys([*columns, "slide_id"]))
        rows = self._read(table, columns=wanted, sort=True)
        ready = pa.array(sorted(self.ready_ids(self.encoder_of(table))), pa.string())
        rows = rows.filter(pc.is_in(rows["slide_id"], ready))
        return rows if columns is None else rows.select(list(columns))

    def _read(
        self,
        table: str,
        *,
        columns: Sequence[str] | None = None,
        where: Any = None,
        sort: bool = False,
    ) -> pa.Table:
        import pyarrow.compute as pc

        key = self._tables[table].spec.key
        wanted = None if columns is None else list(columns)
        extra = [key] if sort and wanted is not None and key not in wanted else []
        damaged = is_local(self.uri)
        with guarded(self.uri, f"read the table {table}", damaged=damaged):
            rows = self._datasets[table].to_table(
                columns=None if wanted is None else [*wanted, *extra], filter=where
            )
        if sort:
            order = pc.sort_indices(rows[key]).to_numpy()
            if (order[1:] < order[:-1]).any():  # rows already in order need no copy
                rows = rows.take(order)
        return rows.drop_columns(extra) if extra else rows


def ledger_of(slides: pa.Table) -> dict[str, dict[str, Any]]:
    """Return rows of ``slides`` as :meth:`Archive.ledger` does."""
    from pathflip.archive.tables import count_columns

    columns = ["slide_id", *LEDGER_COLUMNS, *count_columns()]
    return {row.pop("slide_id"): row for row in slides.select(columns).to_pylist()}


def vectors(column: Any) -> np.ndarray[Any, Any]:
    """Return a column of fixed-size lists (no nulls) as an array [n, width]."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    width = column.type.list_size
    values = column.values.slice(column.offset * width, len(column) * width)
    array: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), width)
