"""Data splits: train, val and test, under every name that tables of others give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from pathflip.errors import ConfigError
from pathflip.interop.tables import clean, known

SPLITS = ("train", "val", "test")
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing"),
}
_CANONICAL = {spelling: split for split, all_of in _SPELLINGS.items() for spelling in all_of}


def canonical_split(name: str | None) -> str | None:
    """Return the split a name means: ``val`` for Validation, dev and so on.

    A name that is none of the known ones (a fold, ``all``) comes back as written, without the
    space around it; an empty cell in any spelling (``nan``, ``N/A``) is None.
    """
    name = known(name)
    return None if name is None else _CANONICAL.get(name.lower(), name)


def requested_split(name: str) -> str:
    """Return the split that a user asks for by any of its names; other names unchanged."""
    return canonical_split(name) or name


class HasSplit(Protocol):
    """Line of a list that says its split."""

    @property
    def split(self) -> str | None:
        """Split, if it has one."""
        ...


Line = TypeVar("Line", bound=HasSplit)


def of_split(
    lines: Sequence[Line], split: str, *, source: str | Path, what: str, code: str
) -> list[Line]:
    """Return the lines of a split; ``all`` for every one.

    Args:
        lines: Lines of a list.
        split: Split, by any of its names.
        source: Place of the list, for the message.
        what: Name of one line, for the message.
        code: Code of the error.

    Raises:
        ConfigError: No line is of it.
    """
    wanted = requested_split(split)
    chosen = [line for line in lines if wanted in ("all", line.split)]
    if not chosen:
        there = sorted({str(line.split) for line in lines})
        raise ConfigError(
            f"{source} has no {what} of split {split}.",
            hint=f"Its {what}s are of: {', '.join(there) or f'(no {what}s)'}; see --split.",
            code=code,
        )
    return chosen


def spellings(name: str) -> tuple[str, ...]:
    """Return every name of a split in lower case; only the one given if it is no known split."""
    return _SPELLINGS.get(requested_split(name), (clean(name).lower(),))
