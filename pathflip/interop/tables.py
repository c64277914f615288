"""Reads tables, JSON and plain lists made by other tools; errors name file, line and remedy.

Every file of names, texts or labels that a user gives comes in through this module: patients,
resolutions, captions, questions, labels, manifests, predictions, classes. So there is one answer to
what an empty cell is, which separators are known, and what an editor may have put around a name.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError

SLIDE_COLUMNS = ("slide", "slide_id", "slide_name", "wsi", "wsi_id", "image", "filename")
PATIENT_COLUMNS = ("patient_id", "patient")
CASE_COLUMNS = ("case_id", "patient_id", "case", "patient")

MISSING = frozenset(
    {"", "nan", "-nan", "na", "n/a", "n.a.", "<na>", "#n/a", "#na", "nat", "null", "<null>"}
)
"""Spellings of an empty cell by pandas, R, Excel and databases; compared in lower case."""
UNKNOWN = MISSING | {
    "none", "unknown", "not available", "[not available]", "not reported", "[not reported]",
    "not applicable", "[not applicable]", "[unknown]", "'--",
}  # fmt: skip
"""Spellings of a label that nobody knows, by people; compared in lower case."""
_DASHES = frozenset({"-", "--", "\u2013", "\u2014", "?", "."})
"""No name of a patient or split either; as a label ``-`` may be a result."""

_SEPARATORS = ",;|"  # among equals the first; a tab in the header wins over all
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"  # str.strip leaves them
_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _INVISIBLE
_NOTHING = dict.fromkeys(map(ord, _INVISIBLE))
_ENCODINGS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def clean(text: str) -> str:
    """Return a text without the space around it, no-break and zero-width ones included."""
    return text.strip(_SPACE)


def is_missing(text: str) -> bool:
    """Return whether a cell is empty, or holds a common marker of an empty one."""
    return clean(text).lower() in MISSING


def is_unknown(text: str) -> bool:
    """Return whether a label means unknown."""
    return clean(text).lower() in UNKNOWN


def known(text: str | None) -> str | None:
    """Return the patient or split that a cell names; None where it names none."""
    name = clean(text or "")
    return None if is_unknown(name) or name in _DASHES else name


def known_patient(text: str | None) -> str | None:
    """Return the patient that a cell names; None where it names none.

    One patient has one spelling: accents in one way, single plain spaces, and no ``.0`` behind a
    number, which programs add to a column of numbers with a gap in it.
    """
    name = known(text)
    if name is None:
        return None
    return re.sub(r"^(\d+)\.0$", r"\1", " ".join(unicodedata.normalize("NFC", name).split()))


def loosely(name: str) -> str:
    """Return what is left of a name when case, kinds of space and of letters make no difference."""
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_NOTHING)
    return " ".join(folded.split())


def read_text(file: str | Path, *, code: str | None = None) -> str:
    """Return the text of a UTF-8 file, or of a UTF-16 one that says so by its byte order mark.

    Args:
        file: Path of the file.
        code: Code of the error where it cannot be opened.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}.", hint="Check the path.", code=code
        ) from error
    if content.startswith(b"PK\x03\x04"):
        raise ConfigError(
            f"{file} is a spreadsheet or an archive, not text.", hint="Save it as CSV in UTF-8."
        )
    encoding = next((name for mark, name in _ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}, line {line}: not UTF-8.", hint="Save the file as UTF-8."
        ) from error


def is_json(file: str | Path) -> bool:
    """Return whether a text file holds JSON (a list, an object, lines of objects), no table."""
    return clean(read_text(file))[:1] in ("[", "{")


def read_rows(file: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line, row) of a table whose first line names the columns.

    The separator is the one that cuts the first line into most cells: tab, comma, semicolon or
    bar. Cells and headings are stripped of every kind of space; empty lines, and columns without
    heading and content, are left out.

    Raises:
        ConfigError: If a line has another number of cells, or the file is no table.
    """
    text = read_text(file)
    separator, skipped = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    table: list[tuple[int, list[str]]] = []
    width = 0
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            cells = [clean(cell) for cell in cells]
            if line <= skipped or not any(cells):
                continue
            if not table:
                cells = _headings(file, line, cells)
                width = len(cells)
            while len(cells) > width and not cells[-1]:
                cells.pop()
            if len(cells) != width:
                raise _uneven(file, line, cells, width, separator)
            if any("\0" in cell for cell in cells):
                raise bad_line(file, line, "a zero byte")
            table.append((line, cells))
    except csv.Error as error:
        what = "a quotation mark is opened and not closed" if "end of data" in str(error) else error
        raise bad_line(file, start, str(what)) from error
    if len(table) < 2:
        raise ConfigError(f"{file} has no rows.", hint="Its first line must name the columns.")
    (top, header), *rows = table
    used = [at for at, name in enumerate(header) if name or any(cells[at] for _, cells in rows)]
    names = [header[at] for at in used]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise bad_line(file, top, f"the column {twice!r} is there twice")
    return [
        (line, dict(zip(names, (cells[at] for at in used), strict=True))) for line, cells in rows
    ]


def _headings(file: str | Path, line: int, cells: list[str]) -> list[str]:
    while cells and not cells[-1]:
        cells = cells[:-1]
    if any("\0" in cell for cell in cells):
        raise bad_line(file, line, "a zero byte")
    return cells


def _separator(text: str) -> tuple[str, int]:
    """Return the separator, and how many lines before the headings only name it (``sep=;``)."""
    lines = text.lstrip("\ufeff").splitlines()
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        return ",", 0
    number, first = filled[0]
    if match := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first):
        return match[1], number
    if "\t" in first:
        return "\t", 0
    bare = re.sub(r'"[^"]*"', "", first)  # a separator within quotation marks separates nothing
    return max(_SEPARATORS, key=lambda one: (bare.count(one), -_SEPARATORS.index(one))), 0


def _uneven(
    file: str | Path, line: int, cells: list[str], width: int, separator: str
) -> ConfigError:
    """Return the error for a line with more or fewer cells than there are columns."""
    name = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}.get(separator, separator)
    what = f"{len(cells)} cells where the first line has {width}"
    if len(cells) > width:
        return bad_line(
            file,
            line,
            what,
            hint=f"Put quotation marks around a cell that holds a {name}; nothing was written.",
        )
    return bad_line(file, line, what)


def json_entries(file: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a JSON list, of lines of JSON, or of one value.

    Raises:
        ConfigError: The file is not JSON.
    """
    text = read_text(file)
    decoder = json.JSONDecoder()
    at, end = 0, len(text.rstrip())
    is_list = text.lstrip().startswith("[")
    if is_list:
        at, end = text.index("[") + 1, end - 1
        if text[end] != "]":
            raise bad_line(file, text.count("\n") + 1, "the list does not end")
    line, counted = 1, 0
    while True:
        while at < end and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= end:
            return
        try:
            value, after = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise bad_line(file, error.lineno, f"not JSON ({error.msg})") from error
        yield line, value
        at = after


def column(
    file: str | Path, row: dict[str, str], names: Sequence[str], *, asked: str | None = None
) -> str | None:
    """Return the column that goes by one of some names, whatever its case; None without one.

    Raises:
        ConfigError: If a column was asked for and is not there.
    """
    if asked is not None:
        if asked not in row:
            raise ConfigError(f"{file} has no column {asked!r}.", hint=f"It has: {', '.join(row)}.")
        return asked
    lower = {name.lower(): name for name in reversed(row)}
    return next((lower[name] for name in names if name in lower), None)


def needed_column(file: str | Path, row: dict[str, str], names: Sequence[str]) -> str:
    """Return the column that goes by one of some names, whatever its case.

    Raises:
        ConfigError: If there is none.
    """
    found = column(file, row, names)
    if found is None:
        raise bad_line(file, 1, f"no column {names[0]} among {', '.join(row)}")
    return found


def slide_or_case_column(file: str | Path, row: dict[str, str]) -> tuple[str, bool]:
    """Return the column that names slides, or else cases; and whether it is that of cases.

    Raises:
        ConfigError: If there is neither.
    """
    if (found := column(file, row, SLIDE_COLUMNS)) is not None:
        return found, False
    if (found := column(file, row, CASE_COLUMNS)) is not None:
        return found, True
    raise bad_line(file, 1, f"no column slide or case_id among {', '.join(row)}")


def bad_line(
    file: str | Path,
    line: int,
    what: str,
    *,
    hint: str = "Correct that line; nothing was written.",
) -> ConfigError:
    """Return the error for one line of a file."""
    return ConfigError(f"{file}, line {line}: {what}.", hint=hint)
