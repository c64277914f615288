"""Data splits: train, val and test, under every name that tables of others give them."""

from __future__ import annotations

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


def spellings(name: str) -> tuple[str, ...]:
    """Return every name of a split in lower case; only the one given if it is no known split."""
    return _SPELLINGS.get(requested_split(name), (clean(name).lower(),))
