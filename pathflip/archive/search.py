"""Search by vector over the embeddings of slides and regions, with structured filters.

A table without a vector index (see :mod:`pathflip.archive.indexes`), and all slides of any table,
are compared one by one: exact, from memory where they fit. With an index, its candidates are
compared. Scores are cosine similarities computed here in float64 from the stored vectors whichever
way the candidates were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.filters import OF_SLIDE, Filter
from pathflip.archive.indexes import indexed_columns, partitions_of
from pathflip.archive.storage import guarded
from pathflip.errors import ArchiveError, ConfigError

Level = Literal["region", "slide"]

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

_PLACE_BYTES = 120
_PLACE = ["id", "slide_id", "x0", "y0", "size0", "mpp"]
_FILTERED = ["patient_id", "tissue_fraction", "n_patches"]
_CLOSE = 1e-5  # float32 products of unit vectors are this near the true ones, with room
RESULT = pa.schema(
    [
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("slide_id", pa.string()),
        ("region_id", pa.string()),
        ("x0", pa.int64()),
        ("y0", pa.int64()),
        ("size0", pa.int32()),
        ("mpp", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard a vector index is searched; docs/performance.md has what each costs and finds.

    Args:
        probes: Partitions looked into at least; more where a filter leaves too few rows.
        refine: Candidates per result whose vectors are read and compared exactly.
    """

    probes: int = 16
    refine: int = 4


EFFORT = Effort()


def search(
    archive: Archive,
    vector: ArrayLike,
    *,
    encoder: str | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
    level: Level = "region",
    k: int = 10,
    filters: Sequence[Filter] = (),
    exclude_slide: str | None = None,
    exclude_patient: str | None = None,
    effort: Effort = EFFORT,
) -> pa.Table:
    """Finds the regions or slides whose embeddings point most nearly the same way.

    Args:
        archive: Where to search; only ready slides are found.
        vector: The query [dim], any length but zero.
        encoder: The encoder the query comes from; may be left out when the archive holds one.
        model: The trained model the query comes from, instead.
        fingerprint: The model's, to be compared with that of the stored vectors.
        level: ``region`` or ``slide``.
        k: Results wanted, 1 to 10,000.
        filters: Conditions that all have to hold.
        exclude_slide: Id of a slide to leave out.
        exclude_patient: Patient to leave out; slides without a patient stay.
        effort: How hard the index is searched.

    Returns:
        Columns rank (from 1), score (cosine similarity, falling; ties by id), slide_id, region_id
        (null for slides), x0, y0, size0 (level-0 px), mpp (µm per level-0 px).

    Raises:
        ArchiveError: If the query's size is not the encoder's (``wrong_encoder``), its model is
            another one (``wrong_model``) or has no vectors here (``not_indexed``).
        ConfigError: If the query is zero or not finite, or ``level`` or ``k`` is out of range.
    """
    return search_many(
        archive,
        np.asarray(vector, dtype=np.float64).reshape(1, -1),
        encoder=encoder,
        model=model,
        fingerprint=fingerprint,
        level=level,
        k=k,
        filters=filters,
        exclude_slide=exclude_slide,
        exclude_patient=exclude_patient,
        effort=effort,
    )[0]


def search_many(
    archive: Archive,
    queries: ArrayLike,
    *,
    encoder: str | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
    level: Level = "region",
    k: int = 10,
    filters: Sequence[Filter] = (),
    exclude_slide: str | None = None,
    exclude_patient: str | None = None,
    effort: Effort = EFFORT,
) -> list[pa.Table]:
    """Searches for several queries [n, dim] at once, at about half the cost each.

    Returns:
        What :func:`search` returns, for each.
    """
    space = space_of(archive, encoder=encoder, model=model, fingerprint=fingerprint)
    unit = _checked(archive, space, queries)
    if level not in ("region", "slide") or not 1 <= k <= 10_000:
        raise ConfigError(f"Cannot search level {level!r} for {k} results.")
    conditions = conditions_of(filters, exclude_slide, exclude_patient)
    slides = allowed_slides(archive, space.encoder, filters)
    with guarded(archive.uri, f"search the table {space.table}", damaged=True):
        dataset = archive.dataset(space.table)
        indexed = archive.cached(f"{space.table}/indexes", lambda: indexed_columns(dataset))
        if level == "region" and "vector" in indexed:
            found = _approximate(
                archive, space.table, unit, conditions=conditions, k=k, slides=slides,
                effort=effort,
            )  # fmt: skip
        else:
            found = _exact(
                archive, space.table, unit, level=level, conditions=conditions, k=k, slides=slides
            )
        return [_result(rows, level) for rows in found]


@dataclass(frozen=True, kw_only=True)
class Space:
    """A set of vectors that can be compared with each other.

    Attributes:
        table: Where they are.
        dim: Their size.
        encoder: The patch encoder they rest on.
        name: What made them, for messages.
        code: Error code for a query from elsewhere.
    """

    table: str
    dim: int
    encoder: str
    name: str
    code: str


def space_of(
    archive: Archive,
    *,
    encoder: str | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
) -> Space:
    """Returns the vectors of an encoder or of a trained model.

    Raises:
        ArchiveError: If there are none (``unknown_encoder``, ``not_indexed``), or they are of a
            model with another fingerprint (``wrong_model``).
    """
    if model is None and fingerprint is None:
        name, entry = archive.encoder(encoder)
        return Space(
            table=entry["embeddings_table"],
            dim=entry["dim"],
            encoder=name,
            name=f"encoder {name} ({entry['revision']})",
            code="wrong_encoder",
        )
    name, entry = archive.model(model)
    if fingerprint is not None and fingerprint != entry["fingerprint"]:
        raise ArchiveError(
            f"The query is of model {fingerprint[:12]}; the vectors {name} of {archive.uri} are "
            f"of model {entry['fingerprint'][:12]}.",
            hint="Search with the run they were made with, or run pathflip index with this one.",
            code="wrong_model",
        )
    return Space(
        table=entry["embeddings_table"],
        dim=entry["dim"],
        encoder=entry["encoder"],
        name=f"model {name} ({entry['fingerprint'][:12]})",
        code="wrong_model",
    )


def stored_vector(
    archive: Archive, name: str, *, encoder: str | None = None, model: str | None = None
) -> NDArray[np.float32]:
    """Returns the embedding [dim] of a ready slide or region, to search with.

    Args:
        archive: The archive.
        name: A region id, or a slide's id or unique file name.
        encoder: The encoder; may be left out when the archive holds one.
        model: A trained model, instead.

    Raises:
        ArchiveError: If it is not there.
    """
    space = space_of(archive, encoder=encoder, model=model)
    slide, slash, _ = name.rpartition("/")
    row_id = name if slash and slide in archive.ledger() else archive.resolve(name)
    where = pc.field("id") == row_id
    with guarded(archive.uri, "read the embeddings", damaged=True):
        rows = archive.dataset(space.table).to_table(columns=["slide_id", "vector"], filter=where)
    if rows.num_rows == 0 or rows["slide_id"][0].as_py() not in archive.ready_ids(space.encoder):
        raise ArchiveError(
            f"The archive {archive.uri} has no embedding of {row_id} by {space.name}.",
            hint="See: pathflip slides list"
            if model is None
            else f"Run: pathflip index --archive {archive.uri} --run RUN",
            code="unknown_slide",
        )
    vector: NDArray[np.float32] = vectors(rows["vector"])[0]
    return vector


def allowed_slides(archive: Archive, encoder: str, filters: Sequence[Filter]) -> pa.Array:
    """Returns the ids of ready slides that meet the conditions on slides, sorted."""
    ready = archive.cached(
        f"ready/{encoder}", lambda: pa.array(sorted(archive.ready_ids(encoder)), pa.string())
    )
    conditions = [condition for condition in filters if condition.field in OF_SLIDE]
    if not conditions:
        return ready
    rows = archive.slides(columns=["slide_id", *OF_SLIDE])
    for condition in conditions:
        rows = rows.filter(condition.expression())
    return ready.filter(pc.is_in(ready, rows["slide_id"].combine_chunks()))


def _checked(archive: Archive, space: Space, queries: ArrayLike) -> NDArray[np.float64]:
    """Returns the queries [n, dim] scaled to length 1."""
    values = np.asarray(queries, dtype=np.float64)
    values = values.reshape(-1, values.shape[-1])
    if values.shape[1] != space.dim:
        raise ArchiveError(
            f"The query has {values.shape[1]} values; {space.name} of {archive.uri} has "
            f"{space.dim}.",
            hint="Embed the query with what made the vectors of the archive.",
            code=space.code,
        )
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise ConfigError("The query vector is zero or not finite.")
    unit: NDArray[np.float64] = values / norms
    return unit


def conditions_of(
    filters: Sequence[Filter], exclude_slide: str | None, exclude_patient: str | None
) -> tuple[Filter, ...]:
    """Returns filters and exclusions as conditions."""
    conditions = list(filters)
    if exclude_slide is not None:
        conditions.append(Filter(field="slide_id", op="!=", value=exclude_slide))
    if exclude_patient is not None:
        conditions.append(Filter(field="patient_id", op="!=", value=exclude_patient))
    return tuple(conditions)


def meeting(rows: pa.Table, conditions: Sequence[Filter]) -> NDArray[np.bool_]:
    """Returns which rows of embeddings meet the conditions on them, not those on slides."""
    keep = np.ones(rows.num_rows, np.bool_)
    for condition in conditions:
        if condition.field not in OF_SLIDE:
            keep &= condition.mask(rows[condition.field])
    return keep


# ---- with a vector index --------------------------------------------------------------------


def _approximate(
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
    columns = ["vector", *(_PLACE if places is None else ())]

    def placed(rows: pa.Table) -> _Block:
        own = rows.select(_PLACE) if places is None else places.of(rows["_rowid"])
        meant = pc.is_in(own["slide_id"], slides).to_numpy(zero_copy_only=False)
        found: NDArray[np.float32] = vectors(rows["vector"])
        if not meant.all():
            own, found = own.filter(pa.array(meant)), found[meant]
        return _block(own, found)

    if chosen.few:
        if not chosen.kept:
            rows = dataset.scanner(columns=columns, with_row_id=True, **chosen.scan).to_table()
            chosen.kept.append(placed(rows.combine_chunks()))
        return [_best(chosen.kept[0], query, k) for query in queries]
    enough = k * max(1, effort.refine // 2)
    asked = k * effort.refine
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
            best.append(_best(block, query, k))
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
            return self.table.select(_PLACE).take(pa.nulls(len(wanted), pa.int64()))
        at = np.searchsorted(self.rows, wanted)
        lost = self.rows[np.minimum(at, len(self.rows) - 1)] != wanted
        return self.table.select(_PLACE).take(pa.array(at, mask=lost))


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
            columns=[*_PLACE, *_FILTERED], filter=pc.field("kind") == "region", with_row_id=True
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
    kept: list[_Block]


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


_Block = tuple[pa.Table, NDArray[np.float32], NDArray[np.float32]]
"""Places, vectors [n, dim] and the vectors' lengths [n]."""


def _block(rows: pa.Table, found: NDArray[np.float32]) -> _Block:
    lengths = np.linalg.norm(found, axis=1)
    return rows, found, np.where(lengths > 0, lengths, np.float32(1))


def _best(
    block: _Block,
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
    near = rows.select(_PLACE).take(pa.array(at)).append_column("score", pa.array(scores))
    order = pc.sort_indices(near, sort_keys=[("score", "descending"), ("id", "ascending")])
    return near.take(order[:k])


# ---- one by one -----------------------------------------------------------------------------


def _exact(
    archive: Archive,
    table: str,
    queries: NDArray[np.float64],
    *,
    level: Level,
    conditions: Sequence[Filter],
    k: int,
    slides: pa.Array,
) -> list[pa.Table]:
    """Returns each query's best among all rows of a level."""
    best: list[pa.Table | None] = [None] * len(queries)
    for block in _blocks(archive, table, level):
        rows, found, lengths = block
        keep = meeting(rows, conditions)
        keep &= pc.is_in(rows["slide_id"], slides).to_numpy(zero_copy_only=False)
        at = np.flatnonzero(keep)
        if not len(at):
            continue
        rough = (found @ queries.astype(np.float32).T / lengths[:, None])[at]
        for number, query in enumerate(queries):
            part = _best(block, query, k, at=at, rough=rough[:, number])
            before = best[number]
            if before is not None:
                both = pa.concat_tables([before, part])
                order = pc.sort_indices(
                    both, sort_keys=[("score", "descending"), ("id", "ascending")]
                )
                part = both.take(order[:k])
            best[number] = part
    empty = pa.schema([RESULT.field("slide_id").with_name("id"), *list(RESULT)[1:]]).empty_table()
    return [empty if part is None else part for part in best]


def _blocks(archive: Archive, table: str, level: Level) -> Iterator[_Block]:
    """Yields the rows of a level; their places carry the columns conditions are about."""
    dataset = archive.dataset(table)
    where = pc.field("kind") == level
    width = dataset.schema.field("vector").type.list_size * 4
    size = archive.cached(f"{table}/{level}/bytes", lambda: dataset.count_rows(where) * width)
    columns = [*_PLACE, *_FILTERED, "vector"]

    def read(rows: pa.Table) -> _Block:
        return _block(rows.drop_columns(["vector"]), vectors(rows["vector"]))

    if size == 0:
        return
    if size <= MEMORY_BYTES:
        yield archive.cached(
            f"{table}/{level}",
            lambda: read(dataset.to_table(columns=columns, filter=where).combine_chunks()),
        )
        return
    for batch in dataset.to_batches(columns=columns, filter=where, batch_size=8192):
        if batch.num_rows:
            yield read(pa.Table.from_batches([batch]))


def _result(best: pa.Table, level: str) -> pa.Table:
    count = best.num_rows
    ids = best["id"] if level == "region" else pa.nulls(count, pa.string())
    columns = {"rank": pa.array(range(1, count + 1), pa.int32()), "region_id": ids}
    return pa.table(
        [
            columns.get(name, best[name] if name in best.column_names else None)
            for name in RESULT.names
        ],
        schema=RESULT,
    )
