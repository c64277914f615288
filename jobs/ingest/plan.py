"""The first actor of an ingest: hashes slides, opens them, finds their tissue, cuts them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from jobs.ingest.candidates import Candidate
from jobs.ingest.config import IngestConfig
from jobs.ingest.decision import Attempts, identify, quarantine
from jobs.ingest.rows import Chunk, Held, SlideRecord, to_table
from jobs.worker import to_ipc
from pathflip.archive import Archive
from pathflip.archive.slide_rows import fixed
from pathflip.errors import SlideError
from pathflip.slides.reader import SlideReader
from pathflip.slides.sources import Source, changed, stat_source
from pathflip.slides.staging import Stage

T = TypeVar("T")


@dataclass(kw_only=True)
class _Distinct:
    """One slide of a group, and the copies of it that were found."""

    record: SlideRecord
    candidate: Candidate
    attempts: Attempts
    started: float
    copies: list[str] = field(default_factory=list)


class Planner:
    """Hashes, opens and cuts slides. A row in is a group of files; rows out are chunks.

    Files that may be copies of each other come together (``copies.py``), all are hashed first, and
    so a copy is recognised before it is opened. Where slides lie in an object store, several groups
    come in one block, and the next are staged while one is planned.

    Args:
        config: Settings.
        archive: Archive URI.
        held: Slides in the archive that files may be copies of, by sha256.
    """

    def __init__(self, config: IngestConfig, archive: str, held: Mapping[str, Held]) -> None:
        self._config = config
        self._archive = archive
        self._held = held
        self._reader = SlideReader(patches=1, px=16, halving=config.halving)
        self._stage = Stage(config.stage_dir, config.stage_gb)
        self._coming: list[Source] = []

    def close(self) -> None:
        """End the reader."""
        self._reader.close()

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        """Plan every distinct slide of the groups, one table for each group."""
        rows = groups.to_pylist()
        self._coming = [
            Source(**fields["source"]) for row in rows for fields in json.loads(row["candidates"])
        ]
        for row in rows:
            yield to_table(self._group(row))

    def _group(self, row: dict[str, Any]) -> list[Chunk]:
        chunks: list[Chunk] = []
        distinct: dict[str, _Distinct] = {}
        for fields in json.loads(row["candidates"]):
            candidate = Candidate.from_dict(fields)
            uri = candidate.source.uri
            record = SlideRecord.of(candidate.source)
            attempts = Attempts(limit=self._config.attempts)
            started = time.perf_counter()
            self._coming.remove(candidate.source)
            self._stage.prefetch(self._coming)
            try:
                sha = self._hash(candidate, attempts)
            except SlideError as error:
                record = replace(record, uri=_printable(uri), attempts=attempts.made)
                chunks.append(Chunk(record=quarantine(record, error, stage="hash")))
                continue
            if sha in distinct:
                distinct[sha].copies.append(uri)
                continue
            record = identify(record, candidate=candidate, sha256=sha, held=self._held.get(sha))
            if record.status == "duplicate":
                chunks.append(Chunk(record=record))
                continue
            distinct[sha] = _Distinct(
                record=record, candidate=candidate, attempts=attempts, started=started
            )
        for slide in distinct.values():
            chunks += self._plan(slide)
        return chunks

    def _hash(self, candidate: Candidate, attempts: Attempts) -> str:
        source = candidate.source
        if (shown := _printable(source.uri)) != source.uri:  # the archive could not name it
            raise SlideError(
                f"The name of {Path(shown).name} is not valid UTF-8.",
                hint="Rename the file.",
                code="unsupported",
            )
        with self._stage.open(source) as staged:
            if staged.sha256 is not None:
                return staged.sha256
        timeout_s = self._config.plan_timeout_s
        sha = _with_retries(attempts, lambda: self._reader.digest(source.uri, timeout_s=timeout_s))
        if stat_source(Path(source.uri)) != source:
            raise changed(source.uri)
        return sha

    def _plan(self, slide: _Distinct) -> list[Chunk]:
        attempts, candidate = slide.attempts, slide.candidate
        record = replace(slide.record, aliases=tuple(slide.copies), attempts=attempts.made)
        if record.extends:
            return self._plan_as_stored(record)
        try:
            with self._stage.open(candidate.source, sha256=record.sha256) as staged:
                plan = _with_retries(
                    attempts,
                    lambda: self._reader.plan(
                        str(staged.path),
                        tiling=self._config.tiling,
                        mpp=candidate.mpp,
                        tissue_geojson=candidate.geojson,
                        tissue_classes=self._config.tissue_classes,
                        timeout_s=self._config.plan_timeout_s,
                    ),
                )
        except SlideError as error:
            record = replace(record, attempts=attempts.made)
            return [Chunk(record=quarantine(record, error, stage="plan"))]
        regions = plan.regions
        record = replace(
            record,
            **plan.info,
            attempts=attempts.made,
            seconds=time.perf_counter() - slide.started,
            size0=int(regions.size0),
            mpp_override=candidate.mpp,
        )
        if not len(regions):
            record = replace(record, status="empty")
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
        first, *others = self._chunks(record, table)
        return [replace(first, tissue_png=plan.tissue_png, thumbnail=plan.thumbnail), *others]

    def _plan_as_stored(self, record: SlideRecord) -> list[Chunk]:
        """Plan for a further encoder: exactly the patches that the first one saw."""
        opened = Archive(self._archive)
        stored = opened.slide(record.slide_id)
        columns = ["rx", "ry", "x0", "y0", "size0", "tissue_fraction", "patch_mask", "patch_tissue"]
        table = opened.regions(record.slide_id, columns=columns)
        names = ("width", "height", "mpp", "mpp_source", "tissue_mm2", "fingerprint")
        record = replace(
            record,
            **{name: stored[name] for name in names},
            mpp_override=stored["mpp"] if stored["mpp_source"] == "override" else None,
            size0=table["size0"][0].as_py(),
        )
        return self._chunks(record, table.drop_columns(["size0"]))

    def _chunks(self, record: SlideRecord, table: pa.Table) -> list[Chunk]:
        masks = table["patch_mask"].combine_chunks().flatten().to_numpy()
        record = replace(record, planned_patches=int(masks.sum()))
        step = self._config.chunk_regions
        parts = [table.slice(start, step) for start in range(0, len(table), step)]
        return [
            Chunk(record=record, chunk=index, n_chunks=len(parts), regions=to_ipc(part))
            for index, part in enumerate(parts)
        ] or [Chunk(record=record)]


def _with_retries(attempts: Attempts, call: Callable[[], T]) -> T:
    while True:
        try:
            return call()
        except SlideError as error:
            attempts.retry_or_raise(error)


def _printable(uri: str) -> str:
    """A path with the bytes that are no UTF-8 escaped."""
    return os.fsencode(uri).decode(errors="backslashreplace")
