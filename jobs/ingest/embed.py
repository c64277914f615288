"""The actors of the ingest job: Planner cuts slides, Embedder reads and embeds their patches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.ingest.candidates import Candidate, same_cut
from jobs.ingest.config import IngestConfig
from pathflip.archive import Archive
from pathflip.encoders import Encoder, load_encoder
from pathflip.errors import ArchiveError, EncoderError, PathFLIPError, SlideError
from pathflip.geometry import patch_rects
from pathflip.slides.reader import Patches, SlideReader
from pathflip.slides.sources import Source, slide_id, stat_source

RETRIED = ("timeout", "reader_crash")


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
                if same_cut(candidate, held):
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
                "patch_mask": fixed(regions.patch_mask.astype(np.uint8)),
                "patch_tissue": fixed(regions.patch_tissue),
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
        self,
        config: IngestConfig,
        archive: str,
        tables: Sequence[str],
        revisions: Sequence[str],
        readers: int,
    ) -> None:
        self._config = config
        self._archive = archive
        self._tables = list(tables)
        cv2.setNumThreads(1)  # parallel work is Ray's
        px = config.tiling.patch_px
        self._encoders: list[Encoder] = []
        self._fatal: PathFLIPError | None = None
        try:
            for spec, revision in zip(config.specs, revisions, strict=True):
                encoder = load_encoder(spec, device=config.device)
                _check_revision(encoder, revision)
                self._encoders.append(encoder)
        except EncoderError as error:  # raised here, Ray would start the actor again and again
            self._fatal = error
        self._readers = [
            SlideReader(patches=config.tiling.slots, px=px, halving=config.halving)
            for _ in range(readers)
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
        from pathflip.archive.fragments import write_fragment
        from pathflip.archive.schema import region_id

        tiling = self._config.tiling
        slots = tiling.slots
        plan = from_ipc(row["regions"])
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
                "patch_mask": fixed(kept[alive]),
                "patch_tissue": fixed(tissue.astype(np.float32)),
                "patch_blur": fixed(quality[alive, :, 0]),
                "patch_pen": fixed(quality[alive, :, 1]),
            }
            | common
        )
        embeddings, sums, fragments = [], [], []
        for which, (table, dim) in enumerate(zip(self._tables, dims, strict=True)):
            block = features[which][alive].reshape(n, slots * dim)
            rows = pa.table(
                {"region_id": ids, "slide_id": common["slide_id"], "features": fixed(block)}
            )
            fragments.append([write_fragment(self._archive, table, rows)] if n else [])
            embeddings.append(
                _to_ipc(pa.table({"id": ids, "vector": fixed(unit(means[which][alive]))} | common))
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


def _row(**values: Any) -> dict[str, Any]:
    empty = {"chunk": 0, "n_chunks": 0, "tissue_png": b"", "thumbnail": b"", "regions": b""}
    return {**empty, "embeddings": [], "sums": [], "fragments": [], **values}


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


def _fatal(error: PathFLIPError) -> dict[str, str]:
    return {
        "status": "fatal",
        "error": type(error).__name__,
        "reason": error.code,
        "message": error.message,
        "hint": error.hint,
    }


def _changed(uri: str) -> SlideError:
    return SlideError(
        f"{Path(uri).name} changed while it was being ingested.",
        hint="Run the same command again once the file is at rest.",
        code="source_changed",
    )


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


def _check_revision(encoder: Encoder, revision: str) -> None:
    if encoder.revision != revision:
        raise EncoderError(
            f"{encoder.name} is revision {encoder.revision} on this node, not {revision}.",
            hint="Give every node the same weights: NAME=/shared/folder, or a pinned revision.",
            code="other_encoder",
        )


def _encode(encoder: Encoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        values = encoder(pixels)
    except EncoderError as error:
        if error.code == "out_of_memory":
            raise SlideError(error.message, hint=error.hint, code="out_of_memory") from error
        raise
    # Stored as fp16: what does not fit there is as lost as a NaN.
    return np.where(np.abs(values) <= np.finfo(np.float16).max, values, np.nan)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows [n, d] scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.asarray(unit, np.float32)


def fixed(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    """A matrix [n, d] as an Arrow column of n lists of d."""
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


def from_ipc(data: bytes) -> pa.Table:
    """A table from the bytes a row carries it in."""
    return pa.ipc.open_stream(data).read_all()
