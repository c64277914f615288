"""Reads the first sheet of an .xlsx workbook as :func:`pathflip.interop.tables.read_rows` does.

Enough for tables of names and numbers, as data sets carry them: shared and inline strings, numbers
as written, no formulas, dates or styles.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from pathflip.errors import ConfigError
from pathflip.interop.tables import bad_line, clean

_MAX_BYTES = 64 << 20
"""Largest part of a workbook that is unpacked."""


def read_sheet(file: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line, row) of the first sheet, whose first line names the columns.

    Raises:
        ConfigError: It is no workbook, or has no rows.
    """
    try:
        with zipfile.ZipFile(file) as book:
            names = book.namelist()
            shared = (
                [_text(item) for item in _xml(book, "xl/sharedStrings.xml")]
                if "xl/sharedStrings.xml" in names
                else []
            )
            sheets = [n for n in names if re.fullmatch(r"xl/worksheets/[^/]+\.xml", n)]
            first = min(sheets, key=lambda name: (len(name), name))
            lines = [_cells(row, shared) for row in _xml(book, first).iter() if _is(row, "row")]
    except (OSError, zipfile.BadZipFile, LookupError, ValueError, ElementTree.ParseError) as error:
        raise ConfigError(
            f"{file} cannot be read as a workbook: {error}.", hint="Save it as CSV in UTF-8."
        ) from error
    table = [(at + 1, cells) for at, cells in enumerate(lines) if any(cells.values())]
    if len(table) < 2:
        raise ConfigError(f"{file} has no rows.", hint="Its first line must name the columns.")
    headings = {column: name for column, name in table[0][1].items() if name}
    if len(set(headings.values())) < len(headings):
        raise bad_line(file, table[0][0], "a column is there twice")
    return [
        (line, {name: cells.get(column, "") for column, name in headings.items()})
        for line, cells in table[1:]
    ]


def _xml(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if book.getinfo(name).file_size > _MAX_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_BYTES >> 20} MiB")
    return ElementTree.fromstring(book.read(name))


def _is(element: ElementTree.Element, tag: str) -> bool:
    return element.tag.rpartition("}")[2] == tag


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.iter() if _is(part, "t"))


def _cells(row: ElementTree.Element, shared: list[str]) -> dict[str, str]:
    """Return {column letters: text} of a row."""
    found = {}
    for cell in row:
        letters = re.match(r"[A-Z]+", cell.get("r", ""))
        if letters is None:
            continue
        value = next((part.text or "" for part in cell if _is(part, "v")), "")
        kind = cell.get("t")
        if kind == "s":
            value = shared[int(value)]
        elif kind == "inlineStr":
            value = _text(cell)
        found[letters[0]] = clean(value)
    return found
