"""Search by vector over the embeddings of slides and regions, with structured filters.

Slides, and regions of a table without a vector index (:mod:`pathflip.archive.indexes`), are found
by an exact scan, from memory where the vectors fit. With an index, only its candidates are compared
(:mod:`pathflip.archive.ann`). Scores are cosine similarities in float64 from the stored vectors
either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from pathflip.archive import Archive, places, vectors
from pathflip.archive.ann import (
    DEFAULT_PARAMS,
    Block,
    SearchParams,
    make_block,
    search_index,
    top_k,
)
from pathflip.archive.filters import LABEL, SLIDE_FIELDS, Filter, row_mask
from pathflip.archive.indexes import indexed_columns
from pathflip.archive.places import FILTER_COLUMNS, LOCATION
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
    params: SearchParams = DEFAULT_PARAMS,
) -> pa.Table:
    """Find the regions or slides whose embeddings have the highest cosine similarity to a vector.

    :func:`pathflip.search.run_query` also takes a slide, a region or a text.

    Args:
        archive: The archive; only ready slides are found.
        vector: Query embedding [dim], not zero.
        encoder: Patch encoder that made it, may be left out when the archive holds one; or a slide
            encoder whose vectors were imported.
        model: Trained model that made it, instead.
        fingerprint: The model's, compared with that of the stored embeddings.
        level: ``region`` or ``slide``.
        k: Results wanted, 1 to 10,000.
        filters: Conditions that all have to hold.
        exclude_slide: Id of a slide to leave out.
        exclude_patient: Patient to leave out; slides without a patient stay.
        params: Effort of a search by vector index.

    Returns:
        Columns rank (from 1), score (cosine similarity, descending; ties by id), slide_id,
        region_id (null for slides), x0, y0, size0 (level-0 px), mpp (µm per level-0 px).

    Raises:
        ArchiveError: The query's dimension is not the encoder's (``wrong_encoder``), its model is
            another one (``wrong_model``) or has no embeddings here (``not_indexed``).
        ConfigError: The query is zero or not finite, or ``level`` or ``k`` is out of range.
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
        params=params,
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
    params: SearchParams = DEFAULT_PARAMS,
) -> list[pa.Table]:
    """Search for several queries [n, dim] at once, at about half the cost each.

    Returns:
        A table for each query, see :func:`search`.
    """
    space = vector_space(archive, encoder=encoder, model=model, fingerprint=fingerprint)
    unit = normalised(archive, space, queries)
    if level == "region":
        patch_encoder(space, of="regions")
    if level not in ("region", "slide") or not 1 <= k <= 10_000:
        raise ConfigError(f"Cannot search level {level!r} for {k} results.")
    conditions = all_conditions(filters, exclude_slide, exclude_patient)
    slides = allowed_slides(archive, space.encoder, conditions)
    with guarded(archive.uri, f"search the table {space.table}", damaged=True):
        dataset = archive.dataset(space.table)
        indexed = archive.cached(
            f"{space.table}/indexes", lambda: indexed_columns(dataset), of=(space.table,)
        )
        if level == "region" and "vector" in indexed:
            found = search_index(
                archive, space.table, unit, conditions=conditions, k=k, slides=slides,
                params=params,
            )  # fmt: skip
        else:
            found = _scan(
                archive, space.table, unit, level=level, conditions=conditions, k=k, slides=slides
            )
        return [_result(rows, level) for rows in found]


@dataclass(frozen=True, kw_only=True)
class VectorSpace:
    """Embeddings that can be compared with each other: those of one encoder or one model.

    Attributes:
        table: Table of embeddings.
        dim: Dimension of the vectors.
        encoder: Patch encoder of the features they were made from; None of imported vectors, which
            are of slides alone.
        name: The encoder or model, for messages.
        code: Error code for a query vector of another dimension.
    """

    table: str
    dim: int
    encoder: str | None
    name: str
    code: str


def patch_encoder(space: VectorSpace, *, of: str) -> str:
    """Return the patch encoder of embeddings that are to be searched below the slide.

    Args:
        space: The embeddings.
        of: Name of what is searched, for the message.

    Raises:
        ConfigError: They are of slides alone (``no_regions``).
    """
    if space.encoder is None:
        raise ConfigError(
            f"The vectors of {space.name} are of slides, not of {of}.",
            hint="Search for slides: --level slide.",
            code="no_regions",
        )
    return space.encoder


def vector_space(
    archive: Archive,
    *,
    encoder: str | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
) -> VectorSpace:
    """Return the embeddings of a patch encoder, a slide encoder, or a trained model.

    Raises:
        ArchiveError: There are none (``unknown_encoder``, ``not_indexed``), or they are of a model
            with another fingerprint (``wrong_model``).
    """
    imported = archive.slide_encoders()
    if model is None and fingerprint is None and encoder in imported:
        entry = imported[str(encoder)]
        return VectorSpace(
            table=entry["embeddings_table"],
            dim=entry["dim"],
            encoder=None,
            name=f"slide encoder {encoder} ({entry['revision']})",
            code="wrong_encoder",
        )
    if model is None and fingerprint is None:
        name, entry = archive.encoder(encoder)
        return VectorSpace(
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
    return VectorSpace(
        table=entry["embeddings_table"],
        dim=entry["dim"],
        encoder=entry["encoder"],
        name=f"model {name} ({entry['fingerprint'][:12]})",
        code="wrong_model",
    )


def stored_vector(
    archive: Archive, name: str, *, encoder: str | None = None, model: str | None = None
) -> NDArray[np.float32]:
    """Return the embedding [dim] of a ready slide or region, to search with.

    Args:
        archive: The archive.
        name: A region's id, or a slide's id or unique file name.
        encoder: Patch encoder, may be left out when the archive holds one; or a slide encoder.
        model: Trained model, instead.

    Raises:
        ArchiveError: There is no such slide or region, or it is not ready (``unknown_slide``), or
            it has no embedding (``not_indexed``).
    """
    space = vector_space(archive, encoder=encoder, model=model)
    slide, slash, _ = name.rpartition("/")
    row_id = name if slash and slide in archive.ledger() else archive.resolve(name)
    # Of these two columns, only the slide's may have an index.
    where = (pc.field("slide_id") == (row_id.rpartition("/")[0] or row_id)) & (
        pc.field("id") == row_id
    )
    with guarded(archive.uri, "read the embeddings", damaged=True):
        rows = archive.dataset(space.table).to_table(columns=["slide_id", "vector"], filter=where)
    if rows.num_rows == 0 or rows["slide_id"][0].as_py() not in archive.ready_ids(space.encoder):
        slide = row_id.rpartition("/")[0] or row_id
        there = slide in archive.ready_ids() and (
            slide == row_id or row_id in archive.regions(slide)["region_id"].to_pylist()
        )
        hint = "See: pathflip slides list"
        if space.encoder is None:
            hint = "Import its vector: pathflip archive import --slide-features PATH"
        elif model is not None:
            hint = f"Run: pathflip index --archive {archive.uri} --run RUN"
        raise ArchiveError(
            f"The archive {archive.uri} has no embedding of {row_id} by {space.name}.",
            hint=hint,
            code="not_indexed" if there else "unknown_slide",
        )
    vector: NDArray[np.float32] = vectors(rows["vector"])[0]
    return vector


_FILTERED = ("slide_id", *SLIDE_FIELDS, "labels")
_KEPT_ANSWERS = 16
"""Sets of conditions on slides whose answer is kept in a snapshot."""


def allowed_slides(archive: Archive, encoder: str | None, conditions: Sequence[Filter]) -> pa.Array:
    """Return the ids of ready slides that meet the conditions on slides, sorted.

    Args:
        archive: The archive.
        encoder: Only slides with features of this patch encoder; None for all.
        conditions: The conditions; those on regions do not count here.
    """
    ready: pa.Array = archive.cached(
        f"ready/{encoder}",
        lambda: pa.array(sorted(archive.ready_ids(encoder)), pa.string()),
        of=("slides",),
    )
    asked = tuple(condition for condition in conditions if condition.of_slide)
    if not asked:
        return ready
    known: dict[tuple[Filter, ...], pa.Array] = archive.cached(
        f"ready/{encoder}/of", dict, of=("slides",)
    )
    if asked not in known:
        found = _meeting(archive, ready, asked)
        if len(known) >= _KEPT_ANSWERS:
            known.pop(next(iter(known)), None)
        known[asked] = found
        return found
    return known[asked]


def _meeting(archive: Archive, ready: pa.Array, conditions: Sequence[Filter]) -> pa.Array:
    rows = archive.cached(
        "slides/filtered", lambda: archive.slides(columns=_FILTERED), of=("slides",)
    )
    names = {one.field for one in conditions if one.field.startswith(LABEL)}
    labels = []
    if names:
        labels = archive.cached("slides/labels", lambda: _labels(rows), of=("slides",))
    for name in names:
        own = [held.get(name.removeprefix(LABEL)) for held in labels]
        if not any(own):
            known = sorted({label for held in labels for label in held})
            raise ConfigError(
                f"No slide of {archive.uri} has the label {name.removeprefix(LABEL)!r}.",
                hint=f"Its labels are: {', '.join(known) or 'none'}.",
                code="unknown_label",
            )
        rows = rows.append_column(name, pa.array(own, pa.string()))
    for condition in conditions:
        rows = rows.filter(condition.expression())
    return ready.filter(pc.is_in(ready, rows["slide_id"].combine_chunks()))


def _labels(rows: pa.Table) -> list[dict[str, str]]:
    return [json.loads(text or "{}") for text in rows["labels"].to_pylist()]


def normalised(archive: Archive, space: VectorSpace, queries: ArrayLike) -> NDArray[np.float64]:
    """Return the queries as unit vectors [n, dim]."""
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


def all_conditions(
    filters: Sequence[Filter], exclude_slide: str | None, exclude_patient: str | None
) -> tuple[Filter, ...]:
    """Return filters and exclusions as one list of conditions."""
    conditions = list(filters)
    if exclude_slide is not None:
        conditions.append(Filter(field="slide_id", op="!=", value=exclude_slide))
    if exclude_patient is not None:
        conditions.append(Filter(field="patient_id", op="!=", value=exclude_patient))
    return tuple(conditions)


def _scan(
    archive: Archive,
    table: str,
    queries: NDArray[np.float64],
    *,
    level: Level,
    conditions: Sequence[Filter],
    k: int,
    slides: pa.Array,
) -> list[pa.Table]:
    """Return each query's best among all rows of a level."""
    best: list[pa.Table | None] = [None] * len(queries)
    for block in _blocks(archive, table, level):
        keep = row_mask(block.rows, conditions)
        keep &= pc.is_in(block.rows["slide_id"], slides).to_numpy(zero_copy_only=False)
        at = np.flatnonzero(keep)
        if not len(at):
            continue
        scores = (block.vectors @ queries.astype(np.float32).T / block.norms[:, None])[at]
        for number, query in enumerate(queries):
            part = top_k(block, query, k, at=at, approximate=scores[:, number])
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
    """Yield the rows of a level with the columns that conditions may name."""
    dataset = archive.dataset(table)
    where = pc.field("kind") == level
    width = dataset.schema.field("vector").type.list_size * 4
    size = archive.cached(
        f"{table}/{level}/bytes", lambda: dataset.count_rows(where) * width, of=(table,)
    )
    columns = [*LOCATION, *FILTER_COLUMNS, "vector"]

    def read(rows: pa.Table) -> Block:
        return make_block(rows.drop_columns(["vector"]), vectors(rows["vector"]))

    if size == 0:
        return
    if size <= places.MEMORY_BYTES:
        yield archive.cached(
            f"{table}/{level}",
            lambda: read(dataset.to_table(columns=columns, filter=where).combine_chunks()),
            of=(table,),
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
