"""Atomic writes, file locks, and folders that are gone when their process is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

PARTIAL = ".partial"
PRIVATE = "pathflip-"
"""Beginning of the names of private folders."""
_LOCK = "lock"
_NOTE_S = 1.0
"""Seconds in which whoever has just taken a lock writes its name; it takes a millisecond."""
_MAX_BASE = 20
_REMOVALS = 20  # attempts, 0.05 s apart


def partial(path: Path, *, one_writer: bool = False) -> Path:
    """Return a hidden temporary path beside a file or folder, to be renamed over it.

    Args:
        path: The file or folder.
        one_writer: Whether only one process ever writes it: the name is then always the same, so
            that what a killed process left is overwritten. Otherwise every call returns another.
    """
    infix = "" if one_writer else f".{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{path.name}{infix}{PARTIAL}")


@contextmanager
def replacing(path: str | Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary file, which replaces ``path`` when the block ends without an error.

    It is flushed to disk first: readers, and a machine that crashes, see the old file or the new.

    Args:
        path: The file to replace; its folder must exist.
        one_writer: See :func:`partial`.
    """
    path = Path(path)
    part = partial(path, one_writer=one_writer)
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a small file atomically: it holds the old content or the new, never a part of it."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim(handle: int, *, wait_s: float = 0.0) -> bool:
    """Take the exclusive lock (``flock``) of an open file; False if another process holds it.

    The kernel releases it when the file is closed or the process dies, whatever the cause. It also
    works between machines on NFSv4, and on Lustre mounted with flock.

    Args:
        handle: The open file.
        wait_s: Seconds to wait for another process to release it.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)


class FileLock:
    """Exclusive lock on a file, as a context manager; see :func:`claim`.

    The file remains and holds pid, host and start time of the last process that locked it.

    Args:
        path: The lock file; its folder must exist.
        refusal: Returns the error to raise, given the holder ("process 7 on host since ...").
        wait_s: Seconds to wait for another process to release it.

    Raises:
        OSError: On entering, if the file cannot be written.
    """

    def __init__(
        self, path: Path, *, refusal: Callable[[str], Exception], wait_s: float = 0.0
    ) -> None:
        self._path, self._refusal, self._wait_s = path, refusal, wait_s

    def __enter__(self) -> FileLock:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not claim(handle, wait_s=self._wait_s):
                raise self._refusal(_holder(handle))
            note = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(note).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)


def _holder(handle: int) -> str:
    """Return who holds a lock; its note may not be written yet, or be that of the one before."""
    last = time.monotonic() + _NOTE_S
    while True:
        try:
            note = json.loads(os.pread(handle, 1000, 0))
            holder = f"process {note['pid']} on {note['host']} since {note['started']}"
            ended = (
                note["host"] == socket.gethostname() and not Path(f"/proc/{note['pid']}").exists()
            )
        except (ValueError, KeyError, TypeError):
            holder, ended = "another process", True
        if not ended or time.monotonic() > last:
            return holder
        time.sleep(0.01)


class PrivateFolder:
    """A new temporary folder that only this user can enter, as a context manager.

    It is below ``$TMPDIR``, or below ``/tmp`` where that path is long: the path of a socket has 107
    characters at most, and Ray needs 70 of them. Folders of processes that were killed before they
    could remove them are removed by the next that makes one.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(str(base)) > _MAX_BASE:
            base = Path("/tmp")
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=base))
        # The lock has its name only when it is held: nobody takes a new folder for an old one.
        fresh = self.path / f"{_LOCK}.new"
        self._handle = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        claim(self._handle)
        fresh.rename(self.path / _LOCK)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder, also while processes that end still write to it."""
        remove_tree(self.path)
        os.close(self._handle)


def remove_tree(folder: Path) -> None:
    """Remove a folder to which processes that end may still write for a moment."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _sweep(base: Path) -> None:
    """Remove the private folders of this user whose process is gone."""
    for lock in base.glob(f"{PRIVATE}*/{_LOCK}"):
        with suppress(OSError):
            if lock.lstat().st_uid != os.getuid():
                continue
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if claim(handle):
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(handle)
