"""Files made of a data set before they are written: tables, tasks, outlines, pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices that the files of a set leave open.

    Attributes:
        mpp: µm per pixel of its pictures; None where none are wanted as slides.
        split: Only this split of it; None for all.
        fold: Fold whose parts become the splits, where a set has folds.
    """

    mpp: float | None = None
    split: str | None = None
    fold: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """A CSV.

    Attributes:
        columns: Headings.
        rows: Cells of each row; None is an empty one.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], *first: str) -> Table:
        """Make a table of rows that may lack columns; some columns come first."""
        rows = list(rows)
        names = dict.fromkeys([*first, *(name for row in rows for name in row)])
        columns = tuple(names)
        return cls(columns=columns, rows=[tuple(row.get(name) for name in columns) for row in rows])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Files made of a set, by their names below the folder they are written to.

    Attributes:
        tables: CSV files.
        tasks: Zero-shot tasks, the content of ``tasks.yaml``; empty for none.
        outlines: {stem of a slide: [(class, rings of a polygon)]}, for ``outlines/<stem>.geojson``;
            a ring is a list of (x, y) in pixels of the picture.
        pictures: {stem of a slide: picture}, for ``slides/<stem>.tif``.
        passed: {reason: number} of rows that are not in the files.
    """

    tables: Mapping[str, Table] = field(default_factory=dict)
    tasks: Sequence[Mapping[str, Any]] = ()
    outlines: Mapping[str, Sequence[tuple[str, list[list[tuple[float, float]]]]]] = field(
        default_factory=dict
    )
    pictures: Mapping[str, Path] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)


def binary(name: str, *, prompt: str, negative: str, positive: Sequence[str]) -> dict[str, Any]:
    """Return a zero-shot task of a property with two states, whose prompts are whole sentences."""
    return {
        "name": name, "label": name, "kind": "binary", "templates": "CLASSNAME",
        "prompts": [prompt], "negative_prompts": [negative], "positive": list(positive),
    }  # fmt: skip


def multiclass(name: str, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a zero-shot task that chooses among classes: {label: names}."""
    found = {label: list(names) for label, names in classes.items()}
    return {"name": name, "label": name, "kind": "multiclass", "classes": found}


def mutation(name: str, gene: str, *, positive: Sequence[str] = ("MUT",)) -> dict[str, Any]:
    """Return the task of a gene's mutation, in the words of PathFLIP (arXiv 2512.17621)."""
    return binary(
        name,
        prompt=f"a histopathology image with a {gene} gene mutation.",
        negative=f"a histopathology image without a {gene} gene mutation.",
        positive=positive,
    )
