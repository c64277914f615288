"""Damage of an archive, as :mod:`pathflip.archive.verify` finds and reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file, row or table.

    Attributes:
        table: The table.
        kind: ``table`` (cannot be opened), ``file`` (gone, or its digest differs), ``row`` (its
            checksum differs), ``missing`` (row of a ready slide is not there), ``duplicate``.
        id: The row's key, or the file's path relative to the archive.
        detail: One sentence.
        slide_id: The slide the row belongs to, where known.
        fragment: The Lance fragment it lies in; None for files only older versions refer to.
    """

    table: str
    kind: str
    id: str
    detail: str
    slide_id: str | None = None
    fragment: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of :func:`pathflip.archive.verify.verify`.

    Attributes:
        damaged: All damage; tables first, then files.
        slides: Ready slides with rows lost or damaged.
        reindex: {table computed after ingest: slides with rows lost or damaged there}.
        notes: Remarks that are no damage.
        files: Data files whose digest was checked.
        rows: Rows whose checksum was checked.
        bytes: Bytes of those files.
        seconds: Wall time.
    """

    damaged: list[Damage]
    slides: list[str]
    reindex: dict[str, list[str]]
    notes: list[str]
    files: int
    rows: int
    bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.damaged

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"ok": self.ok, **asdict(self)}
