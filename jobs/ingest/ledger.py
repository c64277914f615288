"""The driver's side of the ingest job: what is to do, what came back, what is committed."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import pathflip
from jobs.ingest.candidates import Archived, Candidate, Sheet
from jobs.ingest.config import IngestConfig
from jobs.ingest.embed import fixed, from_ipc, unit
from pathflip.archive.commit import Committer
from pathflip.encoders import EncoderInfo
from pathflip.errors import ArchiveError, EncoderError
from pathflip.slides.sources import Source, stat_source

logger = logging.getLogger(__name__)

MIN_BAD_TILES = 4


COMMIT_SLIDES = 128  # what waits for a commit is held in memory, about a megabyte a slide
COMPACT_AFTER_FRAGMENTS = 512  # a commit writes the whole list of fragments anew


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


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """What a run did. ``slides`` counts ready, quarantined, empty and skipped ones of this run."""

    slides: dict[str, int]
    regions: int
    patches: int
    seconds: float
    captions: dict[str, Any] | None = None
    """What was imported of the captions, if any were given."""
    questions: dict[str, Any] | None = None
    """What was imported of the questions, if any were given."""

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip ingest --json`` prints."""
        rate = self.patches / self.seconds if self.seconds else 0.0
        document = asdict(self) | {
            "seconds": round(self.seconds, 3),
            "patches_per_second": round(rate, 1),
        }
        for what in ("captions", "questions"):
            if document[what] is None:
                del document[what]
        return document

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides were quarantined."""
        return 3 if self.slides["quarantined"] else 0


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
        if len(self._batch) >= COMMIT_SLIDES or (self._batch and overdue):
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
        tables = [from_ipc(part["regions"]) for part in parts if part["embeddings"]]
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
        rows = pa.concat_tables(from_ipc(part["embeddings"][which]) for part in parts)
        total = np.sum([np.frombuffer(part["sums"][which]) for part in parts], axis=0)
        slide = pa.table(
            {
                "id": [record["slide_id"]],
                "vector": fixed(unit(total[None])),
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


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _slides_schema() -> pa.Schema:
    from pathflip.archive.schema import CHECKSUM, slides_schema

    return pa.schema([column for column in slides_schema() if column.name != CHECKSUM])


def _share(tissue_mm2: float, record: dict[str, Any]) -> float:
    area = record["width"] * record["height"] * record["mpp"] ** 2 / 1e6
    return min(1.0, tissue_mm2 / area) if area else 0.0
