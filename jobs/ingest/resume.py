"""Tells which slides an archive holds already: the same ingest again does what is missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from jobs.ingest.candidates import Candidate
from jobs.ingest.config import IngestConfig
from jobs.ingest.decision import same_cut
from jobs.ingest.rows import Held
from pathflip.archive import Archive
from pathflip.encoders import EncoderInfo
from pathflip.errors import ArchiveError
from pathflip.slides.scale import SCALE_REASONS

PASSING_REASONS = (
    "damaged_rows", "bad_outline", "access_denied", "store_failed", "stage_failed"
)  # fmt: skip
"""Reasons for which the next run tries a slide again although its file is the same."""


class Archived:
    """Slides an archive already knows, by id, path and content; none if there is no archive."""

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
        """Return the row a path is known under, the newest where there are several."""
        return self._by_uri.get(uri) or self._by_alias.get(uri)

    def paths(self) -> dict[str, str]:
        """Return {path: slide_id}, paths of copies included."""
        aliases = {alias: row["slide_id"] for alias, row in self._by_alias.items()}
        return aliases | {uri: row["slide_id"] for uri, row in self._by_uri.items()}

    def remembered(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the resolution once given for it, if none is given now."""
        row = self.row(candidate.source.uri)
        if candidate.mpp is None and row is not None and row["mpp_source"] == "override":
            return replace(candidate, mpp=row["mpp"])
        return candidate

    def is_done(
        self, candidate: Candidate, config: IngestConfig, encoders: Sequence[EncoderInfo]
    ) -> bool:
        """Return whether nothing is left to do for a slide."""
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
            # Says nothing about the source, or what the user may have mended since.
            if row["reason"] in PASSING_REASONS or config.retry:
                return False
            mendable = row["reason"] in SCALE_REASONS
            return not (mendable and candidate.mpp is not None)
        if not same_cut(candidate, self._held(row, encoders)):
            return False
        return self._complete(row, encoders)

    def contents(
        self, encoders: Sequence[EncoderInfo], *, sizes: Collection[int]
    ) -> dict[str, Held]:
        """Return the good slides of some sizes by sha256, for the planner to recognise copies."""
        return {
            row["sha256"]: self._held(row, encoders)
            for row in self.rows.values()
            if row["status"] in ("ready", "empty") and row["bytes"] in sizes
        }

    def _held(self, row: dict[str, Any], encoders: Sequence[EncoderInfo]) -> Held:
        return Held(
            slide_id=row["slide_id"],
            mpp=row["mpp"],
            outline=(row["fingerprint"] or "").rpartition("/")[2],
            complete=self._complete(row, encoders),
        )

    @staticmethod
    def _complete(row: dict[str, Any], encoders: Sequence[EncoderInfo]) -> bool:
        names = {info.name for info in encoders}
        return row["status"] == "empty" or names <= set(row["encoders"] or ())
