"""The regions nearest to a query by the vector index, with conditions.

What Lance is asked for is little and what is kept in memory is bounded, for the reasons and the
numbers in docs/notes/performance.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.filters import OF_SLIDE, Filter, meeting
from pathflip.archive.indexes import partitions_of

MEMORY_BYTES = 256 << 20
"""What is kept of a table between queries at most: the vectors of one level where there is no
index, and the places of its regions; where that is more, they are read anew."""

_FEW_BYTES = 4 << 20
"""Vectors of this size are compared one by one where conditions leave no more of them."""

_SEEN = 2000
"""Regions among which, about, the index should look where conditions leave few."""

_LISTED_SLIDES = 5000
"""Slides that are named to Lance one by one; of more, those not meant are dropped after."""

_ASKED = 8
"""Queries of one snapshot from which on the places of all regions are worth reading."""

_REMEMBERED = 16
"""Conditions whose regions are remembered in a snapshot."""

_CANDIDATES = 32
_PLACE_BYTES = 120
PLACE = ["id", "slide_id", "x0", "y0", "size0", "mpp"]
FILTERED = ["patient_id", "tissue_fraction", "n_patches"]
_CLOSE = 1e-5  # float32 products of unit vectors are this near the true ones, with room


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard a vector index is searched; docs/notes/performance.md has what each costs and finds.

    Args:
        probes: Partitions looked into at least; more where a filter leaves too few rows.
        refine: Candidates per result whose vectors are read and compared exactly; 32 at least.
    """

    probes: int = 16
    refine: int = 2


EFFORT = Effort()


def approximate(
    archive: Archive,
    table: str,
    queries: NDArray[np.float64],
    *,
    conditions: tuple[Filter, ...],
    k: int,
    slides: pa.Array,
    effort: Effort,
) -> list[pa.Table]:
    """Returns each query's best regions among the candidates of the index.

    The index ranks by packed vectors; the candidates' own vectors decide. Where conditions leave
    few regions, more partitions are looked into, and where very few, all of them are compared.
    """
    dataset = archive.dataset(table)
    places = _places(archive, table, wanted=bool(conditions))
    chosen = _chosen(archive, table, places, conditions, slides)
    columns = ["vector", *(PLACE if places is None else ())]

    def placed(rows: pa.Table) -> Block:
        own = rows.select(PLACE) if places is None else places.of(rows["_rowid"])
        meant = pc.is_in(own["slide_id"], slides).to_numpy(zero_copy_only=False)
        found: NDArray[np.float32] = vectors(rows["vector"])
        if not meant.all():
            own, found = own.filter(pa.array(meant)), found[meant]
        return block_of(own, found)

    if chosen.few:
        if not chosen.kept:
            rows = dataset.scanner(columns=columns, with_row_id=True, **chosen.scan).to_table()
            chosen.kept.append(placed(rows.combine_chunks()))
        return [best_of(chosen.kept[0], query, k) for query in queries]
    asked = max(k * effort.refine, _CANDIDATES)
    enough = max(k, asked // 2)
    while True:
        nearest = {
            "column": "vector",
            "q": queries.astype(np.float32)[0 if len(queries) == 1 else slice(None)],
            "k": asked,
            "metric": "cosine",
            "minimum_nprobes": max(effort.probes, chosen.probes),
        }
        rows = dataset.scanner(
            columns=[*columns, "_distance"],
            nearest=nearest,
            with_row_id=True,
            prefilter="filter" in chosen.scan,
            **chosen.scan,
        ).to_table()
        parts = [rows]
        if len(queries) > 1:
            numbers = rows["query_index"].to_numpy()
            parts = [rows.filter(pa.array(numbers == number)) for number in range(len(queries))]
        best, short = [], False
        for part, query in zip(parts, queries, strict=True):
            block = placed(part)
            # Slides, and slides that are not meant, may have taken the places of others.
            short |= part.num_rows == asked and len(block[1]) < enough
            best.append(best_of(block, query, k))
        if not short:
            return best
        asked *= 4


@dataclass(frozen=True, kw_only=True)
class _Places:
    """What conditions and results name of regions, by Lance's number of their row."""

    rows: NDArray[np.uint64]
    table: pa.Table

    def of(self, rows: pa.ChunkedArray) -> pa.Table:
        """Returns the places of rows; all null where a row is no region."""
        wanted = rows.to_numpy()
        if not len(self.rows):
            return self.table.select(PLACE).take(pa.nulls(len(wanted), pa.int64()))
        at = np.searchsorted(self.rows, wanted)
        lost = self.rows[np.minimum(at, len(self.rows) - 1)] != wanted
        return self.table.select(PLACE).take(pa.array(at, mask=lost))


def _places(archive: Archive, table: str, *, wanted: bool) -> _Places | None:
    """Returns the places of all regions, if wanted or once a snapshot was asked for often.

    Reading the other columns of a row costs Lance as much as finding it, and reading the column of
    a condition for every query more than that.
    """
    asked = archive.cached(f"{table}/asked", lambda: [0])
    asked[0] += 1
    dataset = archive.dataset(table)
    if not wanted and asked[0] < _ASKED:
        return None
    if archive.cached(f"{table}/rows", dataset.count_rows) * _PLACE_BYTES > MEMORY_BYTES:
        return None

    def read() -> _Places:
        rows = dataset.to_table(
            columns=[*PLACE, *FILTERED], filter=pc.field("kind") == "region", with_row_id=True
        )
        rows = rows.sort_by("_rowid").combine_chunks()
        numbers = rows["_rowid"].to_numpy()
        return _Places(rows=numbers, table=rows.drop_columns(["_rowid"]))

    return archive.cached(f"{table}/places", read)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The regions that conditions leave.

    Attributes:
        probes: Partitions to look into, so that about ``_SEEN`` of them are seen.
        scan: How Lance is told.
        few: Whether they are compared one by one rather than looked for in the index.
        kept: Their places and vectors then, once they were read.
    """

    probes: int
    scan: dict[str, Any]
    few: bool
    kept: list[Block]


def _chosen(
    archive: Archive,
    table: str,
    places: _Places | None,
    conditions: tuple[Filter, ...],
    slides: pa.Array,
) -> _Chosen:
    """Returns the regions that meet conditions; those of the latest queries are remembered."""
    dataset = archive.dataset(table)
    total = archive.cached(f"{table}/rows", dataset.count_rows)
    if not conditions and places is not None:  # slides are dropped by hand, which costs less
        return _Chosen(probes=0, scan={}, few=False, kept=[])
    known: dict[Any, _Chosen] = archive.cached(f"{table}/chosen", dict)
    key = (conditions, places is None)
    if key not in known:
        if places is None:
            where = pc.field("kind") == "region"
            for condition in conditions:
                if condition.field not in OF_SLIDE:
                    where &= condition.expression()
            if len(slides) <= _LISTED_SLIDES and any(c.field in OF_SLIDE for c in conditions):
                where &= pc.field("slide_id").isin(slides)
            count = dataset.count_rows(where) if conditions else total
            scan: dict[str, Any] = {"filter": where}
        else:
            count, scan = _listed(places, conditions, slides)
        probes = math.ceil(partitions_of(total) * min(1.0, _SEEN / max(1, count)))
        if len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        width = dataset.schema.field("vector").type.list_size * 4
        few = count * width <= _FEW_BYTES
        known[key] = _Chosen(probes=probes, scan=scan, few=few, kept=[])
    return known[key]


def _listed(
    places: _Places, conditions: tuple[Filter, ...], slides: pa.Array
) -> tuple[int, dict[str, Any]]:
    """Returns how many regions meet conditions, and their rows or those of all others."""
    from lance.dataset import serialize_row_addrs

    keep = meeting(places.table, conditions)
    if any(condition.field in OF_SLIDE for condition in conditions):
        keep &= pc.is_in(places.table["slide_id"], slides).to_numpy(zero_copy_only=False)
    count = int(keep.sum())
    if 2 * count <= len(keep):
        return count, {"row_addr_allowlist": serialize_row_addrs(places.rows[keep].tolist())}
    return count, {"row_addr_blocklist": serialize_row_addrs(places.rows[~keep].tolist())}


Block = tuple[pa.Table, NDArray[np.float32], NDArray[np.float32]]
"""Places, vectors [n, dim] and the vectors' lengths [n]."""


def block_of(rows: pa.Table, found: NDArray[np.float32]) -> Block:
    """Returns places and vectors with the vectors' lengths; 1 for one of zeros."""
    lengths = np.linalg.norm(found, axis=1)
    return rows, found, np.where(lengths > 0, lengths, np.float32(1))


def best_of(
    block: Block,
    query: NDArray[np.float64],
    k: int,
    *,
    at: NDArray[np.int64] | None = None,
    rough: NDArray[np.float32] | None = None,
) -> pa.Table:
    """Returns the k rows most like the query, with their score.

    Args:
        block: Where to look.
        query: Of length 1 [dim].
        k: How many.
        at: Numbers of the rows that count; all by default.
        rough: Their scores in float32, where they are known [len(at)].
    """
    rows, found, lengths = block
    at = np.arange(len(found)) if at is None else at
    if len(at) > 4 * k:
        if rough is None:
            rough = (found[at] @ query.astype(np.float32)) / lengths[at]
        at = at[rough >= np.partition(rough, -k)[-k] - _CLOSE]
    exact = found[at].astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    scores = exact @ query / np.where(norms > 0, norms, 1)
    near = rows.select(PLACE).take(pa.array(at)).append_column("score", pa.array(scores))
    order = pc.sort_indices(near, sort_keys=[("score", "descending"), ("id", "ascending")])
    return near.take(order[:k])
