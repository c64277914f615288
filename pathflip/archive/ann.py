"""Approximate nearest neighbours: regions by the vector index, with conditions.

The index gives row ids and rough distances; of the nearest few that meet the conditions the vectors
are read, and those are compared. Lance is asked for nothing else: what names and locates a region
is in :mod:`pathflip.archive.places`. docs/notes/performance.md has the measurements behind this.
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
from pathflip.archive.filters import Filter
from pathflip.archive.places import LOCATION, Places

_SCAN_BYTES = 12 << 20
"""Regions that meet the conditions are compared one by one where their vectors are no larger."""

_TARGET_ROWS = 2000
"""Rows meeting the conditions that the probed partitions should hold, about."""

_MOST_CANDIDATES = 2048
"""Candidates of the index at most from which those that meet the conditions are picked. Where so
many would hold too few of them, Lance gets the list of rows that do, which it looks at for every
row of a partition: dearer than some hundred candidates."""

_LISTED_SLIDES = 5000
"""Slides named to Lance one by one; of more, rows of other slides are dropped afterwards."""

_QUERIES_UNTIL_READ = 8
"""Queries of one snapshot from which on reading the places of all regions pays off."""

_CACHED_SELECTIONS = 16
"""Sets of conditions whose selection is kept in a snapshot."""

MIN_CANDIDATES = 16
"""Candidates of the index whose full vectors are compared, at least."""
FLOAT32_ERROR = 1e-5
"""Bound on the error of float32 products of unit vectors, with room."""

Vectors = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SearchParams:
    """Effort of a search by vector index; docs/notes/performance.md has recall and cost.

    Attributes:
        nprobe: Partitions searched, at least; more where conditions leave few rows.
        refine: Candidates per result whose full vectors are compared; 16 candidates at least.
    """

    nprobe: int = 16
    refine: int = 2


DEFAULT_PARAMS = SearchParams()


def candidates_of(k: int, params: SearchParams) -> int:
    """Return how many candidates of the index are compared by their full vectors."""
    return max(k * params.refine, MIN_CANDIDATES)


def partitions_of(rows: int) -> int:
    """Return the number of partitions of a vector index over so many rows.

    About 2,048 rows each (docs/notes/performance.md compares), so that a query looks at as many
    rows of a large table as of a small one. Of more than 2,048 the right ones are dear to find.
    """
    return max(16, min(2048, rows // 2048))


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
        approximate: Their scores in float32, where they are many [len(at)].

    Returns:
        The columns of :data:`LOCATION` and score (float64), best first, ties by id.
    """
    if at is None:
        approximate = (block.vectors @ query.astype(np.float32)) / block.norms
        at = np.arange(len(block.vectors))
    if approximate is not None and len(at) > 4 * k:
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
    queries: Vectors,
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
    total: int = archive.cached(f"{table}/rows", dataset.count_rows, of=(table,))
    count = archive.cached(f"{table}/queries", lambda: [0], of=())  # of all states
    count[0] += 1
    if count[0] < _QUERIES_UNTIL_READ:
        return _search_unread(
            dataset, total, queries, conditions=conditions, k=k, slides=slides, params=params
        )
    places = archive.cached(f"{table}/places", lambda: Places(dataset), of=(table,))
    kept: dict[tuple[Filter, ...], _Selection] = archive.cached(
        f"{table}/selections", dict, of=(table, "slides")
    )
    selection = kept.get(conditions)
    if selection is None:
        selection = _Selection(dataset, places, places.meeting(conditions, slides))
        if len(kept) >= _CACHED_SELECTIONS:
            kept.pop(next(iter(kept)), None)
        kept[conditions] = selection
    if selection.few:
        return [top_k(selection.block(), query, k) for query in queries]
    wanted = candidates_of(k, params)
    asked = math.ceil(1.25 * wanted * total / selection.count)
    nprobe = max(params.nprobe, _probes(total, selection.count))
    listed = asked > max(_MOST_CANDIDATES, 2 * wanted)
    while True:
        found = _nearest(
            dataset, queries, wanted if listed else asked, nprobe=nprobe,
            scan=selection.scan() if listed else {},
        )  # fmt: skip
        near = []
        for part in found:
            at = places.find(part["_rowid"].to_numpy())
            near.append(at[selection.has(at)][:wanted])
        ended = [listed or part.num_rows < asked for part in found]
        if all(
            len(at) >= max(k, wanted // 2) or over for at, over in zip(near, ended, strict=True)
        ):
            break
        listed = True  # what the conditions leave lies farther away than the rest
    every = np.unique(np.concatenate(near))
    block = _compared(dataset, places, every)
    return [top_k(block, query, k, at=np.searchsorted(every, np.sort(at)))
            for at, query in zip(near, queries, strict=True)]  # fmt: skip


def _probes(total: int, count: int) -> int:
    """Return how many partitions hold about as many rows that meet conditions as are needed."""
    return math.ceil(partitions_of(total) * min(1.0, _TARGET_ROWS / max(1, count)))


def _nearest(
    dataset: Any,
    queries: Vectors,
    candidates: int,
    *,
    nprobe: int,
    scan: dict[str, Any],
    columns: tuple[str, ...] = (),
) -> list[pa.Table]:
    """Return the candidates of the index for each query, nearest first, with their row ids."""
    rows = dataset.scanner(
        columns=[*columns, "_distance"],
        nearest={
            "column": "vector",
            "q": queries.astype(np.float32)[0 if len(queries) == 1 else slice(None)],
            "k": candidates,
            "metric": "cosine",
            "minimum_nprobes": nprobe,
        },
        with_row_id=True,
        prefilter="filter" in scan,
        **scan,
    ).to_table()
    if len(queries) == 1:
        return [rows]
    numbers = rows["query_index"].to_numpy()
    return [rows.filter(pa.array(numbers == number)) for number in range(len(queries))]


def _compared(dataset: Any, places: Places, at: NDArray[np.int64]) -> Block:
    """Return regions with their vectors; in one read by row id, a third of a scan's cost."""
    rows = dataset._take_rows(places.row_ids[at].tolist(), columns=["vector"])
    return make_block(places.rows(at), vectors(rows["vector"]))


class _Selection:
    """Regions that meet a set of conditions.

    Args:
        dataset: The Lance dataset.
        places: Places of all of its regions.
        keep: Truth of each meeting the conditions [n].
    """

    def __init__(self, dataset: Any, places: Places, keep: NDArray[np.bool_]) -> None:
        self.count = int(keep.sum())
        width = dataset.schema.field("vector").type.list_size * 4
        self.few = self.count * width <= _SCAN_BYTES
        self._dataset, self._places = dataset, places
        self._regions = len(keep)
        self._bits = np.packbits(keep, bitorder="little")
        self._block: Block | None = None
        self._scan: dict[str, Any] | None = None

    def has(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which regions are of the selection; -1 is none."""
        held: NDArray[np.bool_] = (self._bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1 == 1
        return held & (at >= 0)

    def block(self) -> Block:
        """Return all of its regions with their vectors; they are kept."""
        if self._block is None:
            self._block = _compared(self._dataset, self._places, np.flatnonzero(self._mask()))
        return self._block

    def scan(self) -> dict[str, Any]:
        """Return the arguments of a Lance scan of its regions; they are kept."""
        from lance.dataset import serialize_row_addrs

        if self._scan is None:
            row_ids = self._places.row_ids[self._mask()]
            self._scan = {"row_addr_allowlist": serialize_row_addrs(row_ids.tolist())}
        return self._scan

    def _mask(self) -> NDArray[np.bool_]:
        return np.unpackbits(self._bits, count=self._regions, bitorder="little").astype(np.bool_)


def _search_unread(
    dataset: Any,
    total: int,
    queries: Vectors,
    *,
    conditions: tuple[Filter, ...],
    k: int,
    slides: pa.Array,
    params: SearchParams,
) -> list[pa.Table]:
    """Search as :func:`search_index` does before places are read: Lance evaluates the conditions.

    For the one search of a command that is faster than reading the places of all regions.
    """
    where = pc.field("kind") == "region"
    for condition in conditions:
        if not condition.of_slide:
            where &= condition.expression()
    if len(slides) <= _LISTED_SLIDES and any(c.of_slide for c in conditions):
        where &= pc.field("slide_id").isin(slides)
    columns = ("vector", *LOCATION)

    def located(rows: pa.Table) -> Block:
        allowed = pc.is_in(rows["slide_id"], slides)
        rows = rows.filter(allowed).combine_chunks()
        return make_block(rows.select(LOCATION), vectors(rows["vector"]))

    count = dataset.count_rows(where) if conditions else total
    if count * dataset.schema.field("vector").type.list_size * 4 <= _SCAN_BYTES:
        block = located(dataset.to_table(columns=list(columns), filter=where))
        return [top_k(block, query, k) for query in queries]
    candidates = candidates_of(k, params)
    enough = max(k, candidates // 2)
    nprobe = max(params.nprobe, _probes(total, count))
    while True:
        found = _nearest(
            dataset, queries, candidates, nprobe=nprobe, scan={"filter": where}, columns=columns
        )
        blocks = [located(part) for part in found]
        # Rows of slides that are not allowed may have displaced regions.
        if not any(
            part.num_rows == candidates and len(block.vectors) < enough
            for part, block in zip(found, blocks, strict=True)
        ):
            return [top_k(block, query, k) for block, query in zip(blocks, queries, strict=True)]
        candidates *= 4
