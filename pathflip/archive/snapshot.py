"""A snapshot of an archive that a long-lived process keeps up to date.

:class:`pathflip.archive.Archive` is one committed state. The parts of the service run for weeks and
share one :class:`ArchiveSnapshot` each, which moves to the newest state when something was
committed. A query goes on with the state it began with.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from pathflip.archive import READY, Archive
from pathflip.errors import ArchiveError


class ArchiveSnapshot:
    """The newest committed state of an archive, looked up at most every ``refresh_s``.

    Safe to share between threads: one of them looks, the others go on with what is known.

    Args:
        uri: Path or URI of the archive.
        refresh_s: Seconds a state is used without looking for a newer one.

    Raises:
        ArchiveError: There is no archive, or it cannot be read.
    """

    def __init__(self, uri: str | Path, *, refresh_s: float) -> None:
        self.archive = Archive(uri)
        self._refresh_s, self._looked = refresh_s, time.monotonic()
        self._looking = threading.Lock()

    @property
    def due(self) -> bool:
        """Return whether the next call of :meth:`newest` looks for a newer state."""
        late = time.monotonic() - self._looked > self._refresh_s
        return late and not self._looking.locked()

    def newest(self) -> Archive:
        """Return the newest state; read the archive when that is due.

        Raises:
            ArchiveError: The newer state cannot be read; the next call looks again.
        """
        if self.due and self._looking.acquire(blocking=False):
            try:
                if not self.archive.is_newest():
                    # Not refreshed in place: queries at work keep the state they began with.
                    self.archive = Archive(self.archive.uri)
                self._looked = time.monotonic()
            finally:
                self._looking.release()
        return self.archive

    async def newest_async(self) -> Archive:
        """Return the newest state; a look happens in a thread, so the event loop stays free."""
        return await asyncio.to_thread(self.newest) if self.due else self.archive


def ready_row(archive: Archive, slide_id: str) -> dict[str, object]:
    """Return the ledger's row of a ready slide, by its exact id.

    Clients of the service name slides by id alone: the names of files may name people.

    Raises:
        ArchiveError: No slide has this id, or it is not ready (``unknown_slide``); the message does
            not tell which.
    """
    row = archive.ledger().get(slide_id)
    if row is None or row["status"] != READY:
        raise ArchiveError("There is no such slide.", code="unknown_slide")
    return row
