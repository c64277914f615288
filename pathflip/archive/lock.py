"""Locks an archive, so that one process writes it at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pathflip.archive.storage import guarded, is_local, normalise
from pathflip.errors import ArchiveError
from pathflip.files import FileLock


class ArchiveLock:
    """Exclusive right to write an archive, as a context manager.

    For local paths it is a lock on ``<archive>/.lock``; see :class:`pathflip.files.FileLock`. On
    file systems without ``flock``, and on object stores, where there is nothing to lock, the user
    has to start one job per archive at a time: there the lock does nothing.

    Raises:
        ArchiveError: On entering, if another process holds it (``locked``) or the folder cannot be
            written (``not_permitted``).
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = normalise(uri)
        self._held = ExitStack()

    def __enter__(self) -> ArchiveLock:
        if is_local(self.uri):
            path = Path(self.uri, ".lock")
            with guarded(self.uri, "lock the archive"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(FileLock(path, refusal=self._locked))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def _locked(self, holder: str) -> ArchiveError:
        return ArchiveError(
            f"The archive {self.uri} is locked by {holder}.",
            hint="Wait for it to finish, or stop it; the lock goes with the process.",
            code="locked",
        )
