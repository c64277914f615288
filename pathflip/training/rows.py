"""Reading of table rows by their place in a run's list, checked against their checksums.

A run lists its slides or trees once. Its rows are then taken from the archive by number, just those
a batch asks for, whatever else the tables hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.archive.schema import intact_rows
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError, CheckpointError

_AT_ONCE = 1024


class RowReader:
    """Reader of some rows of a table by their place in a list.

    Args:
        archive: The archive, at the state the row numbers are of.
        table: Name of the table.
        rows: Row number of each place, int64 [n].
    """

    def __init__(self, archive: Archive, table: str, rows: NDArray[np.int64]) -> None:
        self._archive, self.table, self._rows = archive, table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, places: NDArray[np.int64], *, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows at places, in their order.

        Args:
            places: Places in the list, int64 [m].
            columns: Only these columns, which are not checked then; all by default.

        Raises:
            ArchiveError: A row cannot be read, or is not what was written (``damaged``).
        """
        rows = self._rows[places]
        order = np.argsort(rows, kind="stable")
        options: dict[str, Any] = {} if columns is None else {"columns": list(columns)}
        with guarded(self._archive.uri, f"read the table {self.table}", damaged=True):
            taken = self._archive.dataset(self.table).take(rows[order], **options)
        if columns is None and not intact_rows(taken).all():
            raise damaged(self._archive, f"rows of {self.table} are not what was written")
        if (order[1:] < order[:-1]).any():
            taken = taken.take(np.argsort(order))
        return taken

    def every(
        self, *, columns: Sequence[str] | None = None, at_once: int = _AT_ONCE
    ) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """Yield all places, in the order of the table, with their rows; see :meth:`take`.

        Args:
            columns: Only these columns, unchecked.
            at_once: Number of rows read together.
        """
        order = np.argsort(self._rows)
        for start in range(0, len(order), at_once):
            places = order[start : start + at_once]
            yield places, self.take(places, columns=columns)


def keys_of(
    archive: Archive, table: str, *, by: str, among: Sequence[str], columns: Sequence[str]
) -> pa.Table:
    """Return the columns of a table's rows of some slides or trees, with their row numbers.

    Args:
        archive: The archive.
        table: Name of the table.
        by: Column that says whose a row is.
        among: Values of that column.
        columns: Columns to return besides; ``row`` is the row number.
    """
    with guarded(archive.uri, f"read the table {table}", damaged=True):
        keys = archive.dataset(table).to_table(columns=list(dict.fromkeys([by, *columns])))
    keys = keys.append_column("row", pa.array(np.arange(keys.num_rows)))
    return keys.filter(pc.is_in(keys[by], pa.array(among, pa.string())))


def changed(archive: Archive, name: str) -> CheckpointError:
    """Return the error of an item that is no longer in the archive as a run lists it.

    Args:
        archive: The archive.
        name: The item, as in ``Slide a1``.
    """
    return CheckpointError(
        f"{name} is no longer in {archive.uri} as it was when the run began.",
        hint="Begin again in another run folder.",
        code="archive_changed",
    )


def damaged(archive: Archive, what: str) -> ArchiveError:
    """Return the error of a table that is damaged; its hint names the command that mends it."""
    uri = archive.uri
    hint = f"Mend it: pathflip archive repair --archive {uri}" if is_local(uri) else ""
    return ArchiveError(f"The archive {uri} is damaged: {what}.", hint=hint, code="damaged")
