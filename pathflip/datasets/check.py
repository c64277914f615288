"""Checks whether a copy of a public data set is whole: files, counts, columns, digests.

Codes of problems: ``missing`` (a file), ``empty``, ``files`` (their number), ``rows``, ``columns``,
``distinct``, ``values``, ``refers`` (files that a table names), ``size``, ``sha256`` (or the digest
of a published list), ``unreadable``. A note is no problem: a count that its authors state and this
copy does not have.

Tables are read line by line: one of a million rows costs seconds and little memory.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathflip.datasets.cards import Card, FileCard
from pathflip.errors import ConfigError
from pathflip.interop.spreadsheet import read_sheet
from pathflip.interop.tables import clean, column, json_entries, read_rows, read_text

SHOWN = 20
"""Names in a problem, of as many as there may be."""
_BRACKETS = re.compile(r"\s*[(（\[].*$")
_DIGESTS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the number of hexadecimal digits


@dataclass(kw_only=True)
class Found:
    """The state of the files that follow one pattern of a card.

    Attributes:
        path: The pattern.
        files: Number of files found.
        rows: Rows of all of them, where they are tables.
        problems: {"code", "message"} each.
        notes: Differences from what is only stated.
    """

    path: str
    files: int = 0
    rows: int | None = None
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, code: str, message: str) -> None:
        """Add a problem."""
        self.problems.append({"code": code, "message": message})


def check(card: Card, folder: str | Path, *, checksums: str | Path | None = None) -> dict[str, Any]:
    """Compare a copy with its card, and with a published list of digests where there is one.

    Args:
        card: Card of the set.
        folder: The copy; its files may lie in one folder below, as archives unpack.
        checksums: GDC manifest, or lines ``digest  name`` of md5sum or sha256sum. Files are found
            by name at any depth.

    Returns:
        {"dataset", "folder", "whole", "problems": number, "files": [{"path", "files", "rows",
        "problems": [{"code", "message"}], "notes"}]}; optional files that are not there are left
        out.

    Raises:
        ConfigError: There is no such folder, or the list is none.
    """
    asked = Path(folder).expanduser()
    if not asked.is_dir():
        raise ConfigError(f"There is no folder {folder}.", hint="Give the folder of the copy.")
    root = root_of(card, asked)
    states = [_files(one, root) for one in card.files]
    states = [
        state
        for one, state in zip(card.files, states, strict=True)
        if state.files or not one.optional
    ]
    if not any(state.files or state.problems for state in states):
        nothing = Found(path="*")
        nothing.say("missing", f"none of the files of {card.name} is there")
        states.append(nothing)
    if checksums is not None:
        states.append(_listed(Path(checksums).expanduser(), asked))
    problems = sum(len(state.problems) for state in states)
    return {
        "dataset": card.name,
        "folder": str(root),
        "whole": not problems,
        "problems": problems,
        "files": [vars(state) for state in states],
    }


def root_of(card: Card, folder: Path) -> Path:
    """Return the folder, or the one right below it, that has most of a set's files."""
    below = sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] != ".")

    def there(root: Path) -> int:
        return sum(next(root.glob(one.path), None) is not None for one in card.files)

    return max([folder, *below], key=there)  # the first among equals


def entries(file: Path, *needed: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table, or the entries of a JSON list or of lines of JSON.

    Args:
        file: The file.
        needed: Columns, or keys of the first entry, that have to be there.

    Raises:
        ConfigError: The file is no table and no JSON, has no rows, or lacks a column.
    """
    suffix = file.suffix.lower()
    number = 0
    if suffix == ".xlsx":
        rows: Iterator[Any] = (row for _, row in read_sheet(file))
    elif suffix == ".json":
        rows = (entry for _, entry in json_entries(file))
    elif suffix == ".jsonl":
        rows = _lines(file)
    else:
        rows = _table(file)
    try:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise ConfigError(
                    f"{file}: entry {number} is no object.", hint="Download it again."
                )  # fmt: skip
            absent = [name for name in needed if name not in row] if number == 1 else []
            if absent:
                raise ConfigError(
                    f"{file} has no {', '.join(absent)}; it has {', '.join(map(str, row))}.",
                    hint="Is it the file of another set or release?",
                )
            yield row
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8.", hint="Save it as UTF-8.") from error
    if not number:
        raise ConfigError(f"{file} has no rows.", hint="Download it again.")


def read_splits(
    files: Mapping[str, Path], *, named: Callable[[str], Iterable[str]]
) -> dict[str, str]:
    """Return {name: split} of lists of names, a file a split.

    Args:
        files: {split: file}.
        named: Gives the names of a line.

    Raises:
        ConfigError: A name is in two splits, or a file cannot be read.
    """
    found: dict[str, str] = {}
    for split, file in files.items():
        for line in read_text(file).splitlines():
            for name in named(line):
                if found.setdefault(name, split) != split:
                    raise ConfigError(
                        f"{file}: {name} is in the split {found[name]}, too.",
                        hint="Leave it in one of them.",
                    )
    return found


def _lines(file: Path) -> Iterator[Any]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    why = getattr(error, "msg", "nested too deep")
                    raise ConfigError(f"{file}, line {number}: not JSON ({why}).") from error


def _table(file: Path) -> Iterator[Mapping[str, Any]]:
    # Tables of cBioPortal (.txt) have lines about them before the headings, and no quoting.
    plain = file.suffix.lower() == ".txt"
    with open(file, encoding="utf-8-sig", newline="") as text:
        number = 0  # of the line read last
        first = ""

        def lines() -> Iterator[str]:
            nonlocal number, first
            for number, line in enumerate(text, start=1):
                if "\0" in line:
                    raise ConfigError(
                        f"{file}, line {number}: a zero byte.", hint="Download it again."
                    )  # fmt: skip
                if first or not (plain and line.startswith("#")):
                    first = first or line
                    yield line

        given = lines()
        if (head := next(given, None)) is None:
            return
        limit = csv.field_size_limit(min(sys.maxsize, 1 << 24))
        try:
            rows = csv.reader(
                itertools.chain([head], given), delimiter="\t" if "\t" in head else ",",
                quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL, strict=True,
            )  # fmt: skip
            names = [clean(name) for name in next(rows, [])]
            for cells in rows:
                if len(cells) != len(names) and cells:
                    raise ConfigError(
                        f"{file}, line {number}: {len(cells)} cells where the first line has "
                        f"{len(names)}.",
                        hint="Is the file cut off? Download it again.",
                    )
                if cells:
                    yield dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{file}, line {number}: {error}.") from error
        finally:
            csv.field_size_limit(limit)


# -- one pattern ----------------------------------------------------------------------------------


def _files(card: FileCard, root: Path) -> Found:
    state = Found(path=card.path)
    files = sorted(path for path in root.glob(card.path) if path.is_file())
    state.files = len(files)
    if not files:
        if not card.optional:
            state.say("missing", f"{card.path} is not there ({card.holds})")
        return state
    empty = [path.relative_to(root).as_posix() for path in files if not path.stat().st_size]
    if empty:
        state.say("empty", f"{len(empty)} of {len(files)} files are empty: {_few(empty)}")
    for one in files if card.beside else ():
        if not (one.parent / card.beside).is_file():
            where = one.relative_to(root).as_posix()
            state.say("missing", f"{where} has no {card.beside} beside it")
    if card.files is not None and len(files) != card.files:
        state.say("files", f"{len(files)} files {card.path}; the set has {card.files}")
    if _is_table(card):
        for file in (path for path in files if path.stat().st_size):
            try:
                state.rows = (state.rows or 0) + _contents(card, file, root, state)
            except (ConfigError, OSError) as error:
                state.say("unreadable", str(error))
    for name, digest in card.sha256.items():
        if (root / name).is_file() and _digest(root / name, "sha256") != digest:
            state.say("sha256", f"{name} is not the file that was published")
    return state


def _is_table(card: FileCard) -> bool:
    facts = (card.rows, card.stated_rows, card.columns, card.distinct, card.values, card.refers)
    return any(facts)


def _contents(card: FileCard, file: Path, root: Path, state: Found) -> int:
    """Compare one table with its card; return its number of rows."""
    asked = {*card.columns, *card.distinct, *card.values, *card.refers}
    keys: dict[str, str] = {}
    absent: list[str] = []
    seen: dict[str, set[str]] = {name: set() for name in (*card.distinct, *card.refers)}
    strange: dict[str, set[str]] = {name: set() for name in card.values}
    count = 0
    for count, row in enumerate(entries(file), start=1):
        if count == 1:
            keys = {_plain(key): key for key in row}
            absent = sorted(name for name in asked if _plain(name) not in keys)
        for name, values in seen.items():
            if name not in absent:
                values.add(clean(str(row.get(keys[_plain(name)], ""))))
        for name, others in strange.items():
            value = "" if name in absent else clean(str(row.get(keys[_plain(name)], "")))
            if value not in card.values[name] and name not in absent:
                others.add(value)
    where = file.relative_to(root).as_posix()
    if absent:
        state.say("columns", f"{where} has no {', '.join(absent)}; it has {', '.join(keys)}")
    if card.rows is not None and count != card.rows:
        state.say("rows", f"{where} has {count} rows; the set has {card.rows}")
    if card.stated_rows is not None and count != card.stated_rows:
        state.notes.append(f"{where} has {count} rows; {card.stated_rows} are stated")
    for name, number in card.distinct.items():
        if name not in absent and len(seen[name]) != number:
            state.say("distinct", f"{where} has {len(seen[name])} values of {name}, not {number}")
    for name, others in strange.items():
        if others:
            state.say("values", f"{where}: {name} is {_few(sorted(others))}")
    for name, pattern in card.refers.items():
        if name not in absent:
            _referred(where, name, pattern.split("|"), seen[name], root, state)
    return count


def _referred(
    where: str, name: str, patterns: Sequence[str], values: set[str], root: Path, state: Found
) -> None:
    missing = sorted(
        patterns[0].format(value)
        for value in values
        if not any((root / pattern.format(value)).is_file() for pattern in patterns)
    )
    if missing:
        state.say(
            "refers", f"{len(missing)} of {len(values)} files that {name} of {where} names are not "
            f"there: {_few(missing)}"
        )  # fmt: skip


def _plain(heading: str) -> str:
    """Return a heading without its case, and without the unit in brackets behind it."""
    return _BRACKETS.sub("", clean(str(heading))).lower()


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


# -- published digests ----------------------------------------------------------------------------


def _listed(file: Path, folder: Path) -> Found:
    """Compare the files below a folder with a list of digests."""
    state = Found(path=file.name)
    there: dict[str, list[Path]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            there.setdefault(path.name, []).append(path)
    for name, size, digest in read_checksums(file):
        copies = there.get(Path(name).name, [])
        if not copies:
            state.say("missing", f"{name} is not there")
            continue
        state.files += 1
        if size is not None and all(path.stat().st_size != size for path in copies):
            found = copies[0].stat().st_size
            state.say("size", f"{name} has {found} bytes; the list has {size}")
        elif all(_digest(path, _DIGESTS[len(digest)]) != digest for path in copies):
            state.say("sha256", f"{name} does not have the digest of the list")
    return state


def read_checksums(file: Path) -> list[tuple[str, int | None, str]]:
    """Return (name, bytes or None, digest) of a GDC manifest or a list of md5sum or sha256sum.

    Raises:
        ConfigError: It is neither.
    """
    try:
        first = file.read_text(encoding="utf-8-sig").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.", hint="Check the path.") from error
    if "\t" in first and "md5" in first.lower():
        rows = [row for _, row in read_rows(file)]
        name, digest, size = (column(file, rows[0], (key,)) for key in ("filename", "md5", "size"))
        if name is None or digest is None:
            raise ConfigError(f"{file} has no columns filename and md5.", hint="Is it a manifest?")
        return [
            (row[name], int(row[size]) if size and row[size].isdigit() else None, row[digest])
            for row in rows
        ]
    found: list[tuple[str, int | None, str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        digest, _, name = line.strip().partition(" ")
        if not digest:
            continue
        if len(digest) not in _DIGESTS or not re.fullmatch(r"[0-9a-fA-F]+", digest):
            raise ConfigError(
                f"{file}, line {number}: no digest.",
                hint="Give a GDC manifest, or lines of md5sum or sha256sum: digest, two spaces, "
                "name.",
            )
        found.append((name.strip().lstrip("*"), None, digest.lower()))
    return found


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()
