"""The second actor of an ingest: reads patches, embeds them, writes features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.ingest.config import IngestConfig
from jobs.ingest.deaths import DeathCount
from jobs.ingest.decision import Attempts, quarantine
from jobs.ingest.reading import Request, SlideFile, check_revision, encode_ahead, read_ahead
from jobs.ingest.rows import Chunk, SlideRecord, from_table, matrix, to_table
from jobs.worker import from_ipc, to_ipc
from pathflip.archive.fragments import write_fragment
from pathflip.archive.halves import patch_sums
from pathflip.archive.slide_rows import (
    feature_rows,
    region_embeddings,
    region_rows,
)
from pathflip.encoders import Encoder, load_encoder
from pathflip.errors import ArchiveError, EncoderError, PathFLIPError, SlideError
from pathflip.geometry import patch_rects
from pathflip.slides.reader import SlideReader
from pathflip.slides.sources import Source
from pathflip.slides.staging import Stage


class _ChunkFeatures:
    """Features and scores of a chunk's patches.

    Args:
        plan: The chunk's regions as planned, n of them.
        masks: bool [n, slots]: the patches that were planned.
        dims: Width of the features of each encoder.

    Attributes:
        kept: uint8 [n, slots]: patches that were read and have finite features.
        quality: float32 [n, slots, 2]: blur and pen scores.
        features: For each encoder, float16 [n, slots, dim]; zero where not kept.
        not_finite: Patches an encoder returned no finite vector for.
    """

    def __init__(self, plan: pa.Table, masks: NDArray[np.bool_], *, dims: Sequence[int]) -> None:
        n, slots = masks.shape
        self.plan, self.masks = plan, masks
        self.kept = np.zeros((n, slots), np.uint8)
        self.quality = np.zeros((n, slots, 2), np.float32)
        self.features = [np.zeros((n, slots, dim), np.float16) for dim in dims]
        self.not_finite = 0

    @property
    def ok(self) -> int:
        """Patches kept."""
        return int(self.kept.sum())

    @property
    def bad(self) -> int:
        """Patches planned but not kept."""
        return int(self.masks.sum()) - self.ok

    def add(self, region: int, slots: NDArray[np.int64], values: list[NDArray[np.float32]]) -> None:
        """Keep patches of one region, each only if all encoders gave it finite values."""
        finite = np.logical_and.reduce([np.isfinite(one).all(axis=1) for one in values])
        self.not_finite += int((~finite).sum())
        kept = slots[finite]
        self.kept[region, kept] = 1
        for features, one in zip(self.features, values, strict=True):
            features[region, kept] = one[finite]


class Embedder:
    """Actor that reads a chunk's patches, embeds them and writes features as Lance fragments.

    Args:
        config: Settings.
        archive: Archive URI.
        tables: Table of features of each encoder.
        revisions: Revision of each encoder on the driver.
        readers: Reader processes to own.
        deaths: Calls the job's :class:`jobs.ingest.deaths.Deaths`; None where there is none.
    """

    def __init__(
        self,
        config: IngestConfig,
        archive: str,
        tables: Sequence[str],
        revisions: Sequence[str],
        readers: int,
        deaths: Callable[..., Any] | None = None,
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
                encoder = load_encoder(spec, device=config.device, patch_um=config.tiling.patch_um)
                check_revision(encoder, revision)
                if config.compile and (compiled := getattr(encoder, "compile", None)):
                    compiled()
                self._encoders.append(encoder)
        except EncoderError as error:  # raised here, Ray would start the actor again and again
            self._fatal = error
        self._readers = [
            SlideReader(patches=config.tiling.slots, px=px, halving=config.halving, buffers=2)
            for _ in range(readers)
        ]
        self._stage = Stage(config.stage_dir, config.stage_gb)
        self._broken: set[str] = set()
        self._deaths = DeathCount(deaths, limit=config.attempts)

    def close(self) -> None:
        """End the readers."""
        for reader in self._readers:
            reader.close()

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """Embed chunks; those without regions pass through."""
        return to_table([self._embed_chunk(chunk) for chunk in from_table(chunks)])

    def _embed_chunk(self, chunk: Chunk) -> Chunk:
        record = chunk.record
        if self._fatal is not None:
            return _without_data(chunk, _fatal(record, self._fatal))
        if not chunk.n_chunks:
            return chunk
        if record.slide_id in self._broken:
            return _without_data(chunk, replace(record, status="unread"))
        started = time.perf_counter()
        attempts = Attempts(limit=self._config.attempts, made=record.attempts)
        try:
            self._deaths.begin(record.slide_id, chunk.chunk, name=Path(record.uri).name)
            source = Source(uri=record.uri, bytes=record.bytes, mtime_ns=record.mtime_ns)
            with self._stage.open(source, sha256=record.sha256) as staged:
                features = self._embed_patches(
                    record, from_ipc(chunk.regions), attempts, path=staged.path
                )
            record = replace(
                record,
                tiles_ok=features.ok,
                tiles_bad=features.bad,
                not_finite=features.not_finite,
                attempts=attempts.made,
            )
            _check_extended(record)
            done = replace(chunk, **self._write(record, features))
        except SlideError as error:
            self._broken.add(record.slide_id)
            record = replace(record, attempts=attempts.made)
            return _without_data(chunk, quarantine(record, error, stage="read"))
        except (ArchiveError, EncoderError) as error:  # nothing about this slide: the run must end
            return _without_data(chunk, _fatal(record, error))
        finally:
            self._deaths.end(record.slide_id, chunk.chunk)
        return replace(done, record=replace(record, seconds=time.perf_counter() - started))

    def _embed_patches(
        self, record: SlideRecord, plan: pa.Table, attempts: Attempts, *, path: Path
    ) -> _ChunkFeatures:
        """Read and embed every planned patch of a chunk."""
        assert record.mpp is not None  # a slide without a resolution is not planned
        tiling = self._config.tiling
        masks = matrix(plan["patch_mask"], tiling.slots).astype(bool)
        rx, ry = plan["rx"].to_numpy(), plan["ry"].to_numpy()
        out = _ChunkFeatures(plan, masks, dims=[encoder.dim for encoder in self._encoders])
        requests = [
            Request(
                rects=patch_rects(tiling, rx=int(rx[i]), ry=int(ry[i]), mpp=record.mpp)[masks[i]],
                mpp=tiling.mpp,
            )
            for i in range(len(plan))
        ]
        file = SlideFile(
            path=path,
            bytes=record.bytes,
            mtime_ns=record.mtime_ns,
            mpp=record.mpp_override,
        )
        read = read_ahead(
            self._readers,
            file,
            requests,
            px=tiling.patch_px,
            attempts=attempts,
            timeout_s=self._config.read_timeout_s,
        )

        def batches() -> Iterator[tuple[tuple[int, NDArray[np.int64]], NDArray[np.uint8]]]:
            for i, patches in enumerate(read):
                slot = np.flatnonzero(masks[i])
                out.quality[i, slot] = patches.quality
                good = np.flatnonzero(patches.ok)
                if len(good):
                    whole = len(good) == len(slot)
                    yield (i, slot[good]), patches.pixels if whole else patches.pixels[good]

        for (i, slots), values in encode_ahead(self._encoders, batches()):
            out.add(i, slots, values)
        return out

    def _write(self, record: SlideRecord, embedded: _ChunkFeatures) -> dict[str, Any]:
        """Write the features; return the rows of the other tables, as fields of a chunk."""
        plan, masks, kept = embedded.plan, embedded.masks, embedded.kept
        counts = kept.sum(axis=1, dtype=np.int32)
        alive = np.flatnonzero(counts)
        quality = embedded.quality * kept[..., None]
        take = plan.take(pa.array(alive))
        tissue = matrix(plan["patch_tissue"], masks.shape[1])[alive] * kept[alive]
        assert record.mpp is not None
        regions = region_rows(
            record.slide_id,
            rx=take["rx"].to_numpy(),
            ry=take["ry"].to_numpy(),
            x0=take["x0"].to_numpy(),
            y0=take["y0"].to_numpy(),
            size0=record.size0,
            mpp=record.mpp,
            tissue_fraction=take["tissue_fraction"].to_numpy(),
            n_bad=(masks.sum(axis=1) - counts)[alive].astype(np.int32),
            patch_mask=kept[alive],
            patch_tissue=tissue.astype(np.float32),
            patch_blur=quality[alive, :, 0],
            patch_pen=quality[alive, :, 1],
        )
        embeddings, sums, fragments = [], [], []
        for table, features in zip(self._tables, embedded.features, strict=True):
            block = features[alive]
            rows = feature_rows(regions, block)
            fragments.append((write_fragment(self._archive, table, rows),) if len(alive) else ())
            means = patch_sums(block)
            embeddings.append(to_ipc(region_embeddings(regions, means)))
            sums.append(means.sum(axis=0).tobytes())
        return {
            "regions": to_ipc(regions),
            "embeddings": tuple(embeddings),
            "sums": tuple(sums),
            "fragments": tuple(fragments),
        }


def _without_data(chunk: Chunk, record: SlideRecord) -> Chunk:
    return replace(chunk, record=record, regions=b"")


def _fatal(record: SlideRecord, error: PathFLIPError) -> SlideRecord:
    return replace(record, status="fatal", error=error.to_dict())


def _check_extended(record: SlideRecord) -> None:
    """A further encoder must see every patch the first one saw: the archive holds their masks."""
    if record.extends and record.tiles_bad:
        raise SlideError(
            f"{record.tiles_bad} patches of {Path(record.uri).name} that the archive "
            "holds are now damaged or not finite.",
            hint="Check the file and the new encoder; the slide stays as it was.",
            code="too_many_bad_tiles",
        )
