"""List of an archive's tables.

Opening, commit, verify, repair, maintain, export and the indexes loop over :data:`TABLES`: adding a
table means adding a row there.

Some tables exist in every archive (``setting`` is None). The others exist once the settings of the
archive (its table ``meta``) name them: ``<setting>`` for a single table, ``<setting>:<name>`` for
each table of a family such as ``features_<encoder>``. Tables that are written without the archive's
lock (``unlocked``) are named by no setting, since settings are written under it: they exist once
they are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pathflip.archive.schema import (
    annotations_schema,
    captions_schema,
    embeddings_schema,
    features_schema,
    files_schema,
    meta_schema,
    pictures_schema,
    regions_schema,
    slides_schema,
    slug,
    tree_features_schema,
    tree_texts_schema,
    trees_schema,
)
from pathflip.archive.settings import entries_of, slots_of

META, SLIDES, FILES, PICTURES = "meta", "slides", "files", "pictures"
ANNOTATIONS = "annotations"
INGEST = "ingest"

SchemaOf = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], pa.Schema]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Table of an archive, or a family of tables with one for each encoder or model.

    Attributes:
        name: Name of the table. A family's name ends with a placeholder, as in
            ``features_<encoder>``; families with the same prefix share key and indexes.
        key: Primary key column.
        schema: Function of the archive's settings, the table's entry in them, and schema metadata
            (a copy of that entry, from which ``meta`` can be rebuilt) that returns the Arrow
            schema. Raises KeyError if the settings lack something.
        per_slide: Whether rows belong to slides (column ``slide_id``).
        one_per: Table with which this one shares its keys, one row here for each row there; its own
            name if other tables follow it. None if a slide may have any number of rows.
        and_slide: Whether each slide has one more row, keyed by the slide's id.
        any_status: Whether slides that are not ready may have rows, too.
        count: Column of ``slides`` with the number of rows of a slide in this table.
        fault: Column with the reason why a row is quarantined, null of a good one; the tables that
            follow this one have no row for it.
        derived_from: Table from which the rows are computed. They are deleted when a slide is
            ingested again. None for imported rows, which could not be computed and are kept.
        on_grid: Whether imported rows belong to places on a slide's grid in µm. They are deleted
            when the slide gets another mpp, with which the same place is other tissue.
        made_by: Command that writes the table, without ``pathflip``. Rows written by ingest are
            part of the slide: it is ready when they are complete.
        setting: Key in the settings that names the table; None if every archive has it.
        entry_field: Field of a family's entry that holds the table's name.
        unlocked: Whether any number of processes write it without the archive's lock. What
            a holder of the lock does to all tables leaves it alone: it is in no snapshot of
            :class:`pathflip.archive.Archive`, no fence and no commit of an ingest; its module has
            writers, readers and maintenance of its own.
        wide: Whether rows take up to a megabyte, so that files are limited by bytes, not rows.
        indexes: {column: kind}: ``VECTOR``, a vector index once the table is large, or
            ``INVERTED``, words. Columns that filters name are indexed in every table.
        since: Version of the layout that introduced the table.
    """

    name: str
    key: str
    schema: SchemaOf
    per_slide: bool = True
    one_per: str | None = None
    and_slide: bool = False
    any_status: bool = False
    count: str | None = None
    fault: str | None = None
    derived_from: str | None = None
    on_grid: bool = False
    made_by: str = INGEST
    setting: str | None = None
    entry_field: str = "table"
    unlocked: bool = False
    wide: bool = False
    indexes: Mapping[str, str] = field(default_factory=dict)
    since: int = 1

    @property
    def family(self) -> bool:
        """Return whether there is one such table for each encoder or model."""
        return "<" in self.name

    @property
    def prefix(self) -> str:
        """Prefix of the names of a family's tables."""
        return self.name.partition("<")[0]

    @property
    def imported(self) -> bool:
        """Return whether rows are imported: no command could compute them again."""
        return self.per_slide and self.derived_from is None and self.name != SLIDES

    def table_of(self, name: str) -> str:
        """Return the name of the family's table of an encoder or model."""
        return f"{self.prefix}{slug(name)}"

    def rows_of(self, slide: Mapping[str, Any]) -> int | None:
        """Return how many rows a slide (a row of ``slides``) must have; None if any number."""
        root = None if self.one_per is None else spec_of(self.one_per)
        if root is None or root.count is None:
            return None
        return int(slide[root.count]) + self.and_slide


TABLES: tuple[TableSpec, ...] = (
    TableSpec(
        name=META, key="key", per_slide=False,
        schema=lambda settings, entry, noted: meta_schema(),
    ),
    TableSpec(
        name=SLIDES, key="slide_id",
        schema=lambda settings, entry, noted: slides_schema(pictures=PICTURES not in settings),
    ),
    TableSpec(
        name=PICTURES, key="slide_id",
        schema=lambda settings, entry, noted: pictures_schema(noted),
        one_per=PICTURES, and_slide=True, derived_from=SLIDES, any_status=True,
        setting=PICTURES, wide=True, since=4,
    ),
    TableSpec(
        name="regions", key="region_id",
        schema=lambda settings, entry, noted: regions_schema(slots_of(settings["tiling"]), noted),
        one_per="regions", count="n_regions", derived_from=SLIDES,
    ),
    TableSpec(
        name=FILES, key="path", per_slide=False,
        schema=lambda settings, entry, noted: files_schema(),
    ),
    TableSpec(
        name="features_<encoder>", key="region_id",
        schema=lambda settings, entry, noted: features_schema(
            slots_of(settings["tiling"]), entry["dim"], noted
        ),
        one_per="regions", derived_from="regions",
        setting="encoder", entry_field="features_table", wide=True,
    ),
    TableSpec(
        name="embeddings_<encoder>", key="id",
        schema=lambda settings, entry, noted: embeddings_schema(entry["dim"], noted),
        one_per="regions", and_slide=True, derived_from="features_<encoder>",
        setting="encoder", entry_field="embeddings_table", indexes={"vector": "VECTOR"},
    ),
    TableSpec(
        name="embeddings_<model>", key="id",
        schema=lambda settings, entry, noted: embeddings_schema(entry["dim"], noted),
        one_per="regions", and_slide=True, derived_from="features_<encoder>", made_by="index",
        setting="model", entry_field="embeddings_table", indexes={"vector": "VECTOR"}, since=2,
    ),
    TableSpec(
        name="embeddings_<slide_encoder>", key="id",
        schema=lambda settings, entry, noted: embeddings_schema(entry["dim"], noted),
        made_by="archive import", setting="slide_encoder", entry_field="embeddings_table",
        indexes={"vector": "VECTOR"}, since=5,
    ),
    TableSpec(
        name="captions", key="caption_id",
        schema=lambda settings, entry, noted: captions_schema(),
        made_by="archive import", setting="captions", indexes={"text": "INVERTED"}, since=2,
    ),
    TableSpec(
        name="trees", key="tree_id",
        schema=lambda settings, entry, noted: trees_schema(noted),
        one_per="trees", fault="fault", derived_from=SLIDES, made_by="trees", setting="trees",
        since=3,
    ),
    TableSpec(
        name="trees_<encoder>", key="tree_id",
        schema=lambda settings, entry, noted: tree_features_schema(entry["dim"], noted),
        one_per="trees", derived_from="trees", made_by="trees",
        setting="tree_encoder", wide=True, since=3,
    ),
    TableSpec(
        name="tree_texts", key="text_id",
        schema=lambda settings, entry, noted: tree_texts_schema(),
        on_grid=True, made_by="archive import", setting="tree_texts", wide=True, since=3,
    ),
    TableSpec(
        name=ANNOTATIONS, key="annotation_id",
        schema=lambda settings, entry, noted: annotations_schema(),
        made_by="annotations import", unlocked=True, since=4,
    ),
)  # fmt: skip
"""All tables. ``slides`` is opened before the tables whose rows it makes visible."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of one archive.

    Attributes:
        name: Name of the table.
        spec: Its row in :data:`TABLES`.
        owner: Encoder or model it belongs to; empty if it is not of a family.
        entry: Its entry in the archive's settings.
    """

    name: str
    spec: TableSpec
    owner: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> str | None:
        """Encoder whose features the rows are, or are computed from."""
        if self.spec.setting == "encoder":
            return self.owner or None
        encoder = self.entry.get("encoder")
        return None if encoder is None else str(encoder)

    @property
    def ingested(self) -> bool:
        """Return whether its rows are part of a ready slide."""
        return self.spec.made_by == INGEST and self.spec.derived_from is not None

    def schema(self, settings: Mapping[str, Any]) -> pa.Schema:
        """Return its Arrow schema.

        Raises:
            KeyError: If the settings lack something, as when ``meta`` is lost.
        """
        setting = self.spec.setting
        if setting is None:
            noted = {key: json.dumps(value) for key, value in settings.items() if ":" not in key}
        else:
            named = {"name": self.owner} if self.spec.family else {}
            noted = {setting: json.dumps({**named, **self.entry})}
        return self.spec.schema(settings, self.entry, noted)


def tables_of(settings: Mapping[str, Any]) -> dict[str, Table]:
    """Return {name: table} of all tables in an archive with these settings.

    Tables that are written without the lock are not among them; see :func:`unlocked_tables`.
    """
    found: dict[str, Table] = {}
    for spec in TABLES:
        if spec.unlocked:
            continue
        if spec.setting is None:
            found[spec.name] = Table(name=spec.name, spec=spec)
        elif not spec.family:
            if spec.setting in settings:
                entry = settings[spec.setting]
                found[spec.name] = Table(name=spec.name, spec=spec, entry=entry)
        else:
            for owner, entry in entries_of(settings, spec.setting).items():
                if name := entry.get(spec.entry_field):
                    found[name] = Table(name=name, spec=spec, owner=owner, entry=entry)
    return found


def unlocked_tables() -> list[Table]:
    """Return the tables that an archive may have whatever its settings say."""
    return [Table(name=spec.name, spec=spec) for spec in TABLES if spec.unlocked]


def names_of(setting: str, name: str) -> dict[str, str]:
    """Return {field of the entry: table} of the tables an encoder or model has."""
    return {
        spec.entry_field: spec.table_of(name)
        for spec in TABLES
        if spec.family and spec.setting == setting
    }


def specs_of(table: str) -> list[TableSpec]:
    """Return the specs that match a table's name, closest first; empty if it is unknown."""
    if exact := [spec for spec in TABLES if spec.name == table]:
        return exact
    fitting = [spec for spec in TABLES if spec.family and table.startswith(spec.prefix)]
    return sorted(fitting, key=lambda spec: -len(spec.prefix))


def spec_of(table: str) -> TableSpec | None:
    """Return the closest spec of :func:`specs_of`."""
    return next(iter(specs_of(table)), None)


def key_of(table: str) -> str:
    """Return the primary key column of a table.

    Raises:
        KeyError: If there is no such table.
    """
    spec = spec_of(table)
    if spec is None:
        raise KeyError(table)
    return spec.key


def count_columns() -> list[str]:
    """Return the columns of ``slides`` with the number of rows a slide has in a table."""
    return [spec.count for spec in TABLES if spec.count is not None]


def dependents_of(table: str, tables: Mapping[str, Table]) -> list[str]:
    """Return the tables computed from a table, directly or through others."""
    below: list[str] = []
    origin = tables[table]
    for other in tables.values():
        apart = origin.encoder is not None and other.encoder not in (None, origin.encoder)
        if other.spec.derived_from == origin.spec.name and not apart and other.name not in below:
            below += [other.name, *dependents_of(other.name, tables)]
    return list(dict.fromkeys(below))
