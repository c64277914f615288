"""Keys of an archive's rows as fixed-width numbers, to see which slides do not have all of theirs.

A key is 64 bits of hash and the number of its slide, so millions fit where their text would not.
The keys a slide has in a table are compared by their number and the sum of their hashes. A slide
for which these do not agree is only suspected: its keys have to be read again to say what is wrong,
so that two keys with one hash accuse nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathflip.archive.tables import SLIDES, count_columns, spec_of

Numbers = NDArray[np.int64]
_MIX = np.uint64(0x9E3779B97F4A7C15)


def hash_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return 64 bits for each key, the same for equal ones in this process."""
    return np.fromiter(map(hash, keys), np.int64).view(np.uint64)


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Keys of some rows of a table, and what else of them is kept.

    Attributes:
        rows: Number of rows.
        hashes: Hashes of their keys.
        owners: Slides of some of them.
        of: Position of each row's slide among them.
        slides: Rows of the ledger, if they are such.
        quarantined: {key: slide} of rows with a fault.
    """

    rows: int
    hashes: NDArray[np.uint64]
    owners: list[str]
    of: NDArray[np.int64]
    slides: dict[str, dict[str, Any]]
    quarantined: dict[str, str]


def keys_in(rows: pa.Table | pa.RecordBatch, table: str, key: str) -> RowKeys:
    """Return the keys of rows of a table, whose key column is named."""
    spec, ids = spec_of(table), rows.column(key).to_pylist()
    slides: dict[str, dict[str, Any]] = {}
    if table == SLIDES:
        columns = ["slide_id", "status", "encoders", *count_columns()]
        slides = {row["slide_id"]: row for row in rows.select(columns).to_pylist()}
    quarantined: dict[str, str] = {}
    if spec is not None and spec.fault is not None:
        faults = zip(*(rows.column(c).to_pylist() for c in ("slide_id", spec.fault)), strict=True)
        both = zip(ids, faults, strict=True)
        quarantined = {one: slide for one, (slide, fault) in both if fault}
    owners = rows.column("slide_id" if "slide_id" in rows.schema.names else key)
    encoded = owners.combine_chunks() if isinstance(owners, pa.ChunkedArray) else owners
    encoded = encoded.dictionary_encode()
    return RowKeys(
        rows=len(ids),
        hashes=hash_keys(ids),
        owners=encoded.dictionary.to_pylist(),
        of=encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        slides=slides,
        quarantined=quarantined,
    )


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Keys of one table, by slide number.

    Attributes:
        rows: Distinct keys of each slide.
        parts: Those of them that are not the slide's own id.
        total: Sum of their hashes.
        own: Whether the slide's own id is a key.
        twice: Numbers of slides with a key that is there more than once.
    """

    rows: Numbers
    parts: Numbers
    total: NDArray[np.uint64]
    own: NDArray[np.bool_]
    twice: Numbers

    @classmethod
    def empty(cls, slides: int) -> Tally:
        """Return the tally of a table without rows."""
        rows = np.zeros(slides, np.int64)
        return cls(
            rows=rows,
            parts=rows,
            total=rows.astype(np.uint64),
            own=rows != 0,
            twice=np.empty(0, np.int64),
        )


@dataclass(kw_only=True)
class Keys:
    """Keys that were read, of all tables.

    Attributes:
        slides: {slide id: its number}.
    """

    slides: dict[str, int] = field(default_factory=dict)
    _read: dict[str, list[tuple[NDArray[np.uint64], NDArray[np.int32]]]] = field(
        default_factory=dict
    )

    def add(
        self, table: str, hashes: NDArray[np.uint64], owners: Sequence[str], of: Numbers
    ) -> None:
        """Add keys of a table.

        Args:
            table: The table.
            hashes: Hashes of the keys [n].
            owners: Slides that have some of them.
            of: Position of each key's slide among them [n].
        """
        numbers = [self.slides.setdefault(owner, len(self.slides)) for owner in owners]
        at = np.array(numbers, np.int32)[of] if len(of) else np.empty(0, np.int32)
        self._read.setdefault(table, []).append((hashes, at))

    def tables(self) -> list[str]:
        """Return the tables of which keys were read."""
        return list(self._read)

    def tally(self, table: str) -> Tally:
        """Return the keys of a table, counted."""
        parts = self._read.get(table, [])
        hashes = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in parts)])
        at = np.concatenate([np.empty(0, np.int32), *(part for _, part in parts)])
        count = len(self.slides)
        mixed = hashes ^ (at.astype(np.uint64) * _MIX)
        order = np.argsort(mixed, kind="stable")
        again = order[1:][mixed[order][1:] == mixed[order][:-1]]
        twice = np.unique(at[again]).astype(np.int64)
        if len(again):
            keep = np.ones(len(at), np.bool_)
            keep[again] = False
            hashes, at = hashes[keep], at[keep]
        names = hash_keys(self.slides)
        itself = hashes == names[at] if count else np.empty(0, np.bool_)
        total = np.zeros(count, np.uint64)
        np.add.at(total, at[~itself], hashes[~itself])
        own = np.zeros(count, np.bool_)
        own[at[itself]] = True
        rows = np.bincount(at, minlength=count)
        return Tally(rows=rows, parts=rows - own, total=total, own=own, twice=twice)
