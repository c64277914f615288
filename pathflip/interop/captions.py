"""Captions of slides from the files that research data comes in.

=====================  ==========================================================================
CSV, TSV               columns slide and caption (or report, text); others are left alone; with
                       case_id in place of slide for every slide of the case
SlideBench CSV         ID,Slide,Tumor,Question,Caption
SlideInstruction JSON  a list (or lines) of {image, conversations}; the first answer is the caption,
                       further turns and entries of the slide are questions about it
alignment JSON         {image, caption, fine_grained_concepts: [{visual_description}]}
PathText folder        [cancer/]<case>/annotation, a JSON string; goes to every slide of the case
=====================  ==========================================================================
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pathflip.archive import CAPTIONS, Archive
from pathflip.archive.captions import (
    Caption,
    caption_sources,
    changed_captions,
    remove_captions,
    write_captions,
)
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.slide_names import listed
from pathflip.errors import ConfigError
from pathflip.interop.conversations import question_answer_pairs
from pathflip.interop.tables import (
    bad_line,
    clean,
    column,
    is_json,
    is_missing,
    json_entries,
    known,
    needed_column,
    read_rows,
    read_text,
    slide_or_case_column,
)
from pathflip.text import plain_text

logger = logging.getLogger(__name__)

_TEXT_COLUMNS = ("caption", "report", "text")


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One caption as a file has it.

    Attributes:
        slide: Name of the slide in the file; of the case where ``is_case``.
        text: The caption.
        question: The question it answers, where the file has one.
        qa: Further questions and answers.
        statements: Statements that a language model cut the caption into, where the file has them.
        line: Line in the file; 0 if the caption is a file of its own.
        is_case: Whether the name is a case's, so that all of its slides are meant.
    """

    slide: str
    text: str
    question: str | None = None
    qa: list[dict[str, str]] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    line: int = 0
    is_case: bool = False


def read_captions(path: str | Path) -> list[CaptionRow]:
    """Read captions, one a slide.

    Raises:
        ConfigError: If the file is none of the kinds above, or a line of it is wrong: then it names
            the line.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        rows = list(_folder(file))
    elif is_json(file):
        rows = list(_json(file))
    else:
        rows = list(_csv(file))
    if not rows:
        raise ConfigError(f"{path} holds no captions.", hint="See docs/reference/data-model.md.")
    return _merged(file, [replace(row, text=clean(plain_text(row.text))) for row in rows])


def import_captions(
    archive: str | Committer,
    path: str | Path,
    *,
    source: str | None = None,
    replace_source: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Read captions and write those whose slides are in the archive; again, it changes nothing.

    Args:
        archive: The archive, or its open writer.
        path: A file or folder, see :func:`read_captions`.
        source: Name of the source; by default the file's without its ending.
        replace_source: Whether captions of this source that the file does not have are removed.
        dry_run: Only say what would be done.

    Returns:
        {"source", "rows", "new", "changed", "unchanged": counts of captions, "unmatched": names
        that no slide has, "ambiguous": names that several slides have, "not_in_file": slides that
        keep a caption of this source though the file has none for them, "removed": slides that lose
        it, "other_sources": sources of further captions of the file's slides, as a corrected file
        of another name makes one}.

    Raises:
        ConfigError: If the file is wrong; nothing is written then.
        ArchiveError: If the archive is missing, damaged or being written.
    """
    rows = read_captions(path)
    name = source or source_name(path)
    if isinstance(archive, Committer):
        return _import(archive, archive.archive, rows, path, name, dry_run, replace_source)
    if dry_run:
        return _import(None, Archive(archive), rows, path, name, dry_run, replace_source)
    with Committer(archive) as committer:
        return _import(committer, committer.archive, rows, path, name, dry_run, replace_source)


def remove_source(archive: str, source: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove all captions of a source; its questions stay.

    Returns:
        {"source", "removed": the slides that lose their caption}.

    Raises:
        ConfigError: There are no captions of this source (``no_source``); names those there are.
    """
    opened = Archive(archive)
    known = caption_sources(opened)
    if source not in known:
        there = ", ".join(f"{name} ({count})" for name, count in known.items())
        raise ConfigError(
            f"{opened.uri} has no captions of source {source}.",
            hint=f"Its captions are of: {there or 'no source'}.",
            code="no_source",
        )
    if dry_run:
        return {"source": source, "removed": remove_captions(None, opened, source=source)}
    with Committer(archive) as committer:
        removed = remove_captions(committer, committer.archive, source=source)
        refresh_indexes(committer.lock, CAPTIONS)
    return {"source": source, "removed": removed}


def source_name(path: str | Path) -> str:
    """Return what captions of a file are called: its name without folder and ending."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).expanduser().absolute().stem) or "captions"


def _import(
    committer: Committer | None,
    archive: Archive,
    rows: list[CaptionRow],
    path: str | Path,
    source: str,
    dry_run: bool,
    replace_source: bool,
) -> dict[str, Any]:
    matches = archive.names().match(rows, lambda row: (row.slide, row.is_case))
    found: dict[str, CaptionRow] = {}
    for row, slides in matches.found:
        for slide in slides:
            other = found.setdefault(slide, row)
            if other.text != row.text:
                raise bad_line(
                    path, row.line, f"{row.slide} is the slide of line {other.line} again"
                )
    captions = [
        Caption(slide_id=slide, text=row.text, qa=row.qa or None, statements=row.statements)
        for slide, row in sorted(found.items())
    ]
    if not found and replace_source:
        raise ConfigError(
            f"No caption of {path} belongs to a slide of {archive.uri}, so all captions of source "
            f"{source} would go.",
            hint=f"Mend the names, or: pathflip archive remove-captions --source {source}",
            code="no_match",
        )
    writer = None if dry_run else committer
    removed: list[str] = []
    if replace_source:
        # A name that has become several slides' is not gone from the file.
        keep = {*found, *(slide for _, slides in matches.unclear for slide in slides)}
        removed = remove_captions(writer, archive, source=source, keep=keep)
    if writer is None:
        _, counts = changed_captions(archive, captions, source=source)
    else:
        counts = write_captions(writer, captions, source=source)
        if counts["new"] or counts["changed"] or removed:
            refresh_indexes(writer.lock, CAPTIONS)
    return {
        "source": source,
        "rows": len(rows),
        **counts,
        **matches.report(),
        "removed": removed,
        **_beside(archive, {*found, *removed}, source),
    }


def _beside(archive: Archive, found: Collection[str], source: str) -> dict[str, list[str]]:
    """Return what the archive holds besides the captions of a file: see the import's result."""
    kept, sources = [], []
    for row in archive.captions().select(["slide_id", "source", "text"]).to_pylist():
        if row["source"] == source and row["text"] and row["slide_id"] not in found:
            kept.append(row["slide_id"])
        elif row["source"] != source and row["text"] and row["slide_id"] in found:
            sources.append(row["source"])
    if kept:
        logger.warning(
            "%d slides keep a caption of source %s that the file does not have, %s for one. "
            "To remove those, import it with --replace.",
            len(kept), source, kept[0],
        )  # fmt: skip
    if sources:
        logger.warning(
            "%d captions of the file's slides are of other sources as well, such as %s. To correct "
            "those, import the file with --source %s; to remove them: pathflip archive "
            "remove-captions --source %s.",
            len(sources), sources[0], sources[0], sources[0],
        )  # fmt: skip
    return {"not_in_file": listed(kept), "other_sources": listed(sources)}


# ---- the kinds of files ---------------------------------------------------------------------


def _csv(file: Path) -> Iterator[CaptionRow]:
    rows = read_rows(file)
    slide, is_case = slide_or_case_column(file, rows[0][1])
    text = needed_column(file, rows[0][1], _TEXT_COLUMNS)
    question = column(file, rows[0][1], ("question",))
    for line, row in rows:
        for name in (slide, text):
            if is_missing(row[name]) or (name == text and known(row[name]) is None):
                what = ("case" if is_case else "slide") if name == slide else "caption"
                raise bad_line(file, line, f"no {what}")
        asked = row[question] if question is not None else None
        yield CaptionRow(
            slide=row[slide], text=row[text], question=asked, line=line, is_case=is_case
        )


def _json(file: Path) -> Iterator[CaptionRow]:
    for line, entry in json_entries(file):
        images = entry.get("image") if isinstance(entry, dict) else None
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not images or not all(map(_text, images)):
            raise bad_line(file, line, "an entry without the name of its image")
        if "conversations" in entry:
            (question, text), *rest = question_answer_pairs(file, line, entry["conversations"])
            _check_caption(file, line, text)
            further = [{"question": asked or "", "answer": answer} for asked, answer in rest]
            statements: list[str] = []
        elif _text(entry.get("caption")):
            _check_caption(file, line, entry["caption"])
            question, text, further = None, clean(entry["caption"]), []
            concepts = entry.get("fine_grained_concepts") or []
            if not isinstance(concepts, list):
                raise bad_line(file, line, "fine_grained_concepts is no list")
            statements = [
                item["visual_description"].strip()
                for item in concepts
                if isinstance(item, dict) and _text(item.get("visual_description"))
            ]
        else:
            raise bad_line(file, line, "an entry without conversations or caption")
        for image in images:
            yield CaptionRow(
                slide=clean(image), text=text, question=question, qa=further,
                statements=statements, line=line,
            )  # fmt: skip


def _check_caption(file: Path, line: int, text: str) -> None:
    if known(text) is None:
        raise bad_line(file, line, "the caption is empty")
    if re.fullmatch(r"[A-H][).]?", text):
        raise bad_line(
            file,
            line,
            "the answer is a letter: this is a test with choices, no caption (see --questions)",
        )


def _folder(folder: Path) -> Iterator[CaptionRow]:
    for file in sorted((*folder.glob("*/annotation*"), *folder.glob("*/*/annotation*"))):
        try:
            text = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise bad_line(file, error.lineno, f"not JSON ({error.msg})") from error
        if not _text(text):
            raise bad_line(file, 1, "not a JSON string")
        _check_caption(file, 1, text)
        yield CaptionRow(slide=file.parent.name, text=clean(text), is_case=True)


def _text(value: Any) -> bool:
    return isinstance(value, str) and not is_missing(value)


def _merged(file: Path, rows: list[CaptionRow]) -> list[CaptionRow]:
    """Return one row a slide: what follows the first of a slide are questions about it."""
    first: dict[str, CaptionRow] = {}
    for row in rows:
        other = first.setdefault(row.slide, row)
        if other is row or (other.text, other.question) == (row.text, row.question):
            continue
        if not row.question:
            raise bad_line(
                file, row.line, f"another caption of {row.slide} than in line {other.line}"
            )
        further = [{"question": row.question, "answer": row.text}, *row.qa]
        first[row.slide] = replace(other, qa=[*other.qa, *further])
    return list(first.values())
