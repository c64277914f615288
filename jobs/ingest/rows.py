"""Rows between the actors of an ingest and its driver: a slide's record, a chunk of its regions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathflip.slides.sources import Source, slide_id

Status = Literal["ready", "quarantined", "empty", "duplicate", "unread", "fatal"]
"""State of a slide, or of one of its chunks.

``ready``, ``quarantined`` and ``empty`` are stored; ``duplicate`` is a file whose content the
archive holds already. ``unread`` is a chunk not read because another chunk of its slide failed
before; ``fatal`` an error that says nothing about the slide and ends the run.
"""


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """Facts about one slide, or about one chunk of it, as known so far.

    The planner fills it in; each chunk carries a copy, in which the embedder counts its patches;
    the driver sums the copies up and stores the result. Fields are columns of the table ``slides``
    (see ``archive.schema``) but for those listed here.

    Attributes:
        outline: Source of the tissue: ``mask``, or the digest of the GeoJSON.
        extends: The archive holds the slide without some of the encoders.
        mpp_override: µm per level-0 px given by the user, if any.
        size0: Side of a region, level-0 px.
        planned_patches: Patches of the whole slide that are to be embedded.
        not_finite: Patches of the chunk for which an encoder returned no finite vector.
        error: The error of a ``fatal`` record, see ``PathFLIPError.to_dict``.
    """

    slide_id: str
    uri: str
    bytes: int
    mtime_ns: int
    aliases: tuple[str, ...] = ()
    status: Status = "ready"
    reason: str | None = None
    message: str | None = None
    stage: str | None = None
    sha256: str | None = None
    attempts: int = 1
    tiles_ok: int = 0
    tiles_bad: int = 0
    seconds: float = 0.0

    vendor: str | None = None
    width: int | None = None
    height: int | None = None
    levels: int | None = None
    mpp: float | None = None
    mpp_source: str | None = None
    bounds_x0: int | None = None
    bounds_y0: int | None = None
    reader: str | None = None
    reader_note: str | None = None
    tissue_mpp: float | None = None
    tissue_mm2: float | None = None
    thumbnail_mpp: float | None = None
    fingerprint: str | None = None

    outline: str | None = None
    extends: bool = False
    mpp_override: float | None = None
    size0: int = 0
    planned_patches: int = 0
    not_finite: int = 0
    error: dict[str, str] | None = None

    @classmethod
    def of(cls, source: Source) -> SlideRecord:
        """Return the record of a file nothing is known of yet; its path stands for its content."""
        return cls(
            slide_id=slide_id(source.uri, source.uri),
            uri=source.uri,
            bytes=source.bytes,
            mtime_ns=source.mtime_ns,
        )

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SlideRecord:
        """Return the record of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"aliases": tuple(fields["aliases"])})


@dataclass(frozen=True, kw_only=True)
class Held:
    """A slide in the archive, as far as a copy of it is concerned.

    Attributes:
        slide_id: Its id.
        mpp: µm per level-0 px it was cut with.
        outline: Source of its tissue: ``mask``, or the digest of a GeoJSON.
        complete: Whether it has features of every encoder of this run.
    """

    slide_id: str
    mpp: float | None
    outline: str
    complete: bool


CHUNK_SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("chunk", pa.int32()),
        ("n_chunks", pa.int32()),
        ("tissue_png", pa.binary()),
        ("thumbnail", pa.binary()),
        ("regions", pa.binary()),
        ("embeddings", pa.list_(pa.binary())),
        ("sums", pa.list_(pa.binary())),
        ("fragments", pa.list_(pa.list_(pa.string()))),
    ]
)
"""Schema of :meth:`Chunk.to_row`."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some regions of one slide: the unit of work that Ray Data spreads over the actors.

    Attributes:
        record: The slide, and what was counted in this chunk.
        chunk: Number of the chunk.
        n_chunks: Chunks of the slide; 0 where there is nothing to embed.
        tissue_png: The tissue mask, on the first chunk.
        thumbnail: JPEG of the slide, on the first chunk.
        regions: Arrow IPC of the regions; from the planner what to read, from the embedder rows
            of the table ``regions``.
        embeddings: For each encoder, Arrow IPC of the vectors of the regions.
        sums: For each encoder, float64 [dim] as bytes: the sum over the chunk's patches.
        fragments: For each encoder, the Lance fragments that were written, as JSON.
    """

    record: SlideRecord
    chunk: int = 0
    n_chunks: int = 0
    tissue_png: bytes = b""
    thumbnail: bytes = b""
    regions: bytes = b""
    embeddings: tuple[bytes, ...] = ()
    sums: tuple[bytes, ...] = ()
    fragments: tuple[tuple[str, ...], ...] = ()

    def to_row(self) -> dict[str, Any]:
        """Return the chunk as a row of ``CHUNK_SCHEMA``."""
        return vars(self) | {"record": self.record.to_json()}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Chunk:
        """Return the chunk of :meth:`to_row`."""
        return cls(
            **row
            | {
                "record": SlideRecord.from_json(row["record"]),
                "embeddings": tuple(row["embeddings"]),
                "sums": tuple(row["sums"]),
                "fragments": tuple(map(tuple, row["fragments"])),
            }
        )


def to_table(chunks: list[Chunk]) -> pa.Table:
    """Return chunks as the table an actor returns."""
    return pa.Table.from_pylist([chunk.to_row() for chunk in chunks], schema=CHUNK_SCHEMA)


def from_table(table: pa.Table) -> list[Chunk]:
    """Return the chunks of :func:`to_table`."""
    return [Chunk.from_row(row) for row in table.to_pylist()]


def matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    """Return a column of n fixed-size lists as an array [n, width]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, width)
