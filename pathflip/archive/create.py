"""Creates an archive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.fragments import create_table, not_empty
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.schema import NEW_LAYOUT
from pathflip.archive.settings import meta_rows
from pathflip.archive.storage import find_table, guarded, has_version, is_local, normalise
from pathflip.archive.tables import META, PICTURES, tables_of
from pathflip.errors import ArchiveError


def create_archive(uri: str | Path, *, tiling: Mapping[str, Any]) -> Archive:
    """Create an archive, or opens an existing one of the same tiling.

    The table ``meta`` is written last: an archive exists once it does.

    Args:
        uri: Path or URI.
        tiling: All fields of the tiling (JSON values); region_um and patch_um give the slots.

    Raises:
        ArchiveError: If an archive of another tiling is there (``settings``), it is damaged or
            locked, or the folder holds other files (``not_empty``).
    """
    from importlib.metadata import PackageNotFoundError, version

    where = normalise(uri)
    wanted = json.loads(json.dumps(dict(tiling)))
    try:
        return _with_tiling(Archive(where), wanted)
    except ArchiveError as error:
        if error.code != "missing_archive":
            raise
    if is_local(where) and Path(where).exists():
        if not Path(where).is_dir():
            raise ArchiveError(f"{where} is a file, not a folder.", code="not_empty")
        names = [path.name for path in Path(where).iterdir()]
        if alien := [n for n in names if not n.startswith(".") and not n.endswith(".lance")]:
            raise not_empty(where, alien[0])
    try:
        package = version("pathflip")
    except PackageNotFoundError:
        package = "unknown"
    settings = {
        "schema_version": NEW_LAYOUT,
        "tiling": wanted,
        PICTURES: {},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "package_version": package,
    }
    with ArchiveLock(where), guarded(where, "create the archive"):
        # Another process may have created it while this one waited for its turn.
        if not _made(where):
            tables = tables_of(settings)
            for table in sorted(tables.values(), key=lambda table: table.name == META):
                rows = meta_rows(settings) if table.name == META else None
                create_table(where, table.name, table.schema(settings), rows)
    with Committer(where):  # registers the first files
        return _with_tiling(Archive(where), wanted)


def _made(uri: str) -> bool:
    if is_local(uri):
        return has_version(uri, META)
    return find_table(uri, META) is not None


def _with_tiling(archive: Archive, wanted: Mapping[str, Any]) -> Archive:
    made = archive.tiling()
    if made != wanted:
        other = ", ".join(
            f"{key} {made.get(key)} instead of {wanted.get(key)}"
            for key in sorted({*made, *wanted})
            if made.get(key) != wanted.get(key)
        )
        raise ArchiveError(
            f"The archive {archive.uri} was made with another tiling: {other}.",
            hint="Use the archive's settings, or another archive.",
            code="settings",
        )
    return archive
