"""Search by vector over the embeddings of slides and regions, with structured filters.

Scores are cosine similarities computed here in float64 from the stored vectors, whichever way the
candidates were found: without a vector index by a scan that holds one batch at a time, with one
(see :func:`pathflip.archive.health.maintain`) among the index's candidates. Filters are values in
an expression tree; no text of a user ever becomes part of a query string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.schema import embeddings_schema
from pathflip.archive.storage import guarded
from pathflip.errors import ArchiveError, ConfigError

FIELDS: dict[str, type] = {
    "slide_id": str,
    "patient_id": str,
    "x0": int,
    "y0": int,
    "size0": int,
    "mpp": float,
    "tissue_fraction": float,
    "n_patches": int,
    "split": str,
    "vendor": str,
}
"""Columns a filter may name, with their types; split and vendor are the slide's."""

_OF_SLIDE = ("split", "vendor")
_STORED = embeddings_schema(1)
_OPS = ("!=", "<=", ">=", "=", "<", ">")
_WORDS = {str: "text", int: "whole number", float: "number"}
_MAX_VALUE = 1000
_SHAPE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,40})\s*(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_RESULT = pa.schema(
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
class Filter:
    """One condition on a column; several are joined by "and".

    Args:
        field: One of :data:`FIELDS`.
        op: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``; text knows the first two only. ``!=`` also
            keeps rows that have no value.
        value: Text, or a finite number; a whole one for columns that hold such.

    Raises:
        ConfigError: If field, operator or value is not one of those.
    """

    field: str
    op: str
    value: str | int | float

    def __post_init__(self) -> None:
        kind = FIELDS.get(self.field)
        if kind is None:
            raise ConfigError(
                f"Filters know no column {self.field[:40]!r}.", hint=f"One of: {', '.join(FIELDS)}."
            )
        if self.op not in (_OPS if kind is not str else ("=", "!=")):
            raise ConfigError(f"Column {self.field} cannot be filtered with {self.op[:10]!r}.")
        if isinstance(self.value, bool) or not isinstance(
            self.value, str if kind is str else (int, float)
        ):
            raise ConfigError(f"Column {self.field} needs a {_WORDS[kind]}.")
        if isinstance(self.value, str):
            if len(self.value) > _MAX_VALUE or "\0" in self.value:
                raise ConfigError(f"The filter value for {self.field} is too long or not text.")
            try:
                self.value.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"The filter value for {self.field} is not text.") from error
        elif not math.isfinite(self.value) or (kind is int and self.value != int(self.value)):
            raise ConfigError(f"Column {self.field} needs a {_WORDS[kind]}.")
        try:
            self._scalar()
        except (pa.ArrowInvalid, OverflowError) as error:
            raise ConfigError(f"The filter value for {self.field} is out of range.") from error

    def _scalar(self) -> pa.Scalar:
        # Lance compares like with like only: the literal takes the column's type.
        if isinstance(self.value, str):
            return pa.scalar(self.value, pa.string())
        kind = FIELDS[self.field]
        return pa.scalar(kind(self.value), _STORED.field(self.field).type)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Reads a filter from text such as ``patient_id=P1`` or ``mpp<=0.3``.

        Raises:
            ConfigError: If the text is anything else.
        """
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{text[:60]!r} is not a filter.", hint="Write COLUMN OP VALUE, as in mpp<=0.3."
            )
        name, op, raw = match[1], match[2], match[3].strip()
        kind = FIELDS.get(name, str)
        if kind is str:
            return cls(field=name, op=op, value=raw)
        try:
            number = float(raw) if len(raw) <= 40 else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{raw[:40]!r} is not a number, which column {name} needs.")
        return cls(field=name, op=op, value=number)

    def expression(self) -> pc.Expression:
        """Returns the filter as an Arrow expression on its column."""
        column, value = pc.field(self.field), self._scalar()
        if self.op == "!=":
            return (column != value) | column.is_null()
        compare = {
            "=": column == value,
            "<": column < value,
            "<=": column <= value,
            ">": column > value,
            ">=": column >= value,
        }
        return compare[self.op]


def search(
    archive: Archive,
    vector: ArrayLike,
    *,
    encoder: str | None = None,
    level: Literal["region", "slide"] = "region",
    k: int = 10,
    filters: Sequence[Filter] = (),
    exclude_slide: str | None = None,
    exclude_patient: str | None = None,
) -> pa.Table:
    """Finds the regions or slides whose embeddings point most nearly the same way.

    Args:
        archive: Where to search; only ready slides are found.
        vector: The query [dim], any length but zero.
        encoder: The encoder the query comes from; may be left out when the archive holds one.
        level: ``region`` or ``slide``.
        k: Results wanted, 1 to 10,000.
        filters: Conditions that all have to hold.
        exclude_slide: Id of a slide to leave out.
        exclude_patient: Patient to leave out; slides without a patient stay.

    Returns:
        Columns rank (from 1), score (cosine similarity, falling; ties by id), slide_id, region_id
        (null for slides), x0, y0, size0 (level-0 px), mpp (µm per level-0 px).

    Raises:
        ArchiveError: If the query's size is not the encoder's (``wrong_encoder``).
        ConfigError: If the query is zero or not finite, or ``level`` or ``k`` is out of range.
    """
    name, entry = archive.encoder(encoder)
    query = np.asarray(vector, dtype=np.float64).ravel()
    if query.size != entry["dim"]:
        raise ArchiveError(
            f"The query has {query.size} values; encoder {name} ({entry['revision']}) of "
            f"{archive.uri} has {entry['dim']}.",
            hint="Embed the query with the encoder that made the archive.",
            code="wrong_encoder",
        )
    norm = float(np.linalg.norm(query))
    if not math.isfinite(norm) or norm == 0:
        raise ConfigError("The query vector is zero or not finite.")
    if level not in ("region", "slide") or not 1 <= k <= 10_000:
        raise ConfigError(f"Cannot search level {level!r} for {k} results.")
    query /= norm
    where = pc.field("kind") == level
    for condition in filters:
        if condition.field not in _OF_SLIDE:
            where &= condition.expression()
    if exclude_slide is not None:
        where &= Filter(field="slide_id", op="!=", value=exclude_slide).expression()
    if exclude_patient is not None:
        where &= Filter(field="patient_id", op="!=", value=exclude_patient).expression()
    table = entry["embeddings_table"]
    slides = _slides(archive, name, [f for f in filters if f.field in _OF_SLIDE])
    best: pa.Table | None = None
    with guarded(archive.uri, f"search the table {table}", damaged=True):
        for rows in _candidates(archive.dataset(table), query, where, k):
            rows = rows.filter(pc.is_in(rows["slide_id"], slides))
            found = vectors(rows["vector"]).astype(np.float64)
            lengths = np.linalg.norm(found, axis=1)
            scores = found @ query / np.where(lengths > 0, lengths, 1)
            rows = rows.drop_columns(["vector"]).append_column("score", pa.array(scores))
            both = rows if best is None else pa.concat_tables([best, rows])
            order = pc.select_k_unstable(
                both,
                k=min(k, both.num_rows),
                sort_keys=[("score", "descending"), ("id", "ascending")],
            )
            best = both.take(order)
    return _result(best, level)


def stored_vector(
    archive: Archive, name: str, *, encoder: str | None = None
) -> NDArray[np.float32]:
    """Returns the embedding [dim] of a ready slide or region, to search with.

    Args:
        archive: The archive.
        name: A region id, or a slide's id or unique file name.
        encoder: The encoder; may be left out when the archive holds one.

    Raises:
        ArchiveError: If it is not there.
    """
    chosen, entry = archive.encoder(encoder)
    slide, slash, _ = name.rpartition("/")
    row_id = name if slash and slide in archive.ledger() else archive.resolve(name)
    where = pc.field("id") == row_id
    with guarded(archive.uri, "read the embeddings", damaged=True):
        rows = archive.dataset(entry["embeddings_table"]).to_table(
            columns=["slide_id", "vector"], filter=where
        )
    if rows.num_rows == 0 or rows["slide_id"][0].as_py() not in archive.ready_ids(chosen):
        raise ArchiveError(
            f"The archive {archive.uri} has no embedding of {row_id} by encoder {chosen}.",
            hint="See: pathflip slides list",
            code="unknown_slide",
        )
    vector: NDArray[np.float32] = vectors(rows["vector"])[0]
    return vector


def _slides(archive: Archive, encoder: str, filters: Sequence[Filter]) -> pa.Array:
    """Returns the ids of ready slides that meet the conditions on slides."""
    ids = archive.ready_ids(encoder)
    if filters:
        rows = archive.slides(columns=["slide_id", *_OF_SLIDE])
        for condition in filters:
            rows = rows.filter(condition.expression())
        ids &= set(rows["slide_id"].to_pylist())
    return pa.array(sorted(ids), pa.string())


def _candidates(
    dataset: Any, query: NDArray[np.float64], where: pc.Expression, k: int
) -> Iterable[pa.Table]:
    columns = ["id", "slide_id", "x0", "y0", "size0", "mpp", "vector"]
    indexed = {name for index in dataset.describe_indices() for name in index.field_names}
    if "vector" in indexed:
        # More candidates than asked for: rows of slides that are not ready drop out afterwards.
        nearest = {
            "column": "vector",
            "q": query.astype(np.float32),
            "k": k + max(64, k),
            "metric": "cosine",
            "minimum_nprobes": 32,
            "refine_factor": 4,
        }
        yield dataset.to_table(
            columns=[*columns, "_distance"], filter=where, prefilter=True, nearest=nearest
        ).select(columns)
        return
    for batch in dataset.to_batches(columns=columns, filter=where, batch_size=8192):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _result(best: pa.Table | None, level: str) -> pa.Table:
    if best is None:
        return _RESULT.empty_table()
    count = best.num_rows
    ids = best["id"] if level == "region" else pa.nulls(count, pa.string())
    columns = {"rank": pa.array(range(1, count + 1), pa.int32()), "region_id": ids}
    return pa.table(
        [
            columns.get(name, best[name] if name in best.column_names else None)
            for name in _RESULT.names
        ],
        schema=_RESULT,
    )
