"""Settings of an archive: its table ``meta``, JSON values by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip.archive.storage import (
    damaged_error,
    guarded,
    has_version,
    is_local,
    local_tables,
    open_table,
)
from pathflip.errors import ArchiveError

if TYPE_CHECKING:
    import pyarrow as pa

CAPTIONS = "captions"


def read_meta(uri: str) -> dict[str, Any]:
    """Return the archive's settings, checked against their checksums and the layout version.

    Raises:
        ArchiveError: See :class:`Archive`.
    """
    return settings_in(uri, open_meta(uri))


def open_meta(uri: str) -> Any:
    """Open the archive's table of settings, as a ``lance.LanceDataset``.

    Raises:
        ArchiveError: There is no archive (``missing_archive``), or its settings are gone
            (``damaged``).
    """
    if is_local(uri):
        path = Path(uri)
        if not path.is_dir():
            raise ArchiveError(
                f"There is no archive at {uri}.",
                hint=f"Make one: pathflip ingest SLIDES --archive {uri}",
                code="missing_archive",
            )
        if not has_version(uri, "meta"):  # which is made last
            tables = local_tables(uri)
            if {"slides", "regions"} <= set(tables) and open_table(uri, "slides").count_rows():
                raise damaged_error(uri, "its table meta is missing")
            raise ArchiveError(
                f"{uri} is not a pathflip archive.",
                hint="Give the folder that pathflip ingest wrote.",
                code="missing_archive",
            )
    try:
        return open_table(uri, "meta")
    except ArchiveError as error:
        if is_local(uri) or error.code != "missing_table":
            raise
        raise ArchiveError(
            f"There is no archive at {uri}.",
            hint=f"Make one: pathflip ingest SLIDES --archive {uri}",
            code="missing_archive",
        ) from error


def settings_in(uri: str, dataset: Any) -> dict[str, Any]:
    """Return the settings in a table that :func:`open_meta` opened, checked as :func:`read_meta`.

    Raises:
        ArchiveError: They are damaged (``damaged``), or of a newer layout (``schema_version``).
    """
    from pathflip.archive.schema import SCHEMA_VERSION, intact_rows

    with guarded(uri, "read the table meta", damaged=True):
        rows = dataset.to_table()
        intact = bool(intact_rows(rows).all())
        meta = {row["key"]: json.loads(row["value"]) for row in rows.to_pylist()}
    if not intact or "schema_version" not in meta or "tiling" not in meta:
        raise damaged_error(uri, "its settings (table meta) are damaged")
    if meta["schema_version"] > SCHEMA_VERSION:
        raise ArchiveError(
            f"The archive {uri} has layout {meta['schema_version']}; this pathflip knows "
            f"{SCHEMA_VERSION}.",
            hint="Upgrade pathflip.",
            code="schema_version",
        )
    return meta


def entries_of(meta: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Return {name: entry} of the settings ``<kind>:<name>``, sorted by name."""
    return {
        key.removeprefix(f"{kind}:"): dict(value)
        for key, value in sorted(meta.items())
        if key.startswith(f"{kind}:")
    }


def slots_of(tiling: dict[str, Any]) -> int:
    """Return the patch slots of a region for stored tiling fields (µm)."""
    slots: int = round(tiling["region_um"] / tiling["patch_um"]) ** 2
    return slots


def meta_rows(settings: Mapping[str, Any]) -> pa.Table:
    """Return rows of ``meta`` for settings (JSON values)."""
    import pyarrow as pa

    from pathflip.archive.schema import conform, meta_schema

    data = {
        "key": list(settings),
        "value": [json.dumps(value, sort_keys=True) for value in settings.values()],
    }
    return conform(pa.table(data), meta_schema())
