"""A snapshot of an archive that a long-lived process keeps up to date.

:class:`pathflip.archive.Archive` is one committed state. The parts of the service run for weeks and
share one :class:`ArchiveSnapshot` each, which moves to the newest state when something was
committed. A query goes on with the state it began with, and while there is traffic none waits for
the next one: it is opened beside the old one, keeps what is known of tables that did not change,
has what queries need read into it, and then takes the old one's place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pathflip.archive import READY, Archive
from pathflip.errors import ArchiveError

logger = logging.getLogger(__name__)


class ArchiveSnapshot:
    """The newest committed state of an archive, looked up at most every ``refresh_s``.

    Safe to share between threads. Half of ``refresh_s`` after a look, the next call starts another
    in a thread and goes on with what is known. Only where nobody asked for as long as
    ``refresh_s`` a call looks itself, so whatever was committed that long ago is always seen.

    Args:
        uri: Path or URI of the archive.
        refresh_s: Seconds a state is used without looking for a newer one.
        warm: Reads what queries need into a newer state before it is used.

    Raises:
        ArchiveError: There is no archive, or it cannot be read.
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        refresh_s: float,
        warm: Callable[[Archive], None] = lambda _: None,
    ) -> None:
        self._refresh_s, self._warm = refresh_s, warm
        self._looked = time.monotonic()  # what was committed by then is in the state that is known
        self.archive = Archive(uri)
        self._looking = threading.Lock()
        self._opened: tuple[float, Archive] | None = None  # a newer state that is not warm yet
        self._failed = False

    @property
    def late(self) -> bool:
        """Return whether the state that is known may be too old to be used."""
        return time.monotonic() - self._looked > self._refresh_s

    @property
    def _due(self) -> bool:
        return not self._failed and time.monotonic() - self._looked > self._refresh_s / 2

    def newest(self) -> Archive:
        """Return the newest state; read the archive where the one that is known is too old.

        Raises:
            ArchiveError: The newer state cannot be read; the next call looks again.
        """
        if self.late:
            if (opened := self._opened) is not None:  # it takes long to warm
                self._use(*opened)
            elif self._looking.acquire(blocking=False):
                self._look(warm=False)
        elif self._due and self._looking.acquire(blocking=False):
            threading.Thread(target=self._look_aside, name="snapshot", daemon=True).start()
        return self.archive

    async def newest_async(self) -> Archive:
        """Return the newest state; a look happens in a thread, so the event loop stays free."""
        if self.late and not self._looking.locked():
            return await asyncio.to_thread(self.newest)
        return self.newest()

    def _look_aside(self) -> None:
        try:
            self._look(warm=True)
        except ArchiveError as error:
            self._failed = True  # whoever asks once it is late meets it again
            logger.warning("Newer commits cannot be read: %s", error)

    def _look(self, *, warm: bool) -> None:
        """Look for a newer state and use it; the caller has acquired ``_looking``."""
        try:
            began = time.monotonic()
            if self.archive.is_newest():
                self._looked, self._failed = began, False
                return
            # Not refreshed in place: queries at work keep the state they began with.
            opened = self.archive.successor()
            if warm:
                self._opened = began, opened
                self._warm_up(opened)
            self._use(began, opened)
        finally:
            self._looking.release()

    def _warm_up(self, opened: Archive) -> None:
        try:
            opened.ledger()
            self._warm(opened)
        except Exception as error:  # a query meets it again, and says so to who asked
            logger.warning("A newer state was not warmed: %r", error)

    def _use(self, began: float, opened: Archive) -> None:
        self.archive, self._looked, self._failed, self._opened = opened, began, False, None


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
