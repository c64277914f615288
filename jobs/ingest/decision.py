"""Decides the fate of each slide: ingested, a copy, tried again, quarantined, spared, moved.

Pure functions of what was found: no Ray, no files, no archive. The planner asks :func:`identify`,
planner and embedder :class:`Attempts` and :func:`quarantine`, the driver the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.ingest.candidates import Candidate
from jobs.ingest.rows import Held, SlideRecord
from pathflip.errors import SlideError
from pathflip.slides.sources import Source, slide_id

MIN_BAD_TILES = 4
"""Damaged patches that are masked in any slide, however few patches it has."""
RETRIED = ("timeout", "reader_crash")
"""Errors that say more about the reader process, or the storage, than about the slide."""


@dataclass(kw_only=True)
class Attempts:
    """Attempts at one slide, over all of its requests.

    Attributes:
        limit: The attempt whose failure is final.
        made: The attempt that is going on.
    """

    limit: int
    made: int = 1

    def retry_or_raise(self, error: SlideError) -> None:
        """Count one more attempt, or raise ``error`` if it is final."""
        if error.code not in RETRIED or self.made >= self.limit:
            raise error
        self.made += 1


def same_cut(candidate: Candidate, held: Held) -> bool:
    """Return whether a slide in the archive was cut as is asked for now."""
    if candidate.outline not in ("mask", held.outline):
        return False
    given = candidate.mpp
    return given is None or (held.mpp is not None and abs(held.mpp - given) <= 1e-9 * given)


def identify(
    record: SlideRecord, *, candidate: Candidate, sha256: str, held: Held | None
) -> SlideRecord:
    """Name a slide by its content, and compare it with what the archive holds of that content.

    Args:
        record: The file.
        candidate: Settings of the slide's cut.
        sha256: Digest of its content.
        held: Row of the archive with the same content, if there is one.

    Returns:
        The record: a ``duplicate`` where nothing is left to do, with ``extends`` where only
        encoders are missing, else to be ingested (anew).
    """
    record = replace(
        record,
        sha256=sha256,
        outline=candidate.outline,
        slide_id=slide_id(record.uri, sha256) if held is None else held.slide_id,
    )
    if held is None or not same_cut(candidate, held):
        return record
    return replace(record, status="duplicate") if held.complete else replace(record, extends=True)


def quarantine(record: SlideRecord, error: SlideError, *, stage: str) -> SlideRecord:
    """Put a slide, or a chunk of one, in quarantine for an error.

    Args:
        record: The slide.
        error: Error of the slide.
        stage: Stage of the error: ``hash``, ``plan`` or ``read``.
    """
    reason = "too_many_bad_tiles" if error.code == "bad_tile" else error.code
    return replace(record, status="quarantined", reason=reason, message=str(error), stage=stage)


def conclude(chunks: Sequence[SlideRecord], *, regions: int, max_bad_tiles: float) -> SlideRecord:
    """Decide the status of a slide, now that all of its chunks are in.

    Args:
        chunks: The records of its chunks, in order; one record where there was nothing to embed.
        regions: Regions with at least one good patch.
        max_bad_tiles: Share of the planned patches that may be damaged.

    Returns:
        The record to store, counts summed up: ``ready``, ``empty`` or ``quarantined``.
    """
    record = replace(
        chunks[0],
        tiles_ok=sum(chunk.tiles_ok for chunk in chunks),
        tiles_bad=sum(chunk.tiles_bad for chunk in chunks),
        not_finite=sum(chunk.not_finite for chunk in chunks),
        attempts=max(chunk.attempts for chunk in chunks),
        seconds=sum(chunk.seconds for chunk in chunks),
    )
    for chunk in chunks:
        if chunk.status == "quarantined":
            return replace(
                record,
                status="quarantined",
                reason=chunk.reason,
                message=chunk.message,
                stage=chunk.stage,
            )
    if record.status != "ready":
        return record
    name, bad, planned = Path(record.uri).name, record.tiles_bad, record.planned_patches
    reason, message = "too_many_bad_tiles", None
    if bad > max(MIN_BAD_TILES, max_bad_tiles * planned):
        message = (
            f"{bad} of {planned} patches of {name} are damaged. Copy the file again "
            "from its source, or raise max_bad_tiles."
        )
        if 2 * record.not_finite > bad:
            reason = "bad_features"
            message = (
                f"The encoder returned values that are not finite for {bad} of {planned} "
                f"patches of {name}. Check its weights and precision."
            )
    elif not regions:
        message = "Every patch of the slide is damaged."
    if message is None:
        return record
    return replace(record, status="quarantined", reason=reason, message=message, stage="read")


def is_spared(record: SlideRecord, stored: Mapping[str, Any] | None) -> bool:
    """Return whether a failure is not stored because the archive holds these bytes as a good slide.

    Args:
        record: The slide as concluded.
        stored: Its row in the archive before this run, if it has one.
    """
    return (
        record.status == "quarantined"
        and stored is not None
        and stored["status"] == "ready"
        and stored["sha256"] == record.sha256
    )


def relocate(
    row: Mapping[str, Any], *, confirmed: Sequence[Source], vacated: bool
) -> dict[str, Any]:
    """Decide where a stored slide lies, now that a run has looked.

    It moves to a file found to hold its content where its own path is vacated; every other such
    file becomes one of its aliases.

    Args:
        row: Its row: uri, aliases.
        confirmed: Files that the run found to hold its content.
        vacated: Whether the file at its path is gone, or was to be ingested itself.

    Returns:
        Columns to set; they may be what they were.
    """
    if not confirmed:
        return {}
    uris = [source.uri for source in confirmed]
    home = None
    if row["uri"] in uris:
        home = confirmed[uris.index(row["uri"])]
    elif vacated:
        home = confirmed[0]
    here = row["uri"] if home is None else home.uri
    found: dict[str, Any] = {"aliases": sorted({*(row["aliases"] or ()), *uris} - {here})}
    if home is not None:
        found |= {"uri": home.uri, "bytes": home.bytes, "mtime_ns": home.mtime_ns}
    return found


def stale_slides(rows: Sequence[Mapping[str, Any]], *, confirmed: Collection[str]) -> list[str]:
    """Name the slides whose path holds another slide by now.

    Args:
        rows: Stored slides: slide_id, uri, status, ingested_at.
        confirmed: Ids of the slides that this run found at a path.

    Returns:
        Ids. Of each path its last state stays, and where that is a quarantine also what it held
        before, which may still be good.
    """
    by_uri: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["ingested_at"]):
        by_uri.setdefault(row["uri"], []).append(row)
    stale = []
    for known in by_uri.values():
        last = ([row for row in known if row["slide_id"] in confirmed] or known)[-1]
        keep = {last["slide_id"]}
        if last["status"] == "quarantined":
            keep |= {row["slide_id"] for row in known if row["status"] != "quarantined"}
        stale += [row["slide_id"] for row in known if row["slide_id"] not in keep]
    return stale
