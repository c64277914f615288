"""Progress and result of an ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pathflip.job_metrics import Sample
from pathflip.progress import duration


@dataclass(frozen=True, kw_only=True)
class IngestProgress:
    """State of a running ingest; given to the progress callback.

    Attributes:
        slides_done: Slides whose fate is known, those that wait for a commit included.
        slides_total: Slides found.
        quarantined: Those of them that are quarantined.
        regions: Regions committed.
        patches: Patches embedded.
        bytes_done: Bytes of slides done.
        bytes_total: Bytes of slides to do.
        seconds: Wall time.
        stage: Name of the stage.
        slides: Slides done, by status.
        reasons: Quarantined slides, by reason.
        commits: Commits to the archive.
        commit_s: Seconds they took together.
    """

    slides_done: int
    slides_total: int
    quarantined: int
    regions: int
    patches: int
    bytes_done: int
    bytes_total: int
    seconds: float
    stage: str
    slides: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    commits: int = 0
    commit_s: float = 0.0

    def samples(self) -> list[Sample]:
        """Return its figures, for Prometheus."""
        return [
            Sample("pathflip_ingest_slides_expected", self.slides_total),
            Sample("pathflip_ingest_regions_total", self.regions),
            Sample("pathflip_ingest_patches_total", self.patches),
            Sample("pathflip_ingest_bytes_total", self.bytes_done),
            Sample("pathflip_ingest_commit_seconds_sum", self.commit_s),
            Sample("pathflip_ingest_commit_seconds_count", self.commits),
            *(
                Sample("pathflip_ingest_slides_total", count, {"status": status})
                for status, count in self.slides.items()
            ),
            *(
                Sample("pathflip_ingest_quarantined_total", count, {"reason": reason})
                for reason, count in self.reasons.items()
            ),
        ]

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
    """Result of an ingest.

    Attributes:
        slides: Counts of this run's slides: ready, quarantined, empty and skipped.
        regions: Regions committed.
        patches: Patches embedded.
        seconds: Wall time.
        captions: Counts of the captions imported, if any were given.
        questions: Counts of the questions imported, if any were given.
        side_files: For ``mpp_csv``, ``tissue`` and ``patients``, where they were given: {"rows",
            "matched": counts of entries, "unmatched", "ambiguous": names}.
    """

    slides: dict[str, int]
    regions: int
    patches: int
    seconds: float
    captions: dict[str, Any] | None = None
    questions: dict[str, Any] | None = None
    side_files: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        side_files: dict[str, Any] = document.pop("side_files")
        return document | side_files

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides were quarantined, or all that were opened have no tissue."""
        nothing = self.slides["empty"] and not self.slides["ready"] + self.slides["skipped"]
        return 3 if self.slides["quarantined"] or nothing else 0
