"""Files that hold the old content or the new one, never half of it, and locks on files."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

PARTIAL = ".partial"


def partial(path: Path, *, one_writer: bool = False) -> Path:
    """Returns the hidden neighbour of a file or folder that is written before it takes its place.

    Args:
        path: The file or folder.
        one_writer: Whether only one process ever writes it: then what one that was killed left is
            used again. Otherwise the name is another on every call.
    """
    infix = "" if one_writer else f".{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{path.name}{infix}{PARTIAL}")


@contextmanager
def replacing(path: str | Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yields a file to write, which takes the place of ``path`` once the block has ended well.

    It is forced to disk before; readers and a machine that fails see the old file or the new one.

    Args:
        path: The file that is wanted; its folder must be there.
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
    """Writes a file so that it holds the old content or the new one, never half."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim(handle: int, *, wait_s: float = 0.0) -> bool:
    """Takes the exclusive lock (``flock``) of an open file; False if another process holds it.

    The kernel frees it when the file is closed, or the process dies however it dies. It also works
    between machines on NFSv4 and Lustre mounted with flock.

    Args:
        handle: The open file.
        wait_s: How long to wait for another holder to go.
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
    """Exclusive right that goes with a file, as a context manager; see :func:`claim`.

    The file stays and holds pid, host and start of the last holder.

    Args:
        path: The lock's file; its folder must be there.
        refusal: Makes the error to raise from who holds it, as in "process 7 on host since ...".
        wait_s: How long to wait for another holder to go.

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
                raise self._refusal(_holder(os.pread(handle, 1000, 0)))
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


def _holder(note: bytes) -> str:
    try:
        held = json.loads(note)
        return f"process {held['pid']} on {held['host']} since {held['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
