"""The lock of an archive: one process writes it at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pathflip.archive.storage import guarded, is_local, normalise
from pathflip.errors import ArchiveError


class ArchiveLock:
    """Exclusive right to write an archive, as a context manager.

    For local paths it is ``flock`` on ``<archive>/.lock``, which the kernel frees when the process
    dies however it dies; the file stays and holds pid, host and start of the last holder. It also
    works between machines on NFSv4 and Lustre mounted with flock; on file systems without it, and
    on object stores, where there is nothing to lock, the user has to start one job per archive at
    a time: there the lock does nothing.

    Raises:
        ArchiveError: On entering, if another process holds it (``locked``) or the folder cannot be
            written (``not_permitted``).
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = normalise(uri)
        self._handle: int | None = None

    def __enter__(self) -> ArchiveLock:
        if not is_local(self.uri):
            return self
        path = Path(self.uri, ".lock")
        with guarded(self.uri, "lock the archive"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0)
            os.close(handle)
            raise self._locked(holder) from None
        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with guarded(self.uri, "lock the archive"):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(note).encode(), 0)
        self._handle = handle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _locked(self, holder: bytes) -> ArchiveError:
        try:
            note = json.loads(holder)
            who = f"process {note['pid']} on {note['host']} since {note['started']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return ArchiveError(
            f"The archive {self.uri} is locked by {who}.",
            hint="Wait for it to finish, or stop it; the lock goes with the process.",
            code="locked",
        )
