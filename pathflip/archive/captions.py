"""Writes and removes captions and questions, which survive when a slide is ingested again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive import transactions
from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.schema import (
    CHECKSUM,
    caption_id,
    captions_schema,
)
from pathflip.archive.settings import CAPTIONS
from pathflip.archive.storage import guarded, is_local


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Text about a slide from one source: a caption, questions with answers, or both.

    Attributes:
        slide_id: The slide.
        text: The caption; None keeps the stored one (empty if there is none).
        qa: Questions and answers, {"question", "answer", "choices"?, "category"?} each; None keeps
            the stored ones.
        statements: Statements a language model made of the caption, if the source has them.
    """

    slide_id: str
    text: str | None = None
    qa: list[dict[str, Any]] | None = None
    statements: list[str] = field(default_factory=list)


def write_captions(
    committer: Committer, captions: Iterable[Caption], *, source: str
) -> dict[str, int]:
    """Write the captions of one source; unchanged ones are not written again.

    Statements that a model made of a caption are kept as long as its text is unchanged.

    Args:
        committer: The open writer of the archive.
        captions: At most one a slide.
        source: Name of the source; a slide may have captions from several.

    Returns:
        {"new", "changed", "unchanged"}: numbers of slides.
    """
    rows, counts = changed_captions(committer.archive, captions, source=source)
    if rows.num_rows:
        if CAPTIONS not in committer.archive.tables():
            made = {"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
            committer.add_tables(CAPTIONS, made)
        committer.upsert(CAPTIONS, rows)
    return counts


def changed_captions(
    archive: Archive, captions: Iterable[Caption], *, source: str
) -> tuple[pa.Table, dict[str, int]]:
    """Return the rows to write, and the counts that :func:`write_captions` returns."""
    from pathflip.text import split_sentences

    stored: dict[str, dict[str, Any]] = {}
    if CAPTIONS in archive.tables():
        with guarded(archive.uri, "read the captions", damaged=is_local(archive.uri)):
            rows = archive.dataset(CAPTIONS).to_table().drop_columns([CHECKSUM]).to_pylist()
        stored = {row["caption_id"]: row for row in rows}
    counts = {"new": 0, "changed": 0, "unchanged": 0}
    write = []
    for caption in captions:
        key = caption_id(caption.slide_id, source)
        old = stored.get(key)
        text, qa = caption.text, None
        if text is None:
            text = old["text"] if old else ""
        if caption.qa is None:
            qa = old["qa"] if old else None
        elif caption.qa:
            qa = json.dumps(caption.qa)
        row: dict[str, Any] = {
            "caption_id": key,
            "slide_id": caption.slide_id,
            "source": source,
            "text": text,
            "sentences": split_sentences(text),
            "statements": caption.statements,
            "model": source if caption.statements else None,
            "qa": qa,
        }
        if old is not None and old["text"] == row["text"] and not caption.statements:
            row |= {"statements": old["statements"] or [], "model": old["model"]}
        if old == row:
            counts["unchanged"] += 1
        else:
            counts["new" if old is None else "changed"] += 1
            write.append(row)
    return pa.Table.from_pylist(write, schema=_columns()), counts


def remove_captions(
    committer: Committer | None, archive: Archive, *, source: str, keep: Collection[str] = ()
) -> list[str]:
    """Remove the captions of one source; questions of the same rows stay.

    Args:
        committer: The open writer of the archive; None only says whose captions would go.
        archive: The archive.
        source: Name of the source.
        keep: Slides whose caption stays.

    Returns:
        The slides that lose their caption, sorted.
    """
    if CAPTIONS not in archive.tables():
        return []
    with guarded(archive.uri, "read the captions", damaged=is_local(archive.uri)):
        rows = archive.dataset(CAPTIONS).to_table(filter=pc.field("source") == source)
    kept = set(keep)
    gone = [
        row
        for row in rows.drop_columns([CHECKSUM]).to_pylist()
        if row["text"] and row["slide_id"] not in kept
    ]
    if committer is not None:
        emptied = [row | {"text": "", "sentences": [], "statements": [], "model": None}
                   for row in gone if row["qa"]]  # fmt: skip
        if emptied:
            committer.upsert(CAPTIONS, pa.Table.from_pylist(emptied, schema=_columns()))
        whole = [row["caption_id"] for row in gone if not row["qa"]]
        transactions.delete_rows(committer.lock, CAPTIONS, "caption_id", whole)
    return sorted(row["slide_id"] for row in gone)


def caption_sources(archive: Archive) -> dict[str, int]:
    """Return {source: number of captions} of an archive."""
    if CAPTIONS not in archive.tables():
        return {}
    with guarded(archive.uri, "read the captions", damaged=is_local(archive.uri)):
        rows = archive.dataset(CAPTIONS).to_table(columns=["source"], filter=pc.field("text") != "")
    return dict(sorted(Counter(rows["source"].to_pylist()).items()))


def _columns() -> pa.Schema:
    return pa.schema([item for item in captions_schema() if item.name != CHECKSUM])
