"""Compares measured figures with those a paper prints.

A file of expected figures is YAML::

    figures:
    - {table: Table 1, name: mean AUC, expected: 0.6634, file: table1.json, key: "*.auc"}

``file`` is a JSON document that an evaluation wrote, ``key`` the way to a number in it: names
joined by dots, ``*`` for the mean over all values at that place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pathflip.errors import ConfigError
from pathflip.interop.tables import read_text

_KEYS = {"table", "name", "expected", "file", "key"}


def read_expected(file: str | Path) -> list[dict[str, Any]]:
    """Read expected figures.

    Raises:
        ConfigError: The file is no such YAML (``expected``).
    """
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {error}.", code="expected") from error
    figures = content.get("figures") if isinstance(content, Mapping) else None
    if not isinstance(figures, list) or not figures:
        raise ConfigError(
            f"{file} has no list of figures.", hint="Write figures: […].", code="expected"
        )
    for figure in figures:
        if not _is_figure(figure):
            raise ConfigError(
                f"{file}: {figure} is no figure.",
                hint=f"It needs {', '.join(sorted(_KEYS))}; expected is a number.",
                code="expected",
            )
    return [dict(figure) for figure in figures]


def figure_at(document: Any, key: str) -> float | None:
    """Return the number a key leads to, or the mean of those; None where there is none."""
    values = _values(document, key.split("."))
    return sum(values) / len(values) if values else None


def compare(figures: Sequence[Mapping[str, Any]], folder: str | Path) -> list[dict[str, Any]]:
    """Return every figure with what was measured, None where its document is not there.

    Returns:
        [{"table", "name", "expected", "measured", "difference"}].

    Raises:
        ConfigError: A document is no JSON.
    """
    documents: dict[str, Any] = {}
    rows = []
    for figure in figures:
        path = Path(folder) / str(figure["file"])
        if figure["file"] not in documents:
            try:
                documents[figure["file"]] = json.loads(path.read_text()) if path.is_file() else None
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{path} is no JSON: {error}.", hint="Run its evaluation again."
                ) from error
        measured = figure_at(documents[figure["file"]], str(figure["key"]))
        rows.append(
            {
                "table": figure["table"], "name": figure["name"],
                "expected": float(figure["expected"]), "measured": measured,
                "difference": None if measured is None else measured - float(figure["expected"]),
            }
        )  # fmt: skip
    return rows


def _is_figure(figure: Any) -> bool:
    return (
        isinstance(figure, Mapping)
        and set(figure) == _KEYS
        and isinstance(figure["expected"], int | float)
    )


def _values(document: Any, way: Sequence[str]) -> list[float]:
    if not way:
        number = isinstance(document, int | float) and not isinstance(document, bool)
        return [float(document)] if number else []
    if not isinstance(document, Mapping):
        return []
    if way[0] == "*":
        return [value for part in document.values() for value in _values(part, way[1:])]
    return _values(document.get(way[0]), way[1:])
