"""Small actors for tests of how jobs run: processes of a job import them from here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pathflip.errors import EncoderError


class Count:
    """Counts calls of all actors; one for a job."""

    def __init__(self) -> None:
        self.calls = 0

    def add(self, number: int) -> int:
        """Add to it; return the sum."""
        self.calls += number
        return self.calls


class Doubler:
    """Doubles numbers; what else it does stands in the row.

    Args:
        folder: Folder of the processes it killed, by number.
        count: Calls the job's :class:`Count`.
    """

    def __init__(self, folder: Path, count: Callable[..., Any] | None = None) -> None:
        self._folder, self._count = folder, count

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return twice the numbers, the process, and what it sees."""
        for row in rows.to_pylist():
            if row["fault"] == "raise":
                raise ValueError("No such number.")
            if row["fault"].startswith("die"):
                with open(self._folder / row["n"], "a+") as noted:
                    noted.seek(0)
                    if len(noted.readlines()) < int(row["fault"][3:]):
                        print(os.getpid(), file=noted, flush=True)
                        os.kill(os.getpid(), signal.SIGKILL)
        seen = 0 if self._count is None else self._count("add", len(rows))
        return pa.table(
            {
                "n": [2 * int(n) for n in rows["n"].to_pylist()],
                "pid": [os.getpid()] * len(rows),
                "gpu": [os.environ["CUDA_VISIBLE_DEVICES"]] * len(rows),
                "heavy": [bool({"ray", "torch", "transformers"} & set(sys.modules))] * len(rows),
                "seen": [seen] * len(rows),
            }
        )


class Twice:
    """Yields every row twice, as a stage that cuts slides into chunks does."""

    def __call__(self, rows: pa.Table) -> Any:
        """Yield the rows, and again."""
        yield rows
        yield rows


class Late:
    """Yields numbers one by one, and kills its process once all are out, but before it says so.

    Args:
        folder: Folder of the processes it killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rows: pa.Table) -> Any:
        """Yield the rows; die where no process did yet."""
        for at in range(len(rows)):
            yield pa.table({"n": [int(n) for n in rows["n"].slice(at, 1).to_pylist()]})
        if not list(self._folder.iterdir()):
            (self._folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Refuses:
    """Raises an error that users can mend, when it is made or when it is called."""

    def __init__(self, at: str) -> None:
        self._at = at
        self._raise("made")

    def _raise(self, at: str) -> None:
        if at == self._at:
            raise EncoderError("No weights.", hint="Get them.", code="gated")

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows."""
        self._raise("called")
        return rows
