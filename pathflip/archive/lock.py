"""Locks an archive, so that one process writes it at a time."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pathflip.archive.lease import Lease
from pathflip.archive.storage import guarded, is_local, normalise, open_table
from pathflip.errors import ArchiveError
from pathflip.files import FileLock

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class ArchiveLock:
    """Exclusive right to write an archive, as a context manager.

    For local paths it is a lock on ``<archive>/.lock``, which goes with the process; see
    :class:`pathflip.files.FileLock`. On object stores, and file systems without ``flock``, it is a
    :class:`pathflip.archive.lease.Lease`.

    Raises:
        ArchiveError: On entering, if another process holds it (``locked``) or the folder cannot be
            written (``not_permitted``).
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = normalise(uri)
        self._lease: Lease | None = None
        self._held = ExitStack()

    def __enter__(self) -> ArchiveLock:
        if not (is_local(self.uri) and self._file_locked()):
            self._lease = self._held.enter_context(Lease(self.uri))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    @property
    def leased(self) -> bool:
        """Return whether it is a lease, which may be lost while it is held."""
        return self._lease is not None

    def open(self, table: str) -> Any:
        """Open the newest version of a table, to commit to it.

        Every commit of an archive goes to a version opened here: that the lease is looked at after
        the version was opened is what keeps a writer out that has lost it.

        Raises:
            ArchiveError: See :func:`open_table`; if the lease was lost (``lease_lost``).
        """
        dataset = open_table(self.uri, table)
        self.check()
        return dataset

    def check(self) -> None:
        """Refuse to go on if this process has lost the right to write (``lease_lost``)."""
        if self._lease is not None:
            self._lease.check()

    def _file_locked(self) -> bool:
        """Lock the file; False if the file system knows no locks."""
        path = Path(self.uri, ".lock")
        with guarded(self.uri, "lock the archive"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(FileLock(path, refusal=self._locked))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return False
        return True

    def _locked(self, holder: str) -> ArchiveError:
        return ArchiveError(
            f"The archive {self.uri} is locked by {holder}.",
            hint="Wait for it to finish, or stop it; the lock goes with the process.",
            code="locked",
        )
