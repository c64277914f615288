"""The table of annotations: its rows, its counter, commits to it and their way to the disk.

Who may write what, and how several writers get along, is :mod:`pathflip.archive.annotations`.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import compaction, transactions
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.schema import CHECKSUM, annotations_schema, conform
from pathflip.archive.storage import (
    damaged_error,
    guarded,
    is_local,
    newest_known_version,
    open_table,
    sql_in,
    table_uri,
)
from pathflip.archive.tables import ANNOTATIONS
from pathflip.errors import ArchiveError
from pathflip.files import sync
from pathflip.interop.annotations import Annotation, Shape

COUNTER = ""
"""Key of the row that every commit changes."""
COLUMNS = [name for name in annotations_schema().names if name != CHECKSUM]
TURN_S = 2.0
"""Seconds for which a writer waits for its turn."""

_VERSIONS, _KEEP_S = 100, 86_400
"""Each commit is a version; at the hundredth, Lance removes those of a day ago."""
_TIERS = (256, 16, 1)


def find_annotations(uri: str, *, session: Any = None) -> Any:
    """Open the newest version of an archive's annotations; None if it has none.

    Raises:
        ArchiveError: The table is damaged or cannot be reached.
    """
    try:
        return open_table(uri, ANNOTATIONS, session=session)
    except ArchiveError as error:
        if error.code == "missing_table":
            return None
        if is_local(uri) and not _has_version(uri):
            return None  # another process is making it, or was killed while it did
        raise


def _has_version(uri: str) -> bool:
    """Return whether a local table has a version, or had one."""
    folder = Path(table_uri(uri, ANNOTATIONS), "_versions")
    return newest_known_version(uri, ANNOTATIONS) > 0 or any(folder.glob("*.manifest"))


def make_table(uri: str) -> None:
    """Make the table with its counter; raises whatever Lance raises where it is there already."""
    import lance

    made = lance.write_dataset(
        counter_row(),
        table_uri(uri, ANNOTATIONS),
        schema=annotations_schema(),
        mode="create",
        auto_cleanup_options={"interval": _VERSIONS, "older_than_seconds": _KEEP_S},
    )
    files = [f"data/{one.path}" for item in made.get_fragments() for one in item.data_files()]
    _settle(uri, [*files, _manifest(made.version), "data", "_versions"])
    if is_local(uri):
        sync(Path(uri))


@contextmanager
def turn(uri: str) -> Iterator[None]:
    """Let the writers on one machine take turns, which saves most of them a second attempt.

    Nothing rests on it: a commit is refused where another came between. So whoever does not get
    its turn in :data:`TURN_S`, or where files cannot be locked, goes on without.
    """
    if not is_local(uri):
        yield
        return
    try:
        handle = os.open(Path(uri, ".annotations"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # the commit says what is wrong with the folder
        yield
        return
    try:
        last = time.monotonic() + TURN_S
        while not _locked(handle) and time.monotonic() < last:
            time.sleep(random.uniform(0.001, 0.01))
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def read_counter(uri: str, dataset: Any) -> dict[str, Any]:
    """Return the counter of a version: ``revision``, and the ``name`` of its last commit.

    Raises:
        ArchiveError: It is lost (``damaged``).
    """
    with guarded(uri, "read the annotations", damaged=is_local(uri)):
        rows = dataset.to_table(
            columns=["name", "revision"], filter=pc.field("annotation_id") == COUNTER
        ).to_pylist()
    if len(rows) != 1:
        raise damaged_error(uri, "the row that counts commits of annotations is lost")
    found: dict[str, Any] = rows[0]
    return found


def merge_fragments(uri: str, *, whole: bool = False) -> None:
    """Merge small fragments; a save that comes between goes first.

    Args:
        uri: The archive.
        whole: Whether all small ones become one, whatever that writes.
    """
    for tier in _TIERS[-1:] if whole else _TIERS:
        with suppress(ArchiveError), guarded(uri, "merge the annotations"):
            compaction.merge_below(
                open_table(uri, ANNOTATIONS),
                compaction.FRAGMENT_BYTES // tier,
                lambda rows, size: whole or (len(rows) > 1 and sum(rows) >= 2 * max(rows)),
            )


def count_again(uri: str) -> list[str]:
    """Bring the counter back into a table that has lost it; for repair, under the archive's lock.

    Returns:
        A sentence, if it was lost.
    """
    import lance

    if (dataset := find_annotations(uri)) is None:
        return []
    with guarded(uri, "mend the annotations", damaged=True):
        if dataset.count_rows(f"annotation_id = '{COUNTER}'"):
            return []
        lance.write_dataset(counter_row(), table_uri(uri, ANNOTATIONS), mode="append")
    return ["Table annotations: brought back the row that counts its commits."]


def maintain_annotations(lock: ArchiveLock) -> dict[str, int]:
    """Merge the annotations' fragments, remove old versions, and digest the files; see maintain.

    Args:
        lock: The archive's lock, which the caller holds: digests are written under it.

    Returns:
        {table: fragments now}; empty if there is no table.
    """
    if find_annotations(lock.uri) is None:
        return {}
    merge_fragments(lock.uri, whole=True)
    compaction.free_versions(lock, [ANNOTATIONS], before=compaction.day_ago())
    transactions.register_missing(lock, [ANNOTATIONS])
    return {ANNOTATIONS: len(open_table(lock.uri, ANNOTATIONS).get_fragments())}


def counter_row(*, revision: int = 0, name: str = "") -> pa.Table:
    """Return the row that every commit changes, as it is stored."""
    row = dict.fromkeys(COLUMNS, None) | {
        "annotation_id": COUNTER, "slide_id": "", "author": "", "name": name, "revision": revision,
    }  # fmt: skip
    return rows_table([row])


def commit_rows(
    uri: str,
    dataset: Any,
    *,
    rows: list[dict[str, Any]],
    gone: Sequence[str],
    counter: dict[str, Any],
    name: str,
) -> Any:
    """Commit a change to a version of the table; refused if that is not the newest any more.

    Args:
        uri: The archive.
        dataset: The version.
        rows: Rows to insert or replace.
        gone: Keys of rows to delete.
        counter: The version's counter.
        name: Name of this commit, for the new counter.

    Returns:
        The new version.
    """
    import lance

    changed = counter_row(revision=counter["revision"] + 1, name=name)
    if rows:
        changed = pa.concat_tables([rows_table(rows), changed])
    merge = (
        dataset.merge_insert("annotation_id")
        .when_matched_update_all()
        .when_not_matched_insert_all()
    )
    if gone:
        merge = merge.when_not_matched_by_source_delete(sql_in("annotation_id", gone))
    transaction, _ = merge.execute_uncommitted(changed)
    _settle(uri, _written(transaction))
    done = lance.LanceDataset.commit(dataset, transaction)
    _settle(uri, [_manifest(done.version)])
    return done


def _manifest(version: int) -> str:
    """Return the file of a version, as Lance names it: the newest comes first."""
    return f"_versions/{2**64 - 1 - version}.manifest"


def _written(transaction: Any) -> list[str]:
    """Return the files of the table that a prepared change consists of."""
    made = transaction.operation
    paths = [f"data/{file.path}" for item in made.new_fragments for file in item.files]
    for item in made.updated_fragments:
        if item.deletion_file is not None:
            paths.append(item.deletion_file.path(item.id))
    return paths


def _settle(uri: str, paths: Sequence[str]) -> None:
    """Flush files of a local table, and the entries of their folders, to the disk."""
    if not is_local(uri):
        return
    root = Path(table_uri(uri, ANNOTATIONS))
    for path in paths:
        sync(root / path)
    for folder in {(root / path).parent for path in paths}:
        sync(folder)


def annotation_of(row: dict[str, Any]) -> Annotation:
    """Return the annotation of a row."""
    bounds = {name: row[name] for name in ("x0", "y0", "x1", "y1")}
    return Annotation(
        annotation_id=row["annotation_id"],
        slide_id=row["slide_id"],
        sha256=row["sha256"],
        author=row["author"],
        name=row["name"],
        classification=row["class"],
        colour=row["colour"],
        object_type=row["object_type"],
        shape=Shape(geometry=json.loads(row["geometry"]), points=row["points"], **bounds),
        revision=row["revision"],
        created=row["created"],
        updated=row["updated"],
    )


def row_of(one: Annotation) -> dict[str, Any]:
    """Return the row of an annotation."""
    shape = one.shape
    return {
        "annotation_id": one.annotation_id,
        "slide_id": one.slide_id,
        "sha256": one.sha256,
        "author": one.author,
        "name": one.name,
        "class": one.classification,
        "colour": one.colour,
        "object_type": one.object_type,
        "geometry": json.dumps(shape.geometry, separators=(",", ":"), allow_nan=False),
        "x0": shape.x0,
        "y0": shape.y0,
        "x1": shape.x1,
        "y1": shape.y1,
        "points": shape.points,
        "revision": one.revision,
        "created": one.created,
        "updated": one.updated,
    }


def rows_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows with their checksums, as the table stores them."""
    schema = annotations_schema()
    body = pa.schema([item for item in schema if item.name != CHECKSUM])
    return conform(pa.Table.from_pylist(rows, schema=body), schema)
