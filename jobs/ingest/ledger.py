"""The driver's side of an ingest: the one committer. Slides become visible whole."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

import pathflip
from jobs.ingest.candidates import Candidate
from jobs.ingest.config import IngestConfig
from jobs.ingest.copies import may_be_copies
from jobs.ingest.decision import conclude, is_spared, relocate, stale_slides
from jobs.ingest.result import IngestProgress, IngestResult
from jobs.ingest.resume import Archived
from jobs.ingest.rows import Chunk, Held, SlideRecord, from_table
from jobs.ingest.side_files import SideFiles
from jobs.worker import from_ipc
from pathflip.archive.commit import Committer
from pathflip.archive.schema import CHECKSUM, slides_schema
from pathflip.archive.slide_rows import embedding_rows
from pathflip.encoders import EncoderInfo
from pathflip.errors import from_dict
from pathflip.slides.sources import Source, is_there, stat_slide

logger = logging.getLogger(__name__)

COMMIT_SLIDES = 128  # what waits for a commit is held in memory, about a megabyte a slide
TIDY_AFTER_COMMITS = 64  # a commit writes the whole list of fragments anew


@dataclass(frozen=True, kw_only=True)
class FinishedSlide:
    """A slide all of whose chunks are in; data only where it is ready.

    Attributes:
        record: Its record, see ``decision.conclude``.
        people: Its patient_id, split and labels, as far as they are known.
        regions: Rows of the table ``regions``.
        embeddings: For each encoder, rows of its table of vectors.
        fragments: For each encoder, the fragments of features that were written, as JSON.
        tissue_png: The tissue mask.
        thumbnail: JPEG of the slide.
    """

    record: SlideRecord
    people: Mapping[str, Any]
    regions: pa.Table | None = None
    embeddings: dict[str, pa.Table] = field(default_factory=dict)
    fragments: dict[str, list[str]] = field(default_factory=dict)
    tissue_png: bytes | None = None
    thumbnail: bytes | None = None

    @property
    def n_regions(self) -> int:
        """Regions to commit."""
        return 0 if self.regions is None else len(self.regions)

    def row(self, *, encoders: Sequence[str], tiling: str) -> dict[str, Any]:
        """Return its row of the table ``slides``, but for what is the same for the whole run.

        Args:
            encoders: Names of the run's encoders.
            tiling: Fingerprint of the tiling.
        """
        record, good = self.record, self.regions is not None
        cut = f"{record.sha256}/{tiling}/{record.mpp}/{record.outline}"
        return vars(record) | {
            "aliases": list(record.aliases),
            "fingerprint": record.fingerprint or cut,
            "patient_id": self.people.get("patient_id"),
            "split": self.people.get("split"),
            "labels": self.people.get("labels"),
            "n_regions": self.n_regions,
            "n_patches": record.tiles_ok if good else 0,
            "encoders": list(encoders) if good else [],
            "tissue_png": self.tissue_png,
            "thumbnail": self.thumbnail,
        }


class Ledger:
    """Commit loop of an ingest, on the driver.

    A slide is committed when all of its chunks are in, in one batch with others; its row in
    ``slides`` goes last, so it becomes visible whole or not at all.
    """

    def __init__(
        self,
        committer: Committer,
        *,
        config: IngestConfig,
        encoders: Sequence[EncoderInfo],
        candidates: Sequence[Candidate],
        side: SideFiles,
        started: float,
        progress: Callable[[IngestProgress], None] | None,
    ) -> None:
        self._committer = committer
        self._config = config
        self._encoders = encoders
        self._names = [info.name for info in encoders]
        self._candidates = candidates
        self._started = started
        self._progress = progress
        self._side = side
        self._run_id = datetime.now(UTC).strftime("%Y%m%dT%H%M%S") + "-" + uuid.uuid4().hex[:6]
        self._sources = {one.source.uri: one.source for one in candidates}
        self._confirmed: dict[str, list[Source]] = {}  # sources seen to hold a slide's bytes
        self._outstanding: set[str] = set()
        self._archived = Archived(committer.uri)
        self._chunks: dict[str, dict[int, Chunk]] = {}
        self._batch: list[FinishedSlide] = []
        self._committed_at = time.monotonic()
        self._counts = {"ready": 0, "quarantined": 0, "empty": 0, "skipped": 0}
        self._reasons = Counter[str]()
        self._regions = self._patches = self._commits = 0
        self._commit_s = 0.0
        self._bytes_done = self._bytes_total = 0

    def outstanding(self) -> list[dict[str, str]]:
        """Return the candidates that need work as rows for ``Planner``; copies are in one row."""
        todo = []
        for candidate in map(self._archived.remembered, self._candidates):
            if self._archived.is_done(candidate, self._config, self._encoders):
                self._counts["skipped"] += 1
            else:
                self._bytes_total += max(0, candidate.source.bytes)
                self._outstanding.add(candidate.source.uri)
                todo.append(candidate)
        self._report("starting")
        return [
            {"candidates": json.dumps([asdict(candidate) for candidate in _given_first(group)])}
            for group in may_be_copies(todo)
        ]

    def held(self) -> dict[str, Held]:
        """Return the slides in the archive that an outstanding file may be a copy of, by sha256."""
        sizes = {self._sources[uri].bytes for uri in self._outstanding}
        return self._archived.contents(self._encoders, sizes=sizes)

    def take(self, batch: pa.Table) -> None:
        """Account for chunks that came back; commit when enough slides are whole.

        Raises:
            PathFLIPError: An actor met an error that says nothing about a slide.
        """
        for chunk in from_table(batch):
            record = chunk.record
            if record.status == "fatal":
                raise from_dict(record.error or {})
            self._bytes_done += round(max(0, record.bytes) / max(1, chunk.n_chunks))
            if record.status == "duplicate":
                self._counts["skipped"] += 1
                self._confirm(record)
                continue
            self._patches += record.tiles_ok if chunk.n_chunks else 0
            chunks = self._chunks.setdefault(record.slide_id, {})
            chunks[chunk.chunk] = chunk
            if len(chunks) >= chunk.n_chunks:
                del self._chunks[record.slide_id]
                self._batch.append(self._assemble([chunks[index] for index in sorted(chunks)]))
        overdue = time.monotonic() - self._committed_at > self._config.commit_s
        if len(self._batch) >= COMMIT_SLIDES or (self._batch and overdue):
            self.commit()
        self._report("ingesting")

    def _assemble(self, chunks: list[Chunk]) -> FinishedSlide:
        """Put a slide together from all of its chunks; it has data only if it is ready."""
        tables = [from_ipc(chunk.regions) for chunk in chunks if chunk.embeddings]
        record = conclude(
            [chunk.record for chunk in chunks],
            regions=sum(map(len, tables)),
            max_bad_tiles=self._config.max_bad_tiles,
        )
        stored = self._archived.rows.get(record.slide_id, {})
        paths = [record.uri, *record.aliases, *(self._own_paths(stored) if stored else ())]
        slide = FinishedSlide(
            record=record,
            people=self._side.people(paths) or stored,
            tissue_png=chunks[0].tissue_png or None,
            thumbnail=chunks[0].thumbnail or None,
        )
        if record.status != "ready":
            return slide
        return replace(
            slide,
            regions=pa.concat_tables(tables),
            embeddings={
                name: _embeddings(slide, chunks, which) for which, name in enumerate(self._names)
            },
            fragments={
                name: [text for chunk in chunks for text in chunk.fragments[which]]
                for which, name in enumerate(self._names)
            },
        )

    def commit(self) -> None:
        """Make the finished slides visible."""
        batch, self._batch = self._batch, []
        self._committed_at = time.monotonic()
        kept = []
        for slide in batch:
            record = slide.record
            self._counts[record.status] += 1
            self._counts["skipped"] += len(record.aliases)
            if record.status == "quarantined":
                self._reasons[record.reason or "unknown"] += 1
            self._regions += slide.n_regions
            told = {
                "run_id": self._run_id,
                "slide_id": record.slide_id,
                "status": record.status,
                "reason": record.reason,
            }
            if is_spared(record, self._archived.rows.get(record.slide_id)):
                logger.warning(
                    "%s stays as it was: %s", record.slide_id, record.message, extra=told
                )
                continue
            logger.info("%s is %s", record.slide_id, record.status, extra=told)
            kept.append(slide)
            if record.status != "quarantined":
                self._confirm(record)
        if not kept:
            return
        good = [slide for slide in kept if slide.regions is not None]
        began = time.monotonic()
        self._committer.commit(
            slides=self._slides_table(kept),
            regions=pa.concat_tables([slide.regions for slide in good]) if good else None,
            embeddings={
                name: pa.concat_tables([slide.embeddings[name] for slide in good])
                for name in self._names
                if good
            },
            fragments={
                name: [text for slide in good for text in slide.fragments[name]]
                for name in self._names
                if good
            },
        )
        seconds = time.monotonic() - began
        sums = {"run_id": self._run_id, "slides": len(kept), "seconds": round(seconds, 3)}
        logger.info("committed", extra=sums)
        self._commit_s += seconds
        self._commits += 1
        if self._commits % TIDY_AFTER_COMMITS == 0:
            self._committer.tidy()

    def _confirm(self, record: SlideRecord) -> None:
        for uri in (record.uri, *record.aliases):
            self._confirmed.setdefault(record.slide_id, []).append(self._sources[uri])

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
        stale = stale_slides(list(rows.values()), confirmed=self._confirmed)
        for slide in stale:
            copies = [uri for uri in rows[slide]["aliases"] or () if is_there(uri)]
            if copies:
                home = stat_slide(copies[0])
                where = {"uri": home.uri, "bytes": home.bytes, "mtime_ns": home.mtime_ns}
                heirs[slide] = where | {"aliases": copies[1:]}
        if heirs:
            self._committer.update_slides(heirs)
        if gone := [slide for slide in stale if slide not in heirs]:
            self._committer.drop_slides(gone)

    def _change(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of a stored slide that this run found to be different."""
        uri, confirmed = row["uri"], self._confirmed.get(row["slide_id"], ())
        vacated = bool(confirmed) and (uri in self._outstanding or not is_there(uri))
        now = row | relocate(row, confirmed=confirmed, vacated=vacated)
        now |= self._side.people([now["uri"], *self._own_paths(now), *self._own_paths(row)])
        return {key: value for key, value in now.items() if (value or None) != (row[key] or None)}

    def _own_paths(self, row: Mapping[str, Any]) -> list[str]:
        """Return the paths of a stored slide, but those that may be another slide's by now."""
        confirmed = {source.uri for source in self._confirmed.get(row["slide_id"], ())}
        return [
            path
            for path in (row["uri"], *(row["aliases"] or ()))
            if path in confirmed or path not in self._outstanding
        ]

    def _slides_table(self, slides: Sequence[FinishedSlide]) -> pa.Table:
        schema = pa.schema([column for column in slides_schema() if column.name != CHECKSUM])
        tiling = self._config.tiling.fingerprint()
        run = {
            "run_id": self._run_id,
            "ingested_at": datetime.now(UTC),
            "package_version": pathflip.__version__,
        }
        rows = []
        for slide in slides:
            row = slide.row(encoders=self._names, tiling=tiling) | run
            rows.append({name: row.get(name) for name in schema.names})
        return pa.Table.from_pylist(rows, schema=schema)

    def finish(self) -> IngestResult:
        """Commit the rest, tidy up and return the result."""
        self.commit()
        self._settle()
        if self._chunks:  # cannot happen while every actor returns every row it was given
            raise RuntimeError(f"chunks of {len(self._chunks)} slides never came back")
        if sum(self._counts.values()) > self._counts["skipped"]:
            self._committer.tidy()
            self._committer.index_slides()
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
        pending = [slide.record for slide in self._batch]
        slides = Counter(self._counts) + Counter(record.status for record in pending)
        lost = Counter(
            record.reason or "unknown" for record in pending if record.status == "quarantined"
        )
        self._progress(
            IngestProgress(
                slides_done=slides.total(),
                slides_total=len(self._candidates),
                quarantined=slides["quarantined"],
                regions=self._regions,
                patches=self._patches,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                seconds=time.monotonic() - self._started,
                stage=stage,
                slides={status: slides[status] for status in self._counts},
                reasons=self._reasons + lost,
                commits=self._commits,
                commit_s=self._commit_s,
            )
        )


def _given_first(group: Sequence[Candidate]) -> list[Candidate]:
    """Order files that may be copies: what was given for one of them holds for the slide."""
    return sorted(group, key=lambda candidate: candidate.mpp is None and candidate.geojson is None)


def _embeddings(slide: FinishedSlide, chunks: Sequence[Chunk], which: int) -> pa.Table:
    """Region rows and the slide's own, whose vector is the mean over all of its patches."""
    rows = pa.concat_tables(from_ipc(chunk.embeddings[which]) for chunk in chunks)
    total = np.sum([np.frombuffer(chunk.sums[which]) for chunk in chunks], axis=0)
    return embedding_rows(vars(slide.record), rows, total)
