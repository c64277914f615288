"""Ingest: slide files in, a searchable archive out.

Read top to bottom::

    discover -> Planner (hash, open, tissue, cut) -> Embedder (read, embed, write fragments)
             -> Ledger (on the driver: one committer, slides become visible whole)

Planner and Embedder are Ray Data actors, each owning reader processes; a row between them is one
chunk of regions of one slide, so pixels and features never cross the object store and work is
spread by chunk, not by slide. Neither raises for what is wrong with a slide: they return rows with
a status, so that one bad slide costs one slide.

    python -m jobs.ingest SLIDES… --archive URI       (the same as: pathflip ingest …)
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import pathflip
from pathflip.archive import Archive
from pathflip.archive.commit import Committer, create_archive
from pathflip.encoders import Encoder, EncoderInfo, encoder_info, load_encoder
from pathflip.errors import ArchiveError, ConfigError, EncoderError, PathFLIPError, SlideError
from pathflip.geometry import Tiling, patch_rects
from pathflip.slides.reader import Patches, SlidePlan, SlideReader
from pathflip.slides.sources import SUFFIXES, Source, discover, slide_id, stat_source

logger = logging.getLogger(__name__)

RETRIED = ("timeout", "reader_crash")
MIN_BAD_TILES = 4
THUMBNAIL_BYTES = 256 << 10  # and the tissue mask, about
COMPACT_AFTER_FRAGMENTS = 512  # a commit writes the whole list of fragments anew


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Settings of an ingest; every one can be given in a YAML file or with -o."""

    encoder: str = "texture"
    """Patch encoder, or several separated by commas: they share one pass over the pixels."""
    tiling: Tiling = field(default_factory=Tiling)
    mpp_csv: str | None = None
    """CSV with the columns slide,mpp: µm per pixel where a file's metadata is missing or wrong."""
    patients: str | None = None
    """CSV with the columns slide,patient_id and optionally split; other columns become labels."""
    tissue_dir: str | None = None
    """Folder of <slide name>.geojson files used as tissue instead of the computed mask."""
    halving: Literal["exact", "dct"] = "dct"
    """How a twice finer JPEG base is halved: in the DCT domain, or by exact area averages, which
    take half as long again. docs/performance.md has what it does to features."""
    device: str = "auto"
    """auto, cpu or cuda."""
    actors: int | None = None
    """Embedding actors at most; None means one per CPU, or per GPU where the encoder uses one."""
    readers: int | None = None
    """Reader processes per actor; None means 1 on CPU, 4 on GPU (reading overlaps encoding)."""
    chunk_regions: int = 32
    """Regions per unit of work."""
    attempts: int = 3
    """Times a reader may die or hang on a slide before the slide is quarantined."""
    read_timeout_s: float = 60.0
    """Deadline for reading one region."""
    plan_timeout_s: float = 900.0
    """Deadline for hashing a slide, and for opening and planning it."""
    max_bad_tiles: float = 0.01
    """Share of a slide's patches that may be damaged; beyond it (and beyond 4) quarantine."""
    commit_s: float = 15.0
    """Finished slides become visible at least this often."""
    add_encoder: bool = False
    """Allow a further encoder beside those the archive already holds."""
    retry: bool = False
    """Try quarantined slides again even though nothing about them changed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A slide to be ingested, with what the user said about it."""

    source: Source
    mpp: float | None = None
    geojson: str | None = None
    outline: str = "mask"  # what the tissue comes from: the mask, or the digest of the geojson


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running ingest is; given to the progress callback."""

    slides_done: int
    slides_total: int
    quarantined: int
    regions: int
    patches: int
    bytes_done: int
    bytes_total: int
    seconds: float
    stage: str

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left, by bytes of slides still to do."""
        if not self.bytes_done:
            return None
        return self.seconds * (self.bytes_total - self.bytes_done) / self.bytes_done

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        if self.stage == "done":
            return 1.0
        return self.bytes_done / self.bytes_total if self.bytes_total else 0.0

    def line(self) -> str:
        """One line for people."""
        eta = self.eta_seconds
        left = "" if eta is None else f" · {duration(eta)} left"
        rate = self.patches / self.seconds if self.seconds else 0.0
        return (
            f"{self.stage} {self.slides_done:,}/{self.slides_total:,} slides · "
            f"{self.slides_done / max(self.seconds, 1e-9):.2f} slides/s · {rate:,.0f} patches/s · "
            f"{self.quarantined} quarantined{left}"
        )


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# -- actors ---------------------------------------------------------------------------------------

ROW = pa.schema(
    [
        ("slide_id", pa.string()),
        ("chunk", pa.int32()),
        ("n_chunks", pa.int32()),
        ("record", pa.string()),  # JSON: columns of the slides table known so far
        ("tissue_png", pa.binary()),
        ("thumbnail", pa.binary()),
        ("regions", pa.binary()),  # Arrow IPC
        ("embeddings", pa.list_(pa.binary())),  # Arrow IPC per encoder
        ("sums", pa.list_(pa.binary())),  # float64 [d] per encoder: sum over the chunk's patches
        ("fragments", pa.list_(pa.list_(pa.string()))),  # per encoder
    ]
)
"""A row between the actors and the driver: one chunk of regions of one slide."""


def _row(**values: Any) -> dict[str, Any]:
    empty = {"chunk": 0, "n_chunks": 0, "tissue_png": b"", "thumbnail": b"", "regions": b""}
    return {**empty, "embeddings": [], "sums": [], "fragments": [], **values}


class Planner:
    """Hashes, opens and cuts slides. A row in is a group of files of one size; rows out are chunks.

    Files of equal size are the only ones that can be copies of each other, so they come together
    and a copy is recognised before anything of it is read twice.
    """

    def __init__(self, config: IngestConfig, archive: str) -> None:
        self._config = config
        self._archive = archive
        self._reader = SlideReader(patches=1, px=16, halving=config.halving)

    def __call__(self, groups: pa.Table) -> pa.Table:
        """Plan every distinct slide of the groups."""
        rows = [row for group in groups.to_pylist() for row in self._plan_group(group)]
        return pa.Table.from_pylist(rows, schema=ROW)

    def _plan_group(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        known: dict[str, dict[str, Any]] = json.loads(row["known"])
        rows: list[dict[str, Any]] = []
        seen: dict[str, dict[str, Any]] = {}
        for item in json.loads(row["candidates"]):
            candidate = Candidate(**item | {"source": Source(**item["source"])})
            source = candidate.source
            record = _new_record(source)
            started = time.perf_counter()
            try:
                _check_name(record)
                sha = self._attempt(record, partial(self._digest, source.uri))
                if stat_source(Path(source.uri)) != source:
                    raise _changed(source.uri)
            except SlideError as error:
                rows.append(_row(**_failed(record, error, "hash")))
                continue
            record["sha256"] = sha
            record["slide_id"] = slide_id(source.uri, sha)
            if sha in seen:
                seen[sha]["aliases"].append(source.uri)
                continue
            record["outline"] = candidate.outline
            if held := known.get(sha):
                record["slide_id"] = held["slide_id"]
                if _same_cut(candidate, held):
                    if held["complete"]:
                        record["status"] = "duplicate"
                        rows.append(_row(slide_id=held["slide_id"], record=json.dumps(record)))
                        continue
                    record["extends"] = True
            seen[sha] = record
            record["_started"] = started
            record["_candidate"] = asdict(candidate)
        for record in seen.values():
            rows += self._plan(record)
        return rows

    def _plan(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        candidate = record.pop("_candidate")
        started = record.pop("_started")
        if record.get("extends"):
            return self._plan_as_stored(record)
        try:
            plan = self._attempt(
                record,
                lambda: self._reader.plan(
                    record["uri"],
                    tiling=self._config.tiling,
                    mpp=candidate["mpp"],
                    tissue_geojson=candidate["geojson"],
                    timeout_s=self._config.plan_timeout_s,
                ),
            )
        except SlideError as error:
            return [_row(**_failed(record, error, "plan"))]
        record |= plan.info
        record["seconds"] = time.perf_counter() - started
        regions = plan.regions
        if not len(regions):
            record["status"] = "empty"
            record["message"] = "No region has enough tissue."
        table = pa.table(
            {
                "rx": regions.rx,
                "ry": regions.ry,
                "x0": regions.x0,
                "y0": regions.y0,
                "tissue_fraction": regions.tissue_fraction,
                "patch_mask": _fixed(regions.patch_mask.astype(np.uint8)),
                "patch_tissue": _fixed(regions.patch_tissue),
            }
        )
        record["size0"] = int(regions.size0)
        record["mpp_override"] = candidate["mpp"]
        rows = self._chunks(record, table)
        rows[0] |= {"tissue_png": plan.tissue_png, "thumbnail": plan.thumbnail}
        return rows

    def _plan_as_stored(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """A further encoder sees exactly the patches the first one saw."""
        opened = Archive(self._archive)
        stored = opened.slide(record["slide_id"])
        names = ("width", "height", "mpp", "mpp_source", "tissue_mm2", "fingerprint")
        record |= {name: stored[name] for name in names}
        overridden = stored["mpp_source"] == "override"
        record["mpp_override"] = stored["mpp"] if overridden else None
        columns = ["rx", "ry", "x0", "y0", "size0", "tissue_fraction", "patch_mask", "patch_tissue"]
        table = opened.regions(record["slide_id"], columns=columns)
        record["size0"] = table["size0"][0].as_py()
        return self._chunks(record, table.drop_columns(["size0"]))

    def _chunks(self, record: dict[str, Any], table: pa.Table) -> list[dict[str, Any]]:
        masks = table["patch_mask"].combine_chunks().flatten().to_numpy()
        record["planned_patches"] = int(masks.sum())
        step = self._config.chunk_regions
        chunks = [table.slice(start, step) for start in range(0, len(table), step)]
        text = json.dumps(record)
        return [
            _row(
                slide_id=record["slide_id"],
                chunk=index,
                n_chunks=len(chunks),
                record=text,
                regions=_to_ipc(chunk),
            )
            for index, chunk in enumerate(chunks)
        ] or [_row(slide_id=record["slide_id"], record=text)]

    def _digest(self, path: str) -> str:
        return self._reader.digest(path, timeout_s=self._config.plan_timeout_s)

    def _attempt(self, record: dict[str, Any], call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except SlideError as error:
                if error.code not in RETRIED or record["attempts"] >= self._config.attempts:
                    raise
                record["attempts"] += 1


class Embedder:
    """Reads a chunk's patches, embeds them and writes the features as Lance fragments."""

    def __init__(
        self, config: IngestConfig, archive: str, tables: Sequence[str], revisions: Sequence[str]
    ) -> None:
        self._config = config
        self._archive = archive
        self._tables = list(tables)
        cv2.setNumThreads(1)  # parallel work is Ray's
        px = config.tiling.patch_px
        self._encoders: list[Encoder] = []
        self._fatal: PathFLIPError | None = None
        try:
            for spec, revision in zip(_specs(config.encoder), revisions, strict=True):
                encoder = load_encoder(spec, device=config.device)
                _check_revision(encoder, revision)
                self._encoders.append(encoder)
        except EncoderError as error:  # raised here, Ray would start the actor again and again
            self._fatal = error
        count = config.readers or (4 if _uses_gpu(config) else 1)
        self._readers = [
            SlideReader(patches=config.tiling.slots, px=px, halving=config.halving)
            for _ in range(count)
        ]
        self._broken: set[str] = set()

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """Embed chunks; rows without regions pass through."""
        return pa.Table.from_pylist([self._chunk(row) for row in chunks.to_pylist()], schema=ROW)

    def _chunk(self, row: dict[str, Any]) -> dict[str, Any]:
        record = json.loads(row["record"])
        if self._fatal is not None:
            return row | {"record": json.dumps(record | _fatal(self._fatal)), "regions": b""}
        if not row["n_chunks"]:
            return row
        if row["slide_id"] in self._broken:
            return row | {"record": json.dumps(record | {"status": "skip"}), "regions": b""}
        started = time.perf_counter()
        try:
            out = self._embed(row, record)
        except SlideError as error:
            self._broken.add(row["slide_id"])
            failed = _failed(record, error, "read")
            return row | failed | {"regions": b""}
        except (ArchiveError, EncoderError) as error:  # nothing about this slide: the run must end
            return row | {"record": json.dumps(record | _fatal(error)), "regions": b""}
        record["seconds"] = time.perf_counter() - started
        return row | out | {"record": json.dumps(record)}

    def _embed(self, row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        from pathflip.archive.commit import write_fragment
        from pathflip.archive.schema import region_id

        tiling = self._config.tiling
        slots = tiling.slots
        plan = _from_ipc(row["regions"])
        masks = _matrix(plan["patch_mask"], slots).astype(bool)
        rx, ry = plan["rx"].to_numpy(), plan["ry"].to_numpy()
        quality = np.zeros((len(plan), slots, 2), np.float32)
        kept = np.zeros((len(plan), slots), np.uint8)
        dims = [encoder.dim for encoder in self._encoders]
        features = [np.zeros((len(plan), slots, dim), np.float16) for dim in dims]
        means = [np.zeros((len(plan), dim), np.float64) for dim in dims]
        rects = [
            patch_rects(tiling, rx=int(rx[i]), ry=int(ry[i]), mpp=record["mpp"])[masks[i]]
            for i in range(len(plan))
        ]
        for i, patches in self._read(record, rects):
            slot = np.flatnonzero(masks[i])
            quality[i, slot] = patches.quality
            good = np.flatnonzero(patches.ok)
            pixels = patches.pixels if len(good) == len(slot) else patches.pixels[good]
            if not len(good):
                continue
            values = [_encode(encoder, pixels) for encoder in self._encoders]
            finite = np.logical_and.reduce([np.isfinite(v).all(axis=1) for v in values])
            record["not_finite"] = record.get("not_finite", 0) + int((~finite).sum())
            slot = slot[good[finite]]
            kept[i, slot] = 1
            for which, value in enumerate(values):
                features[which][i, slot] = value[finite]
                means[which][i] = value[finite].sum(axis=0, dtype=np.float64)
        self._check_source(record)
        counts = kept.sum(axis=1, dtype=np.int32)
        record["tiles_ok"] = int(counts.sum())
        record["tiles_bad"] = int(masks.sum()) - record["tiles_ok"]
        if record.get("extends") and record["tiles_bad"]:
            raise SlideError(
                f"{record['tiles_bad']} patches of {Path(record['uri']).name} that the archive "
                "holds are now damaged or not finite.",
                hint="Check the file and the new encoder; the slide stays as it was.",
                code="too_many_bad_tiles",
            )
        alive = np.flatnonzero(counts)
        quality *= kept[..., None]
        ids = [region_id(row["slide_id"], rx=int(rx[i]), ry=int(ry[i])) for i in alive]
        take = plan.take(pa.array(alive))
        n = len(alive)
        common = {
            "slide_id": pa.array([row["slide_id"]] * n, pa.string()),
            "x0": take["x0"],
            "y0": take["y0"],
            "size0": pa.array(np.full(n, record["size0"], np.int32)),
            "mpp": pa.array(np.full(n, record["mpp"])),
            "tissue_fraction": take["tissue_fraction"],
            "n_patches": pa.array(counts[alive]),
        }
        tissue = _matrix(plan["patch_tissue"], slots)[alive] * kept[alive]
        regions = pa.table(
            {
                "region_id": ids,
                "rx": take["rx"],
                "ry": take["ry"],
                "n_bad": pa.array((masks.sum(axis=1) - counts)[alive].astype(np.int32)),
                "patch_mask": _fixed(kept[alive]),
                "patch_tissue": _fixed(tissue.astype(np.float32)),
                "patch_blur": _fixed(quality[alive, :, 0]),
                "patch_pen": _fixed(quality[alive, :, 1]),
            }
            | common
        )
        embeddings, sums, fragments = [], [], []
        for which, (table, dim) in enumerate(zip(self._tables, dims, strict=True)):
            block = features[which][alive].reshape(n, slots * dim)
            rows = pa.table(
                {"region_id": ids, "slide_id": common["slide_id"], "features": _fixed(block)}
            )
            fragments.append([write_fragment(self._archive, table, rows)] if n else [])
            embeddings.append(
                _to_ipc(
                    pa.table({"id": ids, "vector": _fixed(_unit(means[which][alive]))} | common)
                )
            )
            sums.append(means[which].sum(axis=0).tobytes())
        return {
            "regions": _to_ipc(regions),
            "embeddings": embeddings,
            "sums": sums,
            "fragments": fragments,
        }

    def _read(
        self, record: dict[str, Any], rects: list[NDArray[np.int64]]
    ) -> Iterator[tuple[int, Patches]]:
        """Each region's patches in turn; with several readers the next ones are read meanwhile."""
        readers = self._readers
        for ahead in range(min(len(readers), len(rects))):
            self._start(readers[ahead], record, rects[ahead])
        for i in range(len(rects)):
            reader = readers[i % len(readers)]
            yield i, self._finish(reader, record, rects[i])
            if i + len(readers) < len(rects):
                self._start(reader, record, rects[i + len(readers)])

    def _start(self, reader: SlideReader, record: dict[str, Any], rects: NDArray[np.int64]) -> None:
        self._check_source(record)
        tiling = self._config.tiling
        reader.start_read(
            record["uri"],
            rects,
            mpp=tiling.mpp,
            px=tiling.patch_px,
            slide_mpp=record.get("mpp_override"),
            timeout_s=self._config.read_timeout_s,
        )

    def _finish(
        self, reader: SlideReader, record: dict[str, Any], rects: NDArray[np.int64]
    ) -> Patches:
        while True:
            try:
                return reader.finish_read(px=self._config.tiling.patch_px)
            except SlideError as error:
                self._check_source(record)  # what failed may be another file than was planned
                if error.code not in RETRIED or record["attempts"] >= self._config.attempts:
                    raise
                record["attempts"] += 1
                self._start(reader, record, rects)

    def _check_source(self, record: dict[str, Any]) -> None:
        source = stat_source(Path(record["uri"]))
        if (source.bytes, source.mtime_ns) != (record["bytes"], record["mtime_ns"]):
            raise _changed(record["uri"])


def _check_revision(encoder: Encoder, revision: str) -> None:
    if encoder.revision != revision:
        raise EncoderError(
            f"{encoder.name} is revision {encoder.revision} on this node, not {revision}.",
            hint="Give every node the same weights: NAME=/shared/folder, or a pinned revision.",
            code="other_encoder",
        )


def _same_cut(candidate: Candidate, held: dict[str, Any]) -> bool:
    """Whether what the archive holds of these bytes was cut as is asked for now."""
    if candidate.outline not in ("mask", held["outline"]):
        return False
    given = candidate.mpp
    return given is None or (held["mpp"] is not None and abs(held["mpp"] - given) <= 1e-9 * given)


def _fatal(error: PathFLIPError) -> dict[str, str]:
    return {
        "status": "fatal",
        "error": type(error).__name__,
        "reason": error.code,
        "message": error.message,
        "hint": error.hint,
    }


def _encode(encoder: Encoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        values = encoder(pixels)
    except EncoderError as error:
        if error.code == "out_of_memory":
            raise SlideError(error.message, hint=error.hint, code="out_of_memory") from error
        raise
    # Stored as fp16: what does not fit there is as lost as a NaN.
    return np.where(np.abs(values) <= np.finfo(np.float16).max, values, np.nan)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.asarray(unit, np.float32)


def _check_name(record: dict[str, Any]) -> None:
    """Refuse a path that is no Unicode: the archive could not name the slide."""
    shown = os.fsencode(record["uri"]).decode(errors="backslashreplace")
    if shown != record["uri"]:
        record["uri"] = shown
        raise SlideError(
            f"The name of {Path(shown).name} is not valid UTF-8.",
            hint="Rename the file.",
            code="unsupported",
        )


def _changed(uri: str) -> SlideError:
    return SlideError(
        f"{Path(uri).name} changed while it was being ingested.",
        hint="Run the same command again once the file is at rest.",
        code="source_changed",
    )


def _new_record(source: Source) -> dict[str, Any]:
    return {
        "slide_id": slide_id(source.uri, source.uri),
        "uri": source.uri,
        "aliases": [],
        "status": "ready",
        "reason": None,
        "message": None,
        "stage": None,
        "sha256": None,
        "bytes": source.bytes,
        "mtime_ns": source.mtime_ns,
        "attempts": 1,
        "tiles_ok": 0,
        "tiles_bad": 0,
        "seconds": 0.0,
    }


def _failed(record: dict[str, Any], error: SlideError, stage: str) -> dict[str, Any]:
    reason = "too_many_bad_tiles" if error.code == "bad_tile" else error.code
    record = record | {
        "status": "quarantined",
        "reason": reason,
        "message": str(error),
        "stage": stage,
    }
    return {"slide_id": record["slide_id"], "record": json.dumps(record)}


def _fixed(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    flat = np.ascontiguousarray(matrix)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, width)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


# -- the driver -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """What a run did. ``slides`` counts ready, quarantined, empty and skipped ones of this run."""

    slides: dict[str, int]
    regions: int
    patches: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip ingest --json`` prints."""
        rate = self.patches / self.seconds if self.seconds else 0.0
        return asdict(self) | {
            "seconds": round(self.seconds, 3),
            "patches_per_second": round(rate, 1),
        }

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides were quarantined."""
        return 3 if self.slides["quarantined"] else 0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What an ingest would do, without writing anything."""

    slides: dict[str, int]
    regions: int
    patches: int
    bytes_to_read: int
    archive_bytes: int
    estimated_seconds: float
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip ingest --dry-run --json`` prints."""
        return asdict(self)


def ingest(
    sources: Sequence[str],
    archive: str,
    config: IngestConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestResult:
    """Ingest slides into an archive; the same call again does only what is missing.

    Args:
        sources: Slide files and folders.
        archive: Archive URI; made if it does not exist.
        config: Settings.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever something finished.

    Raises:
        ConfigError, EncoderError, ArchiveError: Before anything is written.
    """
    from jobs.cluster import connect

    config = config or IngestConfig()
    started = time.monotonic()
    encoders = [encoder_info(spec) for spec in _specs(config.encoder)]
    candidates = _candidates(sources, config)
    people = _people(config.patients)
    people.warn_unmatched(candidates)
    _check(archive, config, encoders)
    private = connect(address)
    _check_resources(config, private=private)
    uri = create_archive(archive, tiling=asdict(config.tiling)).uri
    with Committer(uri) as committer:
        tables = [
            committer.ensure_encoder_table(
                info.name,
                revision=info.revision,
                dim=info.dim,
                mpp=info.mpp,
                licence=info.licence,
            )
            for info in encoders
        ]
        ledger = Ledger(committer, config, encoders, candidates, people, started, progress)
        groups = ledger.outstanding()
        if groups:
            for batch in _pipeline(groups, config, uri, tables, encoders, private=private):
                ledger.take(batch)
        return ledger.finish()


def dry_run(
    sources: Sequence[str],
    archive: str,
    config: IngestConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> DryRun:
    """Plan every slide as ``ingest`` would, time the encoder on real patches, write nothing.

    Opens every slide and finds its tissue; hashes nothing. Time is estimated from patches of the
    first good slide read and embedded in this process, over the CPUs there are.
    """
    config = config or IngestConfig()
    started = time.monotonic()
    encoders = [encoder_info(spec) for spec in _specs(config.encoder)]
    candidates = _candidates(sources, config)
    _check(archive, config, encoders)
    archived = Archived(archive)
    todo = [c for c in candidates if not archived.is_done(c, config, encoders)]
    counts = {"ready": 0, "quarantined": 0, "empty": 0, "skipped": len(candidates) - len(todo)}
    regions = patches = bytes_done = 0
    total = sum(max(0, c.source.bytes) for c in todo)
    problems: dict[str, str] = {}
    per_patch_s: float | None = None
    tiling = config.tiling
    with SlideReader(patches=tiling.slots, px=tiling.patch_px, halving=config.halving) as reader:
        for index, candidate in enumerate(todo):
            source = candidate.source
            try:
                plan = reader.plan(
                    source.uri,
                    tiling=tiling,
                    mpp=candidate.mpp,
                    tissue_geojson=candidate.geojson,
                    timeout_s=config.plan_timeout_s,
                )
                counts["ready" if len(plan.regions) else "empty"] += 1
                regions += len(plan.regions)
                patches += int(plan.regions.patch_mask.sum())
                if per_patch_s is None and len(plan.regions):
                    per_patch_s = _time_patches(reader, candidate, plan, config)
            except SlideError as error:
                counts["quarantined"] += 1
                problems[source.uri] = f"{error.code}: {error}"
            bytes_done += max(0, source.bytes)
            if progress is not None:
                progress(
                    Progress(
                        slides_done=index + 1,
                        slides_total=len(todo),
                        quarantined=counts["quarantined"],
                        regions=regions,
                        patches=patches,
                        bytes_done=bytes_done,
                        bytes_total=total,
                        seconds=time.monotonic() - started,
                        stage="planning",
                    )
                )
    width = sum(info.dim for info in encoders)
    workers = config.actors or len(os.sched_getaffinity(0))
    return DryRun(
        slides=counts,
        regions=regions,
        patches=patches,
        bytes_to_read=total,
        archive_bytes=regions * (tiling.slots * (2 * width + 13) + 4 * width + 200)
        + len(todo) * THUMBNAIL_BYTES,
        estimated_seconds=round(
            (patches * (per_patch_s or 0.0) + time.monotonic() - started) / workers, 1
        ),
        problems=problems,
    )


def _time_patches(
    reader: SlideReader, candidate: Candidate, plan: SlidePlan, config: IngestConfig
) -> float:
    """Seconds to read and embed one patch, from the slide's fullest region."""
    encoders = [load_encoder(spec, device=config.device) for spec in _specs(config.encoder)]
    fullest = int(plan.regions.patch_mask.sum(axis=1).argmax())
    rects = patch_rects(
        config.tiling,
        rx=int(plan.regions.rx[fullest]),
        ry=int(plan.regions.ry[fullest]),
        mpp=plan.info["mpp"],
    )[plan.regions.patch_mask[fullest]]
    seconds = math.inf
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        reader.start_read(
            candidate.source.uri,
            rects,
            mpp=config.tiling.mpp,
            px=config.tiling.patch_px,
            slide_mpp=candidate.mpp,
            timeout_s=config.read_timeout_s,
        )
        patches = reader.finish_read(px=config.tiling.patch_px)
        for encoder in encoders:
            encoder(patches.pixels)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds / len(rects)


class Archived:
    """What an archive, if there is one, already knows of slides: by id, path and content."""

    def __init__(self, archive: str) -> None:
        columns = [
            "slide_id", "uri", "aliases", "status", "reason", "bytes", "mtime_ns", "sha256", "mpp",
            "mpp_source", "fingerprint", "encoders", "patient_id", "split", "labels", "ingested_at",
        ]  # fmt: skip
        try:
            rows = Archive(archive).slides(columns=columns).to_pylist()
        except ArchiveError as error:
            if error.code != "missing_archive":
                raise
            rows = []
        rows.sort(key=lambda row: row["ingested_at"])
        self.rows: dict[str, dict[str, Any]] = {row["slide_id"]: row for row in rows}
        self._by_uri = {row["uri"]: row for row in rows}
        self._by_alias = {alias: row for row in rows for alias in row["aliases"] or ()}

    def row(self, uri: str) -> dict[str, Any] | None:
        """The row a path is known under, the newest where there are several."""
        return self._by_uri.get(uri) or self._by_alias.get(uri)

    def remembered(self, candidate: Candidate) -> Candidate:
        """The candidate with the resolution the user once gave for it, if none is given now."""
        row = self.row(candidate.source.uri)
        if candidate.mpp is None and row is not None and row["mpp_source"] == "override":
            return replace(candidate, mpp=row["mpp"])
        return candidate

    def is_done(
        self, candidate: Candidate, config: IngestConfig, encoders: Sequence[EncoderInfo]
    ) -> bool:
        """Whether nothing is left to do for a slide."""
        source = candidate.source
        row = self.row(source.uri)
        if row is None or row["bytes"] != source.bytes:
            return False
        if row["uri"] != source.uri:  # a copy: unchanged if it is older than what was made of it
            if source.mtime_ns >= row["ingested_at"].timestamp() * 1e9:
                return False
        elif row["mtime_ns"] != source.mtime_ns:
            return False
        if row["status"] == "quarantined":
            # Damage of the archive, not of the source; and what the user may have mended since.
            if row["reason"] in ("damaged_rows", "bad_outline") or config.retry:
                return False
            mendable = row["reason"] in ("needs_mpp", "mpp_out_of_range", "anisotropic_pixels")
            return not (mendable and candidate.mpp is not None)
        if not _same_cut(candidate, self._held(row, encoders)):
            return False
        return self._complete(row, encoders)

    def contents(self, encoders: Sequence[EncoderInfo]) -> dict[int, dict[str, dict[str, Any]]]:
        """What is held, by size and sha256: what ``Planner`` needs to recognise copies."""
        held: dict[int, dict[str, dict[str, Any]]] = {}
        for row in self.rows.values():
            if row["status"] in ("ready", "empty"):
                held.setdefault(row["bytes"], {})[row["sha256"]] = self._held(row, encoders)
        return held

    def _held(self, row: dict[str, Any], encoders: Sequence[EncoderInfo]) -> dict[str, Any]:
        return {
            "slide_id": row["slide_id"],
            "mpp": row["mpp"],
            "outline": (row["fingerprint"] or "").rpartition("/")[2],
            "complete": self._complete(row, encoders),
        }

    @staticmethod
    def _complete(row: dict[str, Any], encoders: Sequence[EncoderInfo]) -> bool:
        names = {info.name for info in encoders}
        return row["status"] == "empty" or names <= set(row["encoders"] or ())


class Ledger:
    """The driver's side: what is to do, what came back, what is committed.

    A slide is committed when all of its chunks are in, in one batch with others; its row in
    ``slides`` goes last, so it becomes visible whole or not at all.
    """

    def __init__(
        self,
        committer: Committer,
        config: IngestConfig,
        encoders: Sequence[EncoderInfo],
        candidates: Sequence[Candidate],
        people: Sheet,
        started: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._committer = committer
        self._config = config
        self._encoders = encoders
        self._names = [info.name for info in encoders]
        self._candidates = candidates
        self._started = started
        self._progress = progress
        self._people = people
        self._run_id = datetime.now(UTC).strftime("%Y%m%dT%H%M%S") + "-" + uuid.uuid4().hex[:6]
        self._confirmed: dict[str, list[Source]] = {}  # sources seen to hold a slide's bytes
        self._outstanding: set[str] = set()
        self._archived = Archived(committer.uri)
        self._chunks: dict[str, dict[int, dict[str, Any]]] = {}
        self._batch: list[dict[str, Any]] = []
        self._committed_at = time.monotonic()
        self._counts = {"ready": 0, "quarantined": 0, "empty": 0, "skipped": 0}
        self._regions = self._patches = self._fragments = 0
        self._bytes_done = self._bytes_total = 0

    def outstanding(self) -> list[dict[str, str]]:
        """Groups of candidates that still need work, as rows for ``Planner``."""
        groups: dict[int, list[Candidate]] = {}
        for candidate in map(self._archived.remembered, self._candidates):
            if self._archived.is_done(candidate, self._config, self._encoders):
                self._counts["skipped"] += 1
            else:
                self._bytes_total += max(0, candidate.source.bytes)
                self._outstanding.add(candidate.source.uri)
                groups.setdefault(candidate.source.bytes, []).append(candidate)
        held = self._archived.contents(self._encoders)
        self._report("starting")
        return [
            {
                "known": json.dumps(held.get(size, {})),
                "candidates": json.dumps([asdict(candidate) for candidate in members]),
            }
            for size, group in groups.items()
            # Unreadable files all have size -1 and share nothing.
            for members in ([group] if size >= 0 else [[one] for one in group])
        ]

    def take(self, batch: pa.Table) -> None:
        """Account for rows that came back; commit when enough slides are whole."""
        for row in batch.to_pylist():
            record = json.loads(row["record"])
            if record["status"] == "fatal":
                kind = ArchiveError if record["error"] == "ArchiveError" else EncoderError
                raise kind(record["message"], hint=record["hint"], code=record["reason"])
            share = max(0, record["bytes"]) / max(1, row["n_chunks"])
            self._bytes_done += round(share)
            if record["status"] == "duplicate":
                self._counts["skipped"] += 1
                self._confirm(record)
                continue
            self._patches += record["tiles_ok"] if row["n_chunks"] else 0
            chunks = self._chunks.setdefault(row["slide_id"], {})
            chunks[row["chunk"]] = row | {"record": record}
            if len(chunks) >= row["n_chunks"]:
                self._batch.append(self._whole(self._chunks.pop(row["slide_id"])))
        overdue = time.monotonic() - self._committed_at > self._config.commit_s
        if self._batch and overdue:
            self.commit()
        self._report("ingesting")

    def _whole(self, chunks: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """One slide's chunks as rows of every table; data rows only if the slide is good."""
        parts = [chunks[index] for index in sorted(chunks)]
        records = [part["record"] for part in parts]
        record = dict(records[0])
        failed = next((r for r in records if r["status"] == "quarantined"), None)
        record["tiles_ok"] = sum(r["tiles_ok"] for r in records)
        record["tiles_bad"] = sum(r["tiles_bad"] for r in records)
        record["attempts"] = max(r["attempts"] for r in records)
        record["seconds"] = sum(r["seconds"] for r in records)
        if failed is None and record["status"] == "ready":
            planned, bad = record["planned_patches"], record["tiles_bad"]
            if bad > max(MIN_BAD_TILES, self._config.max_bad_tiles * planned):
                name = Path(record["uri"]).name
                if 2 * sum(r.get("not_finite", 0) for r in records) > bad:
                    reason = "bad_features"
                    message = (
                        f"The encoder returned values that are not finite for {bad} of {planned} "
                        f"patches of {name}. Check its weights and precision."
                    )
                else:
                    reason = "too_many_bad_tiles"
                    message = (
                        f"{bad} of {planned} patches of {name} are damaged. Copy the file again "
                        "from its source, or raise max_bad_tiles."
                    )
                failed = record | {"reason": reason, "message": message, "stage": "read"}
        if failed is not None:
            record |= {key: failed[key] for key in ("reason", "message", "stage")}
            record["status"] = "quarantined"
        tables = [_from_ipc(part["regions"]) for part in parts if part["embeddings"]]
        good = record["status"] == "ready"
        regions = pa.concat_tables(tables) if good and tables else None
        if good and (regions is None or not len(regions)):
            record |= {"status": "quarantined", "reason": "too_many_bad_tiles", "stage": "read"}
            record["message"] = "Every patch of the slide is damaged."
            good = False
        stored = self._archived.rows.get(record["slide_id"], {})
        people = self._people.find(record["uri"]) or stored
        whole: dict[str, Any] = {"record": record, "regions": regions if good else None}
        record |= {
            "patient_id": people.get("patient_id"),
            "split": people.get("split"),
            "labels": people.get("labels"),
            "n_regions": len(regions) if good and regions is not None else 0,
            "n_patches": record["tiles_ok"] if good else 0,
            "encoders": self._names if good else [],
            "tissue_png": parts[0]["tissue_png"] or None,
            "thumbnail": parts[0]["thumbnail"] or None,
        }
        if good:
            whole["embeddings"] = {
                name: self._embeddings(record, parts, which)
                for which, name in enumerate(self._names)
            }
            whole["fragments"] = {
                name: [text for part in parts for text in part["fragments"][which]]
                for which, name in enumerate(self._names)
            }
        return whole

    def _embeddings(
        self, record: dict[str, Any], parts: list[dict[str, Any]], which: int
    ) -> pa.Table:
        """Region rows and the slide's own, whose vector is the mean over all of its patches."""
        rows = pa.concat_tables(_from_ipc(part["embeddings"][which]) for part in parts)
        total = np.sum([np.frombuffer(part["sums"][which]) for part in parts], axis=0)
        slide = pa.table(
            {
                "id": [record["slide_id"]],
                "vector": _fixed(_unit(total[None])),
                "slide_id": [record["slide_id"]],
                "x0": pa.array([0], pa.int64()),
                "y0": pa.array([0], pa.int64()),
                "size0": pa.array([max(record["width"], record["height"])], pa.int32()),
                "mpp": [record["mpp"]],
                "tissue_fraction": pa.array([_share(record["tissue_mm2"], record)], pa.float32()),
                "n_patches": pa.array([record["tiles_ok"]], pa.int32()),
            }
        )
        both = pa.concat_tables([slide, rows.select(slide.column_names)])
        n = len(both)
        kinds = pa.array(["slide"] + ["region"] * (n - 1))
        patient = pa.array([record["patient_id"]] * n, pa.string())
        return both.append_column("kind", kinds).append_column("patient_id", patient)

    def commit(self) -> None:
        """Make the finished slides visible."""
        batch, self._batch = self._batch, []
        self._committed_at = time.monotonic()
        kept = []
        for whole in batch:
            record = whole["record"]
            self._counts[record["status"]] += 1
            self._counts["skipped"] += len(record["aliases"])
            self._regions += record["n_regions"]
            if self._spares(record):
                continue
            kept.append(whole)
            if record["status"] != "quarantined":
                self._confirm(record)
        if not kept:
            return
        good = [whole for whole in kept if whole["regions"] is not None]
        self._committer.commit(
            slides=self._slides_table([whole["record"] for whole in kept]),
            regions=pa.concat_tables([w["regions"] for w in good]) if good else None,
            embeddings={
                name: pa.concat_tables([w["embeddings"][name] for w in good])
                for name in self._names
                if good
            },
            fragments={
                name: [text for w in good for text in w["fragments"][name]]
                for name in self._names
                if good
            },
        )
        self._fragments += sum(len(texts) for w in good for texts in w["fragments"].values())
        if self._fragments > COMPACT_AFTER_FRAGMENTS:
            self._committer.compact()
            self._fragments = 0

    def _spares(self, record: dict[str, Any]) -> bool:
        """Whether the archive holds these bytes as a good slide, which a failure must not cost."""
        stored = self._archived.rows.get(record["slide_id"])
        if record["status"] != "quarantined" or stored is None or stored["status"] != "ready":
            return False
        if stored["sha256"] != record["sha256"]:
            return False
        logger.warning("%s stays as it was: %s", record["slide_id"], record["message"])
        return True

    def _confirm(self, record: dict[str, Any]) -> None:
        for uri in (record["uri"], *record["aliases"]):
            self._confirmed.setdefault(record["slide_id"], []).append(stat_source(Path(uri)))

    def _settle(self) -> None:
        """Bring paths and people up to date and drop what a path no longer holds."""
        columns = [
            "slide_id", "uri", "aliases", "status", "bytes", "mtime_ns", "patient_id", "split",
            "labels", "ingested_at",
        ]  # fmt: skip
        rows = {
            row["slide_id"]: row
            for row in self._committer.archive.slides(columns=columns).to_pylist()
        }
        changes = {slide: self._change(row) for slide, row in rows.items()}
        changes = {slide: change for slide, change in changes.items() if change}
        if changes:
            self._committer.update_slides(changes)
        for slide, change in changes.items():
            rows[slide] |= change
        heirs: dict[str, dict[str, Any]] = {}
        for slide in (stale := self._stale(list(rows.values()))):
            copies = [uri for uri in rows[slide]["aliases"] or () if os.path.lexists(uri)]
            if copies:
                home = stat_source(Path(copies[0]))
                where = {"uri": home.uri, "bytes": home.bytes, "mtime_ns": home.mtime_ns}
                heirs[slide] = where | {"aliases": copies[1:]}
        if heirs:
            self._committer.update_slides(heirs)
        if gone := [slide for slide in stale if slide not in heirs]:
            self._committer.drop_slides(gone)

    def _change(self, row: dict[str, Any]) -> dict[str, Any]:
        """What this run learned of a slide's path and patient."""
        now = dict(row)
        if sources := self._confirmed.get(row["slide_id"]):
            uris = [source.uri for source in sources]
            taken = row["uri"] in self._outstanding or not os.path.lexists(row["uri"])
            if row["uri"] in uris:
                home = sources[uris.index(row["uri"])]
            elif taken:  # moved, or its place is now another slide's
                home = sources[0]
            else:
                home = None
            if home is not None:
                now |= {"uri": home.uri, "bytes": home.bytes, "mtime_ns": home.mtime_ns}
            now["aliases"] = sorted({*(row["aliases"] or ()), *uris} - {now["uri"]})
        if people := self._people.find(now["uri"]):
            now |= people
        return {key: value for key, value in now.items() if (value or None) != (row[key] or None)}

    def _stale(self, rows: list[dict[str, Any]]) -> list[str]:
        """Rows of paths that hold another slide by now; of each path its last state stays."""
        by_uri: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: row["ingested_at"]):
            by_uri.setdefault(row["uri"], []).append(row)
        stale = []
        for known in by_uri.values():
            confirmed = [row for row in known if row["slide_id"] in self._confirmed]
            last = (confirmed or known)[-1]
            keep = {last["slide_id"]}
            if last["status"] == "quarantined":  # what the path held before may still be good
                keep |= {row["slide_id"] for row in known if row["status"] != "quarantined"}
            stale += [row["slide_id"] for row in known if row["slide_id"] not in keep]
        return stale

    def _slides_table(self, records: list[dict[str, Any]]) -> pa.Table:
        schema = _slides_schema()
        now = datetime.now(UTC)
        tiling = self._config.tiling.fingerprint()
        rows = []
        for record in records:
            cut = f"{record['sha256']}/{tiling}/{record.get('mpp')}/{record.get('outline')}"
            extra = {
                "fingerprint": record.get("fingerprint") or cut,
                "run_id": self._run_id,
                "ingested_at": now,
                "package_version": pathflip.__version__,
            }
            both = record | extra
            rows.append({name: both.get(name) for name in schema.names})
        return pa.Table.from_pylist(rows, schema=schema)

    def finish(self) -> IngestResult:
        """Commit the rest, tidy up, and say what was done."""
        self.commit()
        self._settle()
        if self._chunks:  # cannot happen while every actor returns every row it was given
            raise RuntimeError(f"chunks of {len(self._chunks)} slides never came back")
        if sum(self._counts.values()) > self._counts["skipped"]:
            self._committer.compact()
        self._report("done")
        return IngestResult(
            slides=dict(self._counts),
            regions=self._regions,
            patches=self._patches,
            seconds=time.monotonic() - self._started,
        )

    def _report(self, stage: str) -> None:
        if self._progress is None:
            return
        pending = [whole["record"]["status"] for whole in self._batch]
        done = sum(self._counts.values()) + len(pending)
        self._progress(
            Progress(
                slides_done=done,
                slides_total=len(self._candidates),
                quarantined=self._counts["quarantined"] + pending.count("quarantined"),
                regions=self._regions,
                patches=self._patches,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                seconds=time.monotonic() - self._started,
                stage=stage,
            )
        )


def _slides_schema() -> pa.Schema:
    from pathflip.archive.schema import CHECKSUM, slides_schema

    return pa.schema([column for column in slides_schema() if column.name != CHECKSUM])


def _share(tissue_mm2: float, record: dict[str, Any]) -> float:
    area = record["width"] * record["height"] * record["mpp"] ** 2 / 1e6
    return min(1.0, tissue_mm2 / area) if area else 0.0


def _pipeline(
    groups: list[dict[str, str]],
    config: IngestConfig,
    archive: str,
    tables: Sequence[str],
    encoders: Sequence[EncoderInfo],
    *,
    private: bool,
) -> Iterator[pa.Table]:
    """Run both actor stages over Ray Data, yielding rows as they come back."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    # One chunk a block: the unit that is spread over actors.
    context.target_max_block_size = 4096
    resources = _resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    use_gpu = _uses_gpu(config)
    workers = config.actors or (gpus if use_gpu else cpus) or 1
    # A cluster may grow: what it is given to do is what makes it grow.
    most = config.actors or (workers if private else None)
    # 0.9 + 0.1 so that planning always finds room, also on one core.
    data = ray.data.from_items(groups, override_num_blocks=len(groups))
    planned = data.map_batches(
        Planner,
        fn_constructor_args=(config, archive),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, workers // 4)),
        num_cpus=0.1,
    )
    embedded = planned.map_batches(
        Embedder,
        fn_constructor_args=(config, archive, list(tables), [info.revision for info in encoders]),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=min(workers, len(groups)) if private else 1
        ),
        num_cpus=float(config.readers or 4) if use_gpu else 0.9,
        num_gpus=1.0 if use_gpu else 0.0,
    )
    yield from embedded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


# -- before anything starts -----------------------------------------------------------------------


def _specs(encoder: str) -> list[str]:
    specs = [spec.strip() for spec in encoder.split(",") if spec.strip()]
    if not specs:
        raise ConfigError("No encoder was named.", hint="Leave --encoder out for texture.")
    return specs


def _uses_gpu(config: IngestConfig) -> bool:
    if config.device == "cpu" or _specs(config.encoder) == ["texture"]:
        return False
    if config.device == "cuda":
        return True
    return bool(_resources().get("GPU", 0))


def _resources() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _check_resources(config: IngestConfig, *, private: bool) -> None:
    if config.device == "cuda" and private and not _resources().get("GPU", 0):
        raise ConfigError(
            "device is cuda but this machine has no GPU.",
            hint="Leave device on auto, or name a cluster with GPUs (--address).",
            code="no_gpu",
        )


def _check(archive: str, config: IngestConfig, encoders: Sequence[EncoderInfo]) -> None:
    """Refuse what cannot work, before anything is started or written."""
    for info in encoders:
        if info.mpp is not None and abs(info.mpp / config.tiling.mpp - 1) > 0.01:
            raise ConfigError(
                f"Encoder {info.name} was trained at {info.mpp:g} µm per pixel; this tiling reads "
                f"{config.tiling.mpp:g}.",
                hint=f"Add -o tiling.mpp={info.mpp:g} and a patch_um that is its field of view.",
                code="encoder_scale",
            )
    _check_writable(archive)
    try:
        existing = Archive(archive)
    except ArchiveError as error:
        if error.code == "missing_archive":
            return
        raise
    wanted = asdict(config.tiling)
    if existing.tiling() != wanted:
        differ = [key for key, value in wanted.items() if existing.tiling().get(key) != value]
        theirs = ", ".join(f"{key}={existing.tiling().get(key)}" for key in differ)
        raise ConfigError(
            f"The archive {archive} is cut with {theirs}; this run asks for "
            f"{', '.join(f'{key}={wanted[key]}' for key in differ)}.",
            hint="Use the archive's own tiling, or another archive.",
            code="other_tiling",
        )
    held = existing.encoders()
    for info in encoders:
        if info.name in held and held[info.name]["revision"] != info.revision:
            raise ConfigError(
                f"The archive {archive} holds features of {info.name} revision "
                f"{held[info.name]['revision']}; this run would add revision {info.revision}.",
                hint="Use the same weights, or another archive.",
                code="other_encoder",
            )
        if held and info.name not in held and not config.add_encoder:
            raise ConfigError(
                f"The archive {archive} was made with encoder {', '.join(held)}, not {info.name}.",
                hint=f"Use --encoder {next(iter(held))}, another archive, or --add-encoder to "
                f"embed its slides with {info.name} beside it.",
                code="other_encoder",
            )


def _check_writable(archive: str) -> None:
    if "://" in archive:
        return  # an object store says so itself, at the first write
    path = Path(archive).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{archive} is a file.", hint="Give a folder for the archive.")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The archive {archive} cannot be written: {path} does not permit it.",
            hint="Check the permissions, or give another place.",
            code="not_permitted",
        )


class Sheet:
    """Rows of a CSV by slide: its path, its file's name, or that name without its ending."""

    def __init__(self, file: str | None, rows: dict[str, dict[str, Any]]) -> None:
        self._file = file
        self._rows = rows

    def find(self, uri: str) -> dict[str, Any]:
        """The row of a slide; empty where there is none."""
        for key in _keys(uri):
            if key in self._rows:
                return self._rows[key]
        return {}

    def warn_unmatched(self, candidates: Sequence[Candidate]) -> None:
        """Say which rows name no slide of this run: often a spelling, sometimes another batch."""
        named = {key for candidate in candidates for key in _keys(candidate.source.uri)}
        lost = [key for key in self._rows if key not in named]
        if lost:
            logger.warning(
                "%s: %d of %d rows name no slide of this run, such as %s.",
                self._file,
                len(lost),
                len(self._rows),
                lost[0],
            )


def _keys(uri: str) -> tuple[str, str, str]:
    name = Path(uri).name
    stem = next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), name)
    return uri, name, stem


def _candidates(sources: Sequence[str], config: IngestConfig) -> list[Candidate]:
    found = discover(sources)
    scale = _sheet(
        config.mpp_csv,
        ("slide", "mpp"),
        lambda row: {"mpp": _positive(row["mpp"], config.mpp_csv, row["slide"])},
    )
    outlines: dict[str, dict[str, Any]] = {}
    if config.tissue_dir:
        folder = Path(config.tissue_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(f"{config.tissue_dir} is no folder.", hint="Check --tissue.")
        outlines = {
            path.stem: {
                "geojson": str(path),
                "outline": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
            }
            for path in sorted(folder.glob("*.geojson"))
        }
    drawn = Sheet(config.tissue_dir, outlines)
    candidates = [
        Candidate(source=source, **scale.find(source.uri), **drawn.find(source.uri))
        for source in found
    ]
    scale.warn_unmatched(candidates)
    drawn.warn_unmatched(candidates)
    _check_unambiguous(candidates)
    return candidates


def _check_unambiguous(candidates: Sequence[Candidate]) -> None:
    """One mpp or outline meant for one file must not reach another of the same name."""
    named: dict[str, str] = {}
    for candidate in candidates:
        if candidate.mpp is None and candidate.geojson is None:
            continue
        uri = candidate.source.uri
        other = named.setdefault(_keys(uri)[2], uri)
        if other != uri:
            raise ConfigError(
                f"{uri} and {other} have the same name, so one line for both is not clear.",
                hint="Write their full paths in the CSV, or ingest them one by one.",
            )


def _people(file: str | None) -> Sheet:
    def person(row: dict[str, str]) -> dict[str, Any]:
        labels = {k: v for k, v in row.items() if k not in ("slide", "patient_id", "split")}
        return {
            "patient_id": row["patient_id"] or None,
            "split": row.get("split") or None,
            "labels": json.dumps(labels, sort_keys=True) if labels else None,
        }

    return _sheet(file, ("slide", "patient_id"), person)


def _sheet(
    file: str | None, columns: Sequence[str], read: Callable[[dict[str, str]], dict[str, Any]]
) -> Sheet:
    rows: dict[str, dict[str, Any]] = {}
    for row in _csv(file, columns):
        value = read(row)
        if rows.setdefault(row["slide"], value) != value:
            raise ConfigError(
                f"{file} has two different rows for {row['slide']}.", hint="Keep one of them."
            )
    return Sheet(file, rows)


def _csv(file: str | None, columns: Sequence[str]) -> list[dict[str, str]]:
    if file is None:
        return []
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        hint = "Give a CSV in UTF-8."
        raise ConfigError(f"{file} cannot be read: {error}.", hint=hint) from error
    missing = [column for column in columns if rows and column not in rows[0]]
    if missing or not rows:
        raise ConfigError(
            f"{file} has no column {' or '.join(missing)}." if missing else f"{file} has no rows.",
            hint=f"Its first line must be {','.join(columns)}.",
        )
    return rows


def _positive(text: str, file: str | None, slide: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise ConfigError(
            f"{file} gives {slide} the mpp {text!r}.", hint="Write µm per pixel, for example 0.25."
        )
    return value


if __name__ == "__main__":
    from pathflip.cli import main

    main(["ingest", *sys.argv[1:]])
