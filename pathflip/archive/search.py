"""Search by vector over the embeddings of slides and regions, with structured filters.

A table without a vector index (see :mod:`pathflip.archive.indexes`), and all slides of any table,
are compared one by one: exact, from memory where they fit. With an index, its candidates are
compared. Scores are cosine similarities computed here in float64 from the stored vectors whichever
way the candidates were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from pathflip.archive import Archive, ann, vectors
from pathflip.archive.ann import (
    EFFORT,
    FILTERED,
    PLACE,
    Block,
    Effort,
    approximate,
    best_of,
    block_of,
)
from pathflip.archive.filters import OF_SLIDE, Filter, meeting
from pathflip.archive.indexes import indexed_columns
from pathflip.archive.storage import guarded
from pathflip.errors import ArchiveError, ConfigError

Level = Literal["region", "slide"]

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
            found = approximate(
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
    # Of these two columns, only the slide's may have an index.
    where = (pc.field("slide_id") == (row_id.rpartition("/")[0] or row_id)) & (
        pc.field("id") == row_id
    )
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
            part = best_of(block, query, k, at=at, rough=rough[:, number])
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


def _blocks(archive: Archive, table: str, level: Level) -> Iterator[Block]:
    """Yields the rows of a level; their places carry the columns conditions are about."""
    dataset = archive.dataset(table)
    where = pc.field("kind") == level
    width = dataset.schema.field("vector").type.list_size * 4
    size = archive.cached(f"{table}/{level}/bytes", lambda: dataset.count_rows(where) * width)
    columns = [*PLACE, *FILTERED, "vector"]

    def read(rows: pa.Table) -> Block:
        return block_of(rows.drop_columns(["vector"]), vectors(rows["vector"]))

    if size == 0:
        return
    if size <= ann.MEMORY_BYTES:
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
