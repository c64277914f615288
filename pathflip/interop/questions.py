"""Questions about slides from the files that research data comes in.

=====================  ==========================================================================
SlideBench, BCNB CSV   Slide, Question, A, B, C, D, Answer (a letter); empty options are left out
plain CSV, TSV         columns slide (or case_id), question, answer and, where there are any,
                       choices: options separated by ``|`` or ``;``, or a list in brackets
SlideInstruction JSON  a list (or lines) of {image, conversations}; every turn is a question
WSI-Bench JSON         the same, with the options in the question: ``… A) one B) two``
WSI-Bench JSON lines   {image, question, T-answer, metadata}: open questions, with their topic
WSI-VQA JSON           {Id, Question, Choice, Answer}; goes to every slide of the case
JSON lines             {slide, question, options, answer, kind, split}, as ``pathflip synth``
                       writes; options may be {"A": …, "B": …}
=====================  ==========================================================================

An answer to a question with options may be an option's text or its letter (``B``, ``b``,
``B) no``, ``Option B``), or ``cannot be told from this slide``, which need be none of them: then no
option is right; what is kept is the text, so that options can be shuffled. A letter as the
answer to a question without options is refused: they are somewhere this module does not look.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.archive import CAPTIONS, Archive
from pathflip.archive.captions import Caption, changed_captions, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.errors import ConfigError
from pathflip.interop.captions import source_name
from pathflip.interop.conversations import question_answer_pairs, without_image_tag
from pathflip.interop.tables import (
    SLIDE_COLUMNS,
    bad_line,
    clean,
    column,
    is_json,
    is_missing,
    json_entries,
    needed_column,
    read_rows,
    slide_or_case_column,
)
from pathflip.splits import canonical_split, requested_split
from pathflip.text import CANNOT_TELL, LETTERS, plain_text

_CHOICES = ("choices", "options", "choice")
_CATEGORIES = ("broad category", "category", "task", "kind")
_LONE_LETTER = re.compile(
    r"[\s\"'(]*(?:(?:option|answer|choice)\s*:?\s*)?[\"'(]*([A-H])[\s).:\"']*", re.IGNORECASE
)
_LETTER_FIRST = re.compile(
    r"(?:(?:option|answer|choice)\s*:?\s*)?\(?([A-H])[).:]\s*(.+)", re.DOTALL | re.IGNORECASE
)
_MARK = re.compile(r"(?:^|\s)\(?([A-H])[).]\s", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a slide.

    Attributes:
        slide: Name of the slide in the file, of the case where ``is_case``; the id of the slide for
            a stored question.
        question: The question, without its options.
        answer: The answer; with options the text of the right one, or ``CANNOT_TELL``.
        choices: The options; empty for an open question.
        category: Topic of the question, where the file has one.
        split: Split that the file names; for a stored question the split of its slide.
        line: Line in the file; 0 for stored ones.
        is_case: Whether the name is a case's, so that all of its slides are meant.
    """

    slide: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    category: str = ""
    split: str | None = None
    line: int = 0
    is_case: bool = False


def read_questions(path: str | Path) -> list[Question]:
    """Read questions, in the order of the file.

    Raises:
        ConfigError: If the file is none of the kinds above, or a line of it is wrong: then it names
            the line.
    """
    file = Path(path).expanduser()
    found = list(_json(file) if is_json(file) else _csv(file))
    if not found:
        raise ConfigError(f"{path} holds no questions.", hint="See docs/reference/data-model.md.")
    return found


def import_questions(
    archive: str | Committer,
    path: str | Path,
    *,
    source: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Read questions and write those whose slides are in the archive; again, it changes nothing.

    A slide's questions of a source are those of the file: others it had from that source go.
    Captions of the same source stay.

    Args:
        archive: The archive, or its open writer.
        path: A file, see :func:`read_questions`.
        source: Name of the source; by default the file's without its ending.
        dry_run: Only say what would be done.

    Returns:
        {"source", "rows": questions in the file, "questions": those that found their slides, "new",
        "changed", "unchanged": counts of slides, "unmatched": names that no slide has, "ambiguous":
        names that several slides have}.

    Raises:
        ConfigError: If the file is wrong; nothing is written then.
        ArchiveError: If the archive is missing, damaged or being written.
    """
    rows = read_questions(path)
    name = source or source_name(path)
    if isinstance(archive, Committer):
        return _import(archive, archive.archive, rows, name, dry_run)
    if dry_run:
        return _import(None, Archive(archive), rows, name, dry_run)
    with Committer(archive) as committer:
        return _import(committer, committer.archive, rows, name, dry_run)


def stored_questions(
    archive: Archive, *, source: str | None = None, split: str | None = None
) -> list[Question]:
    """Return the questions about ready slides: by slide and source, in the order of their files.

    Args:
        archive: Archive to read.
        source: Only questions of this source; the same question of several sources is there once.
        split: Only questions about slides of this split.
    """
    slides = archive.slides("ready", columns=["slide_id", "split"]).to_pylist()
    splits = {row["slide_id"]: canonical_split(row["split"]) for row in slides}
    found: dict[tuple[str, str, str, tuple[str, ...]], Question] = {}
    for row in archive.captions(source).to_pylist():
        own = splits[row["slide_id"]]
        if split is not None and own != requested_split(split):
            continue
        for entry in json.loads(row["qa"]) if row["qa"] else ():
            question = Question(
                slide=row["slide_id"],
                question=entry["question"],
                answer=entry["answer"],
                choices=tuple(entry.get("choices", ())),
                category=entry.get("category", ""),
                split=own,
            )
            key = (question.slide, question.question, question.answer, question.choices)
            found.setdefault(key, question)
    return list(found.values())


def _import(
    committer: Committer | None,
    archive: Archive,
    rows: Sequence[Question],
    source: str,
    dry_run: bool,
) -> dict[str, Any]:
    matches = archive.names().match(rows, lambda row: (row.slide, row.is_case))
    asked: dict[str, list[dict[str, Any]]] = {}
    for row, slides in matches.found:
        entry = _entry(row)
        for slide in slides:
            own = asked.setdefault(slide, [])
            if entry not in own:
                own.append(entry)
    captions = [Caption(slide_id=slide, qa=qa) for slide, qa in sorted(asked.items())]
    if committer is None or dry_run:
        _, counts = changed_captions(archive, captions, source=source)
    else:
        counts = write_captions(committer, captions, source=source)
        if counts["new"] or counts["changed"]:
            refresh_indexes(committer.lock, CAPTIONS)
    return {
        "source": source,
        "rows": len(rows),
        "questions": len(matches.found),
        **counts,
        **matches.report(),
    }


def _entry(row: Question) -> dict[str, Any]:
    """Return a question as ``captions.qa`` holds it."""
    entry: dict[str, Any] = {"question": row.question, "answer": row.answer}
    if row.choices:
        entry["choices"] = list(row.choices)
    if row.category:
        entry["category"] = row.category
    return entry


# ---- the kinds of files ---------------------------------------------------------------------


def _csv(file: Path) -> Iterator[Question]:
    rows = read_rows(file)
    header = rows[0][1]
    slide, is_case = slide_or_case_column(file, header)
    question = needed_column(file, header, ("question",))
    answer = needed_column(file, header, ("answer",))
    listed_choices = column(file, header, _CHOICES)
    lettered = _lettered(file, header)
    category = column(file, header, _CATEGORIES)
    split = column(file, header, ("split",))
    for line, row in rows:
        if listed_choices is not None:
            choices = [filled(part) for part in _listed(row[listed_choices])]
        else:
            choices = [filled(row[name]) for name in lettered]
            if "" in choices and any(choices[choices.index("") :]):
                raise bad_line(file, line, f"option {LETTERS[choices.index('')]} is empty")
        yield _made(
            file,
            line,
            slide=row[slide],
            question=row[question],
            answer=row[answer],
            choices=[choice for choice in choices if choice],
            category=filled(row[category]) if category is not None else "",
            split=row[split] if split is not None else None,
            is_case=is_case,
        )


def _listed(cell: str) -> list[str]:
    """Return the options of a cell: a list in brackets, else what ``|`` or ``;`` separates."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if isinstance(found, list):
            return [str(item) for item in found]
    return cell.split("|" if "|" in cell else ";")


def _lettered(file: Path, header: dict[str, str]) -> list[str]:
    """Return the columns of the options: A, B, … or option_a, option_b, …, whatever their case."""
    found = []
    for letter in LETTERS.lower():
        name = column(file, header, (letter, f"option_{letter}", f"option {letter}"))
        if name is None:
            break
        found.append(name)
    return found if len(found) > 1 else []


def _json(file: Path) -> Iterator[Question]:
    for line, entry in json_entries(file):
        if not isinstance(entry, Mapping):
            raise bad_line(file, line, "an entry that is no object")
        if "conversations" in entry:
            yield from _conversation(file, line, entry)
            continue
        lower = {str(key).lower(): value for key, value in entry.items()}
        slide = next((lower[name] for name in SLIDE_COLUMNS if name in lower), None)
        is_case = slide is None
        wsi_bench = "t-answer" in lower
        categories = ("metadata",) if wsi_bench else _CATEGORIES
        given: Any = next((lower[name] for name in _CHOICES if lower.get(name)), [])
        choices = _options(given)
        if choices is None:
            raise bad_line(file, line, "options that are no list of texts, nor texts by letter")
        yield _made(
            file,
            line,
            slide=lower.get("id") if is_case else slide,
            question=lower.get("question"),
            answer=_text(lower.get("t-answer" if wsi_bench else "answer")),
            choices=[clean(choice) for choice in choices],
            category=next((lower[name] for name in categories if lower.get(name)), ""),
            split=lower.get("split"),
            is_case=is_case,
        )


def _options(given: Any) -> list[str] | None:
    """Return options of a list, or of {letter: option} with the letters from A; else None."""
    if isinstance(given, Mapping):
        letters = {clean(str(key)).upper().rstrip(").:"): value for key, value in given.items()}
        if sorted(letters) != list(LETTERS[: len(given)]):
            return None
        given = [letters[letter] for letter in sorted(letters)]
    if not isinstance(given, list):
        return None
    texts = [_text(item) for item in given]
    return texts if all(isinstance(text, str) for text in texts) else None


def _text(value: Any) -> Any:
    """Return a number as text; NaN, truth values and all else as they are."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return str(value) if number else value


def _conversation(file: Path, line: int, entry: Mapping[str, Any]) -> Iterator[Question]:
    images = entry.get("image")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images:
        raise bad_line(file, line, "an entry without the name of its image")
    for question, answer in question_answer_pairs(file, line, entry["conversations"]):
        if question is None:  # a description that nobody asked for: see captions.py
            continue
        choices: list[str] = []
        if _LONE_LETTER.fullmatch(answer) or _LETTER_FIRST.fullmatch(answer):
            question, choices = _inline(question)
        for image in images:
            yield _made(file, line, slide=image, question=question, answer=answer, choices=choices)


def _inline(text: str) -> tuple[str, list[str]]:
    """Cut ``What? A) one B) two`` into the question and its options, if it has any."""
    runs: list[list[re.Match[str]]] = []  # from an A each: an option may hold "A. Smith"
    for mark in _MARK.finditer(text):
        letter = mark[1].upper()
        if letter == "A":
            runs.append([])
        for run in runs:
            if letter == LETTERS[len(run) : len(run) + 1]:
                run.append(mark)
    run = max(reversed(runs), key=len, default=[])
    if len(run) < 2:
        return text, []
    ends = [*(mark.start() for mark in run[1:]), len(text)]
    options = [text[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True)]
    return text[: run[0].start()].strip(), options


def _made(
    file: Path,
    line: int,
    *,
    slide: Any,
    question: Any,
    answer: Any,
    choices: Sequence[str],
    category: Any = "",
    split: Any = None,
    is_case: bool = False,
) -> Question:
    for name, value in (("slide", slide), ("question", question), ("answer", answer)):
        if not _filled(value) and not (name == "answer" and value in choices):
            raise bad_line(file, line, f"no {name}")
    if not choices and _LONE_LETTER.fullmatch(answer):
        raise bad_line(
            file,
            line,
            f"the answer is a letter, {clean(answer)}, and the question has no options",
            hint="Name the columns of the options A, B, … or choices, or write the answer out.",
        )
    if choices and not 2 <= len(choices) <= len(LETTERS):
        raise bad_line(file, line, f"{len(choices)} options; 2 to {len(LETTERS)} can be")
    if choices and not all(choices):
        raise bad_line(file, line, "an option without text")
    answer, choices = plain_text(answer), [plain_text(choice) for choice in choices]
    right = _right(clean(answer), choices)
    if right is None:
        raise bad_line(file, line, f"the answer {clean(answer)[:60]!r} is none of the options")
    return Question(
        slide=clean(slide),
        question=without_image_tag(plain_text(question)),
        answer=right,
        choices=tuple(choices),
        category=clean(category) if isinstance(category, str) else str(category),
        split=canonical_split(split) if isinstance(split, str) else None,
        line=line,
        is_case=is_case,
    )


def _right(answer: str, choices: Sequence[str]) -> str | None:
    """Return the text of the right option: by its text, else by its letter; None if it is none."""
    if answer in choices:
        return answer

    def plain(text: str) -> str:
        return " ".join(text.split()).rstrip(".").casefold()

    same = [choice for choice in choices if plain(choice) == plain(answer)]
    if same:
        return same[0]
    if plain(answer) == CANNOT_TELL:
        return CANNOT_TELL
    if not choices:
        return answer
    lone, first = _LONE_LETTER.fullmatch(answer), _LETTER_FIRST.fullmatch(answer)
    match = lone or first
    if match is None or LETTERS.index(match[1].upper()) >= len(choices):
        return None
    chosen = choices[LETTERS.index(match[1].upper())]
    if lone is None and first is not None and plain(first[2]) != plain(chosen):
        return None
    return chosen


def _filled(value: Any) -> bool:
    return isinstance(value, str) and not is_missing(value)


def filled(cell: str) -> str:
    """Return an option or a category without the space around it; "" for a missing one."""
    return "" if is_missing(cell) else clean(cell)
