"""Approximate nearest neighbours: regions by the vector index, with conditions.

Lance is asked for as few columns as possible, and what stays in memory between queries is bounded;
docs/notes/performance.md has the measurements behind both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.filters import Filter, row_mask

MEMORY_BYTES = 256 << 20
"""Per-table memory budget for cached vectors and region locations; where they are larger, they are
read again for every query."""

_SCAN_BYTES = 4 << 20
"""Regions that meet the conditions are compared one by one where their vectors are no larger."""

_TARGET_ROWS = 2000
"""Rows meeting the conditions that the probed partitions should hold, about."""

_LISTED_SLIDES = 5000
"""Slides named to Lance one by one; of more, rows of other slides are dropped afterwards."""

_QUERIES_UNTIL_CACHED = 8
"""Queries of one snapshot from which on reading all regions' locations pays off."""

_CACHED_SELECTIONS = 16
"""Sets of conditions whose selection is kept in a snapshot."""

MIN_CANDIDATES = 32
"""Candidates of the index whose full vectors are compared, at least."""
_LOCATION_BYTES = 120
FLOAT32_ERROR = 1e-5
"""Bound on the error of float32 products of unit vectors, with room."""

LOCATION = ["id", "slide_id", "x0", "y0", "size0", "mpp"]
"""Columns that name and locate a result."""
FILTER_COLUMNS = ["patient_id", "tissue_fraction", "n_patches"]
"""Further columns that conditions may name."""


@dataclass(frozen=True, kw_only=True)
class SearchParams:
    """Effort of a search by vector index; docs/notes/performance.md has recall and cost.

    Attributes:
        nprobe: Partitions searched, at least; more where conditions leave few rows.
        refine: Candidates per result whose full vectors are compared; 32 candidates at least.
    """

    nprobe: int = 16
    refine: int = 2


DEFAULT_PARAMS = SearchParams()


def partitions_of(rows: int) -> int:
    """Return the number of partitions of a vector index over so many rows."""
    return max(16, min(4096, math.isqrt(rows) // 4))


class Block(NamedTuple):
    """Rows of a table in memory.

    Attributes:
        rows: Their locations, and columns of conditions where those were read.
        vectors: float32 [n, dim].
        norms: Lengths of the vectors [n]; 1 for a zero vector.
    """

    rows: pa.Table
    vectors: NDArray[np.float32]
    norms: NDArray[np.float32]


def make_block(rows: pa.Table, found: NDArray[np.float32]) -> Block:
    """Put rows and their vectors [n, dim] together."""
    norms = np.linalg.norm(found, axis=1)
    return Block(rows, found, np.where(norms > 0, norms, np.float32(1)))


def top_k(
    block: Block,
    query: NDArray[np.float64],
    k: int,
    *,
    at: NDArray[np.int64] | None = None,
    approximate: NDArray[np.float32] | None = None,
) -> pa.Table:
    """Return the k rows with the highest cosine similarity to a query.

    Args:
        block: The rows.
        query: Unit vector [dim].
        k: Results wanted.
        at: Indices of the rows that count; all by default.
        approximate: Their scores in float32, where they are known [len(at)].

    Returns:
        The columns of :data:`LOCATION` and score (float64), best first, ties by id.
    """
    at = np.arange(len(block.vectors)) if at is None else at
    if len(at) > 4 * k:
        if approximate is None:
            approximate = (block.vectors[at] @ query.astype(np.float32)) / block.norms[at]
        at = at[approximate >= np.partition(approximate, -k)[-k] - FLOAT32_ERROR]
    exact = block.vectors[at].astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    scores = exact @ query / np.where(norms > 0, norms, 1)
    near = block.rows.select(LOCATION).take(pa.array(at)).append_column("score", pa.array(scores))
    order = pc.sort_indices(near, sort_keys=[("score", "descending"), ("id", "ascending")])
    return near.take(order[:k])


def search_index(
    archive: Archive,
    table: str,
    queries: NDArray[np.float64],
    *,
    conditions: tuple[Filter, ...],
    k: int,
    slides: pa.Array,
    params: SearchParams,
) -> list[pa.Table]:
    """Find each query's nearest regions among the candidates of the vector index.

    The index ranks by quantised vectors; the candidates are ranked again by their full vectors.
    Where conditions leave few regions more partitions are searched, and where they leave very few
    all of those are compared.

    Args:
        archive: The archive.
        table: Its table of embeddings.
        queries: Unit vectors [n, dim].
        conditions: Conditions on regions and slides.
        k: Results wanted.
        slides: Ids of the slides that may be found, sorted.
        params: Number of partitions and candidates to search.

    Returns:
        A table for each query, see :func:`top_k`.
    """
    dataset = archive.dataset(table)
    locations = _locations(archive, table, wanted=bool(conditions))
    selection = _selection(archive, table, locations, conditions, slides)
    columns = ["vector", *(LOCATION if locations is None else ())]

    def located(rows: pa.Table) -> Block:
        own = rows.select(LOCATION) if locations is None else locations.of(rows["_rowid"])
        allowed = pc.is_in(own["slide_id"], slides).to_numpy(zero_copy_only=False)
        found: NDArray[np.float32] = vectors(rows["vector"])
        if not allowed.all():
            own, found = own.filter(pa.array(allowed)), found[allowed]
        return make_block(own, found)

    if selection.few:
        if not selection.block:
            rows = dataset.scanner(columns=columns, with_row_id=True, **selection.scan).to_table()
            selection.block.append(located(rows.combine_chunks()))
        return [top_k(selection.block[0], query, k) for query in queries]
    candidates = max(k * params.refine, MIN_CANDIDATES)
    enough = max(k, candidates // 2)
    while True:
        nearest = {
            "column": "vector",
            "q": queries.astype(np.float32)[0 if len(queries) == 1 else slice(None)],
            "k": candidates,
            "metric": "cosine",
            "minimum_nprobes": max(params.nprobe, selection.nprobe),
        }
        rows = dataset.scanner(
            columns=[*columns, "_distance"],
            nearest=nearest,
            with_row_id=True,
            prefilter="filter" in selection.scan,
            **selection.scan,
        ).to_table()
        parts = [rows]
        if len(queries) > 1:
            numbers = rows["query_index"].to_numpy()
            parts = [rows.filter(pa.array(numbers == number)) for number in range(len(queries))]
        best, short = [], False
        for part, query in zip(parts, queries, strict=True):
            block = located(part)
            # Rows of slides, and of slides not allowed, may have displaced regions.
            short |= part.num_rows == candidates and len(block.vectors) < enough
            best.append(top_k(block, query, k))
        if not short:
            return best
        candidates *= 4


@dataclass(frozen=True, kw_only=True)
class _Locations:
    """Locations and condition columns of all regions, in memory, by Lance's row id."""

    row_ids: NDArray[np.uint64]
    table: pa.Table

    def of(self, row_ids: pa.ChunkedArray) -> pa.Table:
        """Return the locations of rows; all null where a row is no region."""
        wanted = row_ids.to_numpy()
        if not len(self.row_ids):
            return self.table.select(LOCATION).take(pa.nulls(len(wanted), pa.int64()))
        at = np.searchsorted(self.row_ids, wanted)
        missing = self.row_ids[np.minimum(at, len(self.row_ids) - 1)] != wanted
        return self.table.select(LOCATION).take(pa.array(at, mask=missing))


def _locations(archive: Archive, table: str, *, wanted: bool) -> _Locations | None:
    """Return the locations of all regions, if wanted or once a snapshot was queried often.

    For Lance, reading the other columns of a row costs as much as finding it, and reading a column
    of conditions for every query costs more than that.
    """
    count = archive.cached(f"{table}/queries", lambda: [0])
    count[0] += 1
    dataset = archive.dataset(table)
    if not wanted and count[0] < _QUERIES_UNTIL_CACHED:
        return None
    if archive.cached(f"{table}/rows", dataset.count_rows) * _LOCATION_BYTES > MEMORY_BYTES:
        return None

    def read() -> _Locations:
        rows = dataset.to_table(
            columns=[*LOCATION, *FILTER_COLUMNS],
            filter=pc.field("kind") == "region",
            with_row_id=True,
        )
        rows = rows.sort_by("_rowid").combine_chunks()
        row_ids = rows["_rowid"].to_numpy()
        return _Locations(row_ids=row_ids, table=rows.drop_columns(["_rowid"]))

    return archive.cached(f"{table}/locations", read)


@dataclass(frozen=True, kw_only=True)
class _Selection:
    """Regions that meet a set of conditions.

    Attributes:
        nprobe: Partitions that hold about ``_TARGET_ROWS`` of them.
        scan: Arguments of a Lance scan that select them.
        few: Whether they are compared one by one rather than searched by the index.
        block: Their locations and vectors in that case, once they were read.
    """

    nprobe: int
    scan: dict[str, Any]
    few: bool
    block: list[Block]


def _selection(
    archive: Archive,
    table: str,
    locations: _Locations | None,
    conditions: tuple[Filter, ...],
    slides: pa.Array,
) -> _Selection:
    """Return the regions that meet conditions; those of the latest queries are cached."""
    dataset = archive.dataset(table)
    total = archive.cached(f"{table}/rows", dataset.count_rows)
    if not conditions and locations is not None:  # dropping rows of slides afterwards costs less
        return _Selection(nprobe=0, scan={}, few=False, block=[])
    known: dict[Any, _Selection] = archive.cached(f"{table}/selections", dict)
    key = (conditions, locations is None)
    if key not in known:
        if locations is None:
            where = pc.field("kind") == "region"
            for condition in conditions:
                if not condition.of_slide:
                    where &= condition.expression()
            if len(slides) <= _LISTED_SLIDES and any(c.of_slide for c in conditions):
                where &= pc.field("slide_id").isin(slides)
            count = dataset.count_rows(where) if conditions else total
            scan: dict[str, Any] = {"filter": where}
        else:
            count, scan = _row_list(locations, conditions, slides)
        nprobe = math.ceil(partitions_of(total) * min(1.0, _TARGET_ROWS / max(1, count)))
        if len(known) >= _CACHED_SELECTIONS:
            known.pop(next(iter(known)))
        width = dataset.schema.field("vector").type.list_size * 4
        few = count * width <= _SCAN_BYTES
        known[key] = _Selection(nprobe=nprobe, scan=scan, few=few, block=[])
    return known[key]


def _row_list(
    locations: _Locations, conditions: tuple[Filter, ...], slides: pa.Array
) -> tuple[int, dict[str, Any]]:
    """Return how many regions meet conditions, and a scan of them by row id."""
    from lance.dataset import serialize_row_addrs

    keep = row_mask(locations.table, conditions)
    if any(condition.of_slide for condition in conditions):
        keep &= pc.is_in(locations.table["slide_id"], slides).to_numpy(zero_copy_only=False)
    count = int(keep.sum())
    if 2 * count <= len(keep):
        row_ids = locations.row_ids[keep]
        return count, {"row_addr_allowlist": serialize_row_addrs(row_ids.tolist())}
    row_ids = locations.row_ids[~keep]
    return count, {"row_addr_blocklist": serialize_row_addrs(row_ids.tolist())}
