"""Slides that do not seem to have the rows they must have, found from counts and sums of keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive.archive import READY
from pathflip.archive.keys import Tally
from pathflip.archive.tables import Table

Slides = Mapping[str, Mapping[str, Any]]
_Numbers = NDArray[np.int64]


def suspected(
    named: Mapping[str, Table],
    tallies: Mapping[str, Tally],
    numbers: Mapping[str, int],
    slides: Slides,
    flawed: Mapping[str, Collection[str]],
    encoders: Collection[str],
) -> tuple[list[str], Counter[str]]:
    """Find the slides whose keys have to be looked at one by one.

    Args:
        named: The archive's tables.
        tallies: Keys of each table.
        numbers: {slide: its number in the tallies}; also what owns rows and is no slide.
        slides: Rows of ``slides``: status, encoders and counts.
        flawed: {table: slides with a quarantined row there}.
        encoders: Encoders of the archive.

    Returns:
        The slides, sorted, and {table: how many of the others have no rows there yet}.
    """
    none = Tally.empty(len(numbers))
    found = np.zeros(len(numbers), np.bool_)
    for tally in tallies.values():
        found[tally.twice] = True
    for owners in flawed.values():
        found[[numbers[slide] for slide in owners]] = True
    by_encoders: dict[tuple[str, ...], list[str]] = {}
    for slide, row in slides.items():
        if row["status"] == READY:
            by_encoders.setdefault(tuple(row["encoders"] or ()), []).append(slide)
    waiting: dict[str, list[_Numbers]] = {}
    for names, ready in by_encoders.items():
        at = np.array([numbers[slide] for slide in ready], np.int64)
        if not set(names) <= set(encoders):
            found[at] = True
        tables = [t for t in named.values() if t.encoder is None or t.encoder in names]
        for root in dict.fromkeys(table.spec.one_per for table in tables):
            group = [table for table in tables if root is not None and table.spec.one_per == root]
            made = [table for table in group if table.ingested]
            found[at] |= ~_complete(made, tallies, none, named, at, [slides[s] for s in ready])
            later = [t for t in group if not t.ingested and t.spec.derived_from is not None]
            ok, empty = _all_or_none(later, tallies, none, at, [slides[s] for s in ready])
            found[at] |= ~ok
            for table, missing in empty.items():
                waiting.setdefault(table, []).append(at[missing])
    order = {
        table.name: sum(int((~found[part]).sum()) for part in waiting.get(table.name, ()))
        for table in named.values()
    }
    return sorted(slide for slide, number in numbers.items() if found[number]), Counter(order)


def _complete(
    tables: list[Table],
    tallies: Mapping[str, Tally],
    none: Tally,
    named: Mapping[str, Table],
    at: _Numbers,
    rows: list[Mapping[str, Any]],
) -> NDArray[np.bool_]:
    """Return which slides have the same keys in all tables of a group, as many as they must."""
    ok = np.ones(len(at), np.bool_)
    first = None
    for table in tables:
        tally = tallies.get(table.name, none)
        first = first or tally
        wanted = _wanted(named[str(table.spec.one_per)], rows)
        if wanted is not None:
            ok &= tally.parts[at] == wanted
        ok &= (tally.parts[at] == first.parts[at]) & (tally.total[at] == first.total[at])
        if table.spec.and_slide:
            ok &= tally.own[at]
    return ok


def _all_or_none(
    tables: list[Table],
    tallies: Mapping[str, Tally],
    none: Tally,
    at: _Numbers,
    rows: list[Mapping[str, Any]],
) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.bool_]]]:
    """Return which slides have all or none of their keys in each table, and which have none."""
    ok = np.ones(len(at), np.bool_)
    empty: dict[str, NDArray[np.bool_]] = {}
    most = np.zeros(len(at), np.int64)
    total = np.zeros(len(at), np.uint64)
    for table in tables:
        tally = tallies.get(table.name, none)
        larger = tally.rows[at] > most
        most = np.where(larger, tally.rows[at], most)
        total = np.where(larger, tally.total[at], total)
    for table in tables:
        tally, wanted = tallies.get(table.name, none), _wanted(table, rows)
        there = tally.rows[at]
        if wanted is not None:
            empty[table.name] = (there == 0) & (wanted != 0)
            ok &= (there == 0) | (there == wanted)
        else:
            empty[table.name] = (there == 0) & (most != 0)
            ok &= (there == 0) | ((there == most) & (tally.total[at] == total))
            ok &= not table.spec.and_slide
    return ok, empty


def _wanted(table: Table, rows: list[Mapping[str, Any]]) -> _Numbers | None:
    """Return how many rows each slide must have in a table; None if any number."""
    counts = [table.spec.rows_of(row) for row in rows]
    if any(count is None for count in counts):
        return None
    return np.array(counts, np.int64)
