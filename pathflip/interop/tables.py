"""Reading tables of others line by line, so that what is wrong can be named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError


def read_text(file: str | Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        before = Path(file).read_bytes()[: error.start]
        raise ConfigError(
            f"{file}, line {before.count(10) + 1}: not UTF-8.", hint="Save the file as UTF-8."
        ) from error


def read_rows(file: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Returns (line, row) of a CSV or TSV whose first line names the columns.

    Cells are stripped; empty lines are skipped; the separator is a tab if the first line has one.

    Raises:
        ConfigError: If a line has another number of cells, or the file is no table.
    """
    text = read_text(file)
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise bad_line(file, line, f"the column {twice!r} is there twice")
                continue
            if len(cells) != len(header):
                raise bad_line(
                    file, line, f"{len(cells)} cells where the first line has {len(header)}"
                )
            if any("\0" in cell for cell in cells):
                raise bad_line(file, line, "a zero byte")
            rows.append((line, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except csv.Error as error:
        raise bad_line(file, start, str(error)) from error
    if not rows:
        raise ConfigError(f"{file} has no rows.", hint="Its first line must name the columns.")
    return rows


def json_entries(file: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of a JSON list, of lines of JSON, or of one value.

    Raises:
        ConfigError: Where it is not JSON.
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
    file: str | Path, row: dict[str, str], known: Sequence[str], *, asked: str | None = None
) -> str | None:
    """Returns the column that goes by one of some names, whatever its case; None without one.

    Raises:
        ConfigError: If a column was asked for and is not there.
    """
    if asked is not None:
        if asked not in row:
            raise ConfigError(f"{file} has no column {asked!r}.", hint=f"It has: {', '.join(row)}.")
        return asked
    lower = {name.lower(): name for name in reversed(row)}
    return next((lower[name] for name in known if name in lower), None)


def bad_line(file: str | Path, line: int, what: str) -> ConfigError:
    """Returns the error for one line of a file."""
    return ConfigError(
        f"{file}, line {line}: {what}.", hint="Correct that line; nothing was written."
    )
