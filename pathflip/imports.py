"""Imports of processes that have no use for pandas, which others take along."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any


@contextmanager
def without_pandas() -> Iterator[None]:
    """Let what is imported inside the block find pandas absent, and Arrow for good.

    Arrow asks for pandas once, before it makes its first scalar, to know a pandas object when it
    sees one, and keeps the answer: where it is imported by the end of the block, it is asked there.
    """
    absent = _NoPandas()
    sys.meta_path.insert(0, absent)
    try:
        yield
        if "pyarrow" in sys.modules:
            sys.modules["pyarrow"].scalar(0)
    finally:
        sys.meta_path.remove(absent)


class _NoPandas(MetaPathFinder):
    """Finder of modules that says pandas is not there, and leaves all others to those behind."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Refuse pandas."""
        if name == "pandas":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
