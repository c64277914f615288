"""The tables of an archive: the one list that everything which touches them goes through.

Opening, commit, verify, repair, maintain, export and the indexes loop over :data:`TABLES` and know
no table by name but ``slides``, the ledger. Adding a table is adding a row there.

A table is there always (``setting`` is None), or from when the settings of the archive (its table
``meta``) name it: ``<setting>`` for a single table, ``<setting>:<name>`` for each table of a family
(``features_<encoder>`` and the like).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pathflip.archive.schema import (
    captions_schema,
    embeddings_schema,
    features_schema,
    files_schema,
    meta_schema,
    regions_schema,
    slides_schema,
    slug,
)
from pathflip.archive.settings import entries_of, slots_of

META, SLIDES, FILES = "meta", "slides", "files"
INGEST = "ingest"

SchemaOf = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], pa.Schema]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table of an archive, or a family of tables, one for each encoder or model.

    Attributes:
        name: Its name; that of a family ends with what stands for the encoder or model in angle
            brackets. Families of one prefix have the same key and indexes.
        key: Primary key column.
        schema: Builds the Arrow schema from the archive's settings, the table's own entry in them,
            and schema metadata that brings that entry back when ``meta`` is lost. Raises KeyError
            where the settings do not say enough.
        per_slide: Whether rows belong to slides (column ``slide_id``).
        one_per: Table of whose rows each has one here, under the same key; the table itself where
            others count its rows. None where a slide may have any number.
        and_slide: Whether a slide has one row more, under its own id.
        count: Column of ``slides`` that says how many rows a slide has here.
        derived_from: Table these rows are computed from: they go when a slide is ingested anew.
            None for what nobody could compute again (text from elsewhere), which stays.
        made_by: The command, after ``pathflip``, that writes it. What ingest writes is part of the
            slide: ready means that it is complete.
        setting: Key of the settings that name the table; None where it is always there.
        entry_field: Where a family's entry holds the table's name.
        wide: Whether a row is near a megabyte, so that files are cut by bytes.
        indexes: {column: index}: ``VECTOR`` for a vector index once the table is large,
            ``INVERTED`` for words. Columns that filters name are indexed in every table.
        since: Version of the layout that brought it.
    """

    name: str
    key: str
    schema: SchemaOf
    per_slide: bool = True
    one_per: str | None = None
    and_slide: bool = False
    count: str | None = None
    derived_from: str | None = None
    made_by: str = INGEST
    setting: str | None = None
    entry_field: str = "table"
    wide: bool = False
    indexes: Mapping[str, str] = field(default_factory=dict)
    since: int = 1

    @property
    def family(self) -> bool:
        """Whether there is one such table for each encoder or model."""
        return "<" in self.name

    @property
    def prefix(self) -> str:
        """What the names of a family's tables begin with."""
        return self.name.partition("<")[0]

    @property
    def imported(self) -> bool:
        """Whether it holds what came from elsewhere, which no command could compute again."""
        return self.per_slide and self.derived_from is None and self.name != SLIDES

    def table_of(self, name: str) -> str:
        """Returns the name of the family's table of an encoder or model."""
        return f"{self.prefix}{slug(name)}"

    def rows_of(self, slide: Mapping[str, Any]) -> int | None:
        """Returns how many rows a slide, a row of ``slides``, has here; None where it is open."""
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
        schema=lambda settings, entry, noted: slides_schema(),
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
        name="captions", key="caption_id",
        schema=lambda settings, entry, noted: captions_schema(),
        made_by="archive import", setting="captions", indexes={"text": "INVERTED"}, since=2,
    ),
)  # fmt: skip
"""All tables; ``slides`` before those whose rows it makes visible."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of one archive.

    Attributes:
        name: Its name.
        spec: What kind of table it is.
        owner: The encoder or model of a family's table; empty otherwise.
        entry: What the settings say of it.
    """

    name: str
    spec: TableSpec
    owner: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> str | None:
        """The encoder whose features it holds, or what was made of them."""
        if self.spec.setting == "encoder":
            return self.owner or None
        encoder = self.entry.get("encoder")
        return None if encoder is None else str(encoder)

    @property
    def ingested(self) -> bool:
        """Whether its rows are part of a ready slide."""
        return self.spec.made_by == INGEST and self.spec.derived_from is not None

    def schema(self, settings: Mapping[str, Any]) -> pa.Schema:
        """Returns its Arrow schema.

        Raises:
            KeyError: If the settings of the archive do not say enough, as where ``meta`` is lost.
        """
        setting = self.spec.setting
        if setting is None:
            noted = {key: json.dumps(value) for key, value in settings.items() if ":" not in key}
        else:
            named = {"name": self.owner} if self.spec.family else {}
            noted = {setting: json.dumps({**named, **self.entry})}
        return self.spec.schema(settings, self.entry, noted)


def tables_of(settings: Mapping[str, Any]) -> dict[str, Table]:
    """Returns {name: table} of all tables that an archive of these settings has."""
    found: dict[str, Table] = {}
    for spec in TABLES:
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


def names_of(setting: str, name: str) -> dict[str, str]:
    """Returns {field of the entry: table} of all families of an encoder or model."""
    return {
        spec.entry_field: spec.table_of(name)
        for spec in TABLES
        if spec.family and spec.setting == setting
    }


def specs_of(table: str) -> list[TableSpec]:
    """Returns the specs a table of this name can be of, the closest first; none if unknown."""
    if exact := [spec for spec in TABLES if spec.name == table]:
        return exact
    fitting = [spec for spec in TABLES if spec.family and table.startswith(spec.prefix)]
    return sorted(fitting, key=lambda spec: -len(spec.prefix))


def spec_of(table: str) -> TableSpec | None:
    """Returns the closest spec of :func:`specs_of`."""
    return next(iter(specs_of(table)), None)


def key_of(table: str) -> str:
    """Returns the primary key column of a table.

    Raises:
        KeyError: If there is no such table.
    """
    spec = spec_of(table)
    if spec is None:
        raise KeyError(table)
    return spec.key


def count_columns() -> list[str]:
    """Returns the columns of ``slides`` that say how many rows a slide has in a table."""
    return [spec.count for spec in TABLES if spec.count is not None]


def dependents_of(table: str, tables: Mapping[str, Table]) -> list[str]:
    """Returns the tables that are computed from a table, and from those, and so on."""
    below: list[str] = []
    origin = tables[table]
    for other in tables.values():
        apart = origin.encoder is not None and other.encoder not in (None, origin.encoder)
        if other.spec.derived_from == origin.spec.name and not apart and other.name not in below:
            below += [other.name, *dependents_of(other.name, tables)]
    return list(dict.fromkeys(below))
