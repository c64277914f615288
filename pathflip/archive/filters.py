"""Structured filters on search results: a column, an operator, a value.

A filter becomes a node of an Arrow expression; no text of a user becomes part of a query string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive.schema import embeddings_schema
from pathflip.errors import ConfigError
from pathflip.splits import spellings

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
"""Columns a filter may name, and their types."""

SLIDE_FIELDS = ("patient_id", "split", "vendor")
"""Those of them that the table of slides answers."""

LABEL = "label."
"""Begins the name of a label as a column: ``label.grade=2``."""

_STORED = embeddings_schema(1)
_OPS = ("!=", "<=", ">=", "=", "<", ">")
_WORDS = {str: "text", int: "whole number", float: "number"}
_MAX_VALUE = 1000
_SHAPE = re.compile(
    r"\s*(label\.[^=!<>]{0,198}[^=!<>\s]|[A-Za-z_][A-Za-z0-9_]{0,40})\s*(!=|<=|>=|=|<|>)(.*)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A condition on a column; several conditions all have to hold.

    A split is met under any of its names: ``split=val`` also by ``Validation`` and ``dev``.

    Attributes:
        field: One of :data:`FIELDS`, or ``label.`` and the name of a label of slides.
        op: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``; only the first two for text. ``!=`` also
            keeps rows without a value.
        value: Text, or a finite number, which is whole for integer columns.

    Raises:
        ConfigError: Field, operator or value is none of these.
    """

    field: str
    op: str
    value: str | int | float

    def __post_init__(self) -> None:
        kind = _kind(self.field)
        if kind is None:
            raise ConfigError(
                f"Filters know no column {self.field[:40]!r}.",
                hint=f"One of: {', '.join(FIELDS)}, or label.NAME.",
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

    @property
    def of_slide(self) -> bool:
        """Truth of the table of slides answering it: a patient, a split, a vendor, a label."""
        return self.field in SLIDE_FIELDS or self.field.startswith(LABEL)

    def _scalar(self) -> pa.Scalar:
        # Lance compares like with like only: the literal takes the column's type.
        if isinstance(self.value, str):
            return pa.scalar(self.value, pa.string())
        kind = FIELDS[self.field]
        return pa.scalar(kind(self.value), _STORED.field(self.field).type)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read a filter from text such as ``patient_id=P1`` or ``mpp<=0.3``.

        Raises:
            ConfigError: The text is anything else.
        """
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{text[:60]!r} is not a filter.", hint="Write COLUMN OP VALUE, as in mpp<=0.3."
            )
        name, op, raw = match[1], match[2], match[3].strip()
        kind = _kind(name) or str
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
        """Return the filter as an Arrow expression on its column."""
        column, value = pc.field(self.field), self._scalar()
        if self.field == "split":  # tables of slides are small: no index has to understand this
            named = pc.is_in(
                pc.utf8_lower(pc.utf8_trim_whitespace(column)),
                value_set=pa.array(spellings(str(self.value)), pa.string()),
            )
            return ~named | column.is_null() if self.op == "!=" else named
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

    def mask(self, column: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Return which values of its column meet the filter: :meth:`expression`, evaluated."""
        compare = {
            "=": pc.equal,
            "!=": pc.not_equal,
            "<": pc.less,
            "<=": pc.less_equal,
            ">": pc.greater,
            ">=": pc.greater_equal,
        }
        found = compare[self.op](column, self._scalar()).fill_null(self.op == "!=")
        kept: NDArray[np.bool_] = found.to_numpy(zero_copy_only=False)
        return kept


def _kind(field: str) -> type | None:
    """Return the type of a column; None if there is no such column."""
    return str if len(field) > len(LABEL) and field.startswith(LABEL) else FIELDS.get(field)


def row_mask(rows: pa.Table, conditions: Sequence[Filter]) -> NDArray[np.bool_]:
    """Return which rows of embeddings meet the conditions, those on slides aside."""
    keep = np.ones(rows.num_rows, np.bool_)
    for condition in conditions:
        if not condition.of_slide:
            keep &= condition.mask(rows[condition.field])
    return keep
