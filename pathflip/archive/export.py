"""Export to Parquet: the tables of an archive for tools that read nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive.annotation_table import find_annotations
from pathflip.archive.archive import Archive
from pathflip.archive.schema import slides_schema
from pathflip.archive.storage import guarded, is_local, rows_per_batch
from pathflip.archive.tables import ANNOTATIONS, PICTURES, SLIDES
from pathflip.errors import ConfigError
from pathflip.files import partial

ROWS_PER_FILE = 4096
"""Rows in a file of features; the files of tables with small rows hold up to 2**20."""


def export_parquet(archive: Archive, folder: str | Path) -> dict[str, int]:
    """Write every table whose rows belong to slides as Parquet.

    Layout: ``<folder>/<table>/part-00000.parquet`` and so on. Only rows of ready slides; of
    ``slides`` itself, all rows whatever their status, with the pictures. The folder appears once it
    is complete.

    Args:
        archive: The archive.
        folder: A folder that does not exist yet, or is empty.

    Returns:
        {table: rows written}.

    Raises:
        ConfigError: If the folder holds something.
        ArchiveError: If the disk is full or the archive is damaged.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not an empty folder.", hint="Give another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = partial(target)
    written: dict[str, int] = {}
    try:
        with guarded(str(target), "export"):
            drawn = find_annotations(archive.uri)
            for table in _tables(archive, drawn):
                (draft / table).mkdir(parents=True)
                written[table] = (
                    _export_annotations(archive, drawn, draft / table)
                    if table == ANNOTATIONS
                    else _export_table(archive, table, draft / table)
                )
            if target.exists():
                target.rmdir()
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def exported_tables(archive: Archive) -> list[str]:
    """Return the tables that :func:`export_parquet` writes."""
    return _tables(archive, find_annotations(archive.uri))


def _tables(archive: Archive, drawn: Any) -> list[str]:
    names = [
        name for name in archive.tables() if archive.table(name).spec.per_slide and name != PICTURES
    ]
    return names if drawn is None else [*names, ANNOTATIONS]


def _export_table(archive: Archive, table: str, folder: Path) -> int:
    import pyarrow.parquet as pq

    dataset = archive.dataset(table)
    per_file = ROWS_PER_FILE if archive.table(table).spec.wide else 1 << 20
    ready = pa.array(sorted(archive.ready_ids(archive.encoder_of(table))), pa.string())
    total, in_file, part, writer = 0, 0, 0, None
    schema = slides_schema() if table == SLIDES else dataset.schema
    batches: Any = dataset.to_batches(batch_size=rows_per_batch(schema))
    try:
        writer = pq.ParquetWriter(folder / "part-00000.parquet", schema)
        with guarded(archive.uri, f"read the table {table}", damaged=is_local(archive.uri)):
            for batch in batches:
                rows = pa.Table.from_batches([batch])
                if table == SLIDES:  # the ledger: all slides, whatever became of them
                    ids = rows["slide_id"].to_pylist()
                    rows = archive.slides(columns=schema.names, slide_ids=ids).cast(schema)
                else:
                    rows = rows.filter(pc.is_in(rows["slide_id"], ready))
                if in_file and in_file + rows.num_rows > per_file:
                    writer.close()
                    part += 1
                    path = folder / f"part-{part:05d}.parquet"
                    writer, in_file = pq.ParquetWriter(path, schema), 0
                writer.write_table(rows)
                in_file += rows.num_rows
                total += rows.num_rows
    finally:
        if writer is not None:
            writer.close()
    return total


def _export_annotations(archive: Archive, dataset: Any, folder: Path) -> int:
    import pyarrow.parquet as pq

    with guarded(archive.uri, "read the annotations", damaged=is_local(archive.uri)):
        rows = dataset.to_table(filter=pc.field("slide_id").isin(sorted(archive.ready_ids())))
    pq.write_table(rows, folder / "part-00000.parquet")
    return int(rows.num_rows)
