"""Places of a table's regions by Lance's row id: slide, position, columns of conditions.

The index knows vectors and row ids; reading the other columns of a few rows costs Lance more than
finding them. 56 bytes a region hold what results and conditions need: in memory up to
:data:`MEMORY_BYTES` of a table, above in a file without a name, of which the kernel keeps what is
looked at. No number of regions ends this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive.filters import Filter

MEMORY_BYTES = 256 << 20
"""Per-table memory budget for what is kept between queries: vectors, or the places of regions."""

LOCATION = ["id", "slide_id", "x0", "y0", "size0", "mpp"]
"""Columns that name and locate a result."""
FILTER_COLUMNS = ["tissue_fraction", "n_patches"]
"""Further columns that conditions may name."""

# Of one region. Nulls of the last three are NaN.
_RECORD: dict[str, Any] = {
    "row_id": np.uint64, "slide": np.int32, "rx": np.int32, "ry": np.int32,
    "x0": np.int64, "y0": np.int64, "size0": np.int32,
    "mpp": np.float64, "tissue_fraction": np.float32, "n_patches": np.float32,
}  # fmt: skip
_TYPES = {
    "x0": pa.int64(), "y0": pa.int64(), "size0": pa.int32(), "mpp": pa.float64(),
    "tissue_fraction": pa.float32(), "n_patches": pa.int32(),
}  # fmt: skip
_BATCH = 65_536


class Places:
    """Places of all regions of a table of embeddings, in the order of their row ids.

    Args:
        dataset: The Lance dataset.
    """

    def __init__(self, dataset: Any) -> None:
        width = sum(np.dtype(kind).itemsize for kind in _RECORD.values())
        rows = dataset.count_rows()
        self._columns = {
            name: _room(rows, kind, in_file=rows * width > MEMORY_BYTES)
            for name, kind in _RECORD.items()
        }
        codes: dict[str, int] = {}
        count = 0
        wanted = [*LOCATION, *FILTER_COLUMNS]
        for batch in dataset.to_batches(
            columns=wanted, filter=pc.field("kind") == "region", with_row_id=True,
            batch_size=_BATCH,
        ):  # fmt: skip
            part = slice(count, count + batch.num_rows)
            count += batch.num_rows
            for name, values in _read(batch, codes).items():
                self._columns[name][part] = values
        self._columns = {name: values[:count] for name, values in self._columns.items()}
        order = np.argsort(self.row_ids, kind="stable")
        if (order[1:] < order[:-1]).any():  # rows were not stored in this order
            for values in self._columns.values():
                values[:] = values[order]
        self._slides = pa.array(list(codes), pa.string())

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def row_ids(self) -> NDArray[np.uint64]:
        """Return the row ids, ascending [n]."""
        return self._columns["row_id"]

    def find(self, row_ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return where in the order rows are; -1 for a row that is no region."""
        if not len(self):
            return np.full(len(row_ids), -1)
        at = np.minimum(np.searchsorted(self.row_ids, row_ids), len(self) - 1)
        return np.where(self.row_ids[at] == row_ids, at, -1)

    def rows(self, at: NDArray[np.int64]) -> pa.Table:
        """Return the columns :data:`LOCATION` of some regions."""
        slides = self._slides.take(pa.array(self._columns["slide"][at]))
        own = zip(
            slides.to_pylist(),
            self._columns["rx"][at].tolist(),
            self._columns["ry"][at].tolist(),
            strict=True,
        )
        ids = pa.array([f"{slide}/{rx}_{ry}" for slide, rx, ry in own], pa.string())
        columns = {"id": ids, "slide_id": slides}
        for name in LOCATION[2:]:
            columns[name] = _arrow(name, self._columns[name][at])
        return pa.table(columns)

    def meeting(self, conditions: Sequence[Filter], slides: pa.Array) -> NDArray[np.bool_]:
        """Return which regions meet the conditions and are of some slides [n]."""
        allowed = pc.is_in(self._slides, slides).to_numpy(zero_copy_only=False)
        for condition in conditions:
            if condition.field == "slide_id":
                allowed &= condition.mask(self._slides)
        keep: NDArray[np.bool_] = allowed[self._columns["slide"]]
        for condition in conditions:
            name = condition.field
            if name in _TYPES:
                keep &= condition.mask(_arrow(name, self._columns[name]))
        return keep


def _room(rows: int, kind: Any, *, in_file: bool) -> NDArray[Any]:
    if not in_file or not rows:
        return np.empty(rows, kind)
    with tempfile.TemporaryFile(prefix="pathflip-places-") as file:
        return np.memmap(file, kind, "w+", shape=(rows,))


def _read(batch: pa.RecordBatch, codes: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Return the columns of a batch as they are kept; new slides get a code."""
    slides = batch["slide_id"].dictionary_encode()
    code = [codes.setdefault(name, len(codes)) for name in slides.dictionary.to_pylist()]
    found: dict[str, NDArray[Any]] = {
        "row_id": batch["_rowid"].to_numpy(),
        "slide": np.array(code, np.int32)[slides.indices.to_numpy()],
    }
    # schema.region_id: SLIDE/rx_ry.
    named = pc.split_pattern(batch["id"], "/", max_splits=1, reverse=True)
    of_grid = pc.split_pattern(pc.list_element(named, 1), "_")
    for number, name in enumerate(("rx", "ry")):
        found[name] = pc.list_element(of_grid, number).cast(pa.int32()).to_numpy()
    for name in _TYPES:
        found[name] = batch[name].to_numpy(zero_copy_only=False)  # null: NaN
    return found


def _arrow(name: str, values: NDArray[Any]) -> pa.Array:
    kind = _TYPES[name]
    missing = np.isnan(values) if values.dtype.kind == "f" else None
    if pa.types.is_integer(kind) and missing is not None:
        values = np.where(missing, 0, values).astype(kind.to_pandas_dtype())
    return pa.array(values, kind, mask=missing)
