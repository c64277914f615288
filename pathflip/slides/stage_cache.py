"""A folder of one machine in which its processes keep copies of files, up to a bound.

Each entry is a folder of files with a lock beside it::

    <name>.lock               held shared by everyone who reads, exclusive by the one who fills it
    <name>.<bytes>/           entry.json with the digests of the files, and a folder with these,
                              which has another name each time: a reader that still has the file
                              of an earlier time open cannot take it for this one
    <name>.<bytes>.partial/   the same while it is being filled; its size is taken from the start

The kernel drops the locks of a process that dies, so what it held can be evicted, and what it was
filling is filled again. Room is made by removing whole entries that nobody holds, those that were
not held for longest first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.errors import SlideError
from pathflip.files import write_file

logger = logging.getLogger(__name__)

WAIT_S = 900.0
"""Time to wait for others to release what they hold before a slide is given up."""
SPARE_BYTES = 1 << 30
"""Space of the disk that is left to others."""
_POLL_S = 0.2
_NOTE = "entry.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Files that are held.

    Attributes:
        folder: Their folder.
        sha256: {path in the folder: digest}, in the order in which they were filled.
    """

    folder: Path
    sha256: dict[str, str]


class StageCache:
    """Files shared by the processes of a machine, at most ``limit`` bytes.

    Args:
        folder: The folder; made, for this user alone, if it does not exist.
        limit: Bytes that its entries may take together.
        spare: Bytes of the disk to leave free.
    """

    def __init__(self, folder: Path, *, limit: int, spare: int = SPARE_BYTES) -> None:
        self._folder, self._limit, self._spare = folder, limit, spare

    @contextmanager
    def hold(
        self,
        name: str,
        size: int,
        fill: Callable[[Path], Mapping[str, str]],
        *,
        wait_s: float = WAIT_S,
    ) -> Iterator[Entry]:
        """Yield an entry, filled if it is not there, that stays as long as the block lasts.

        Of several processes that want the same entry one fills it and the others wait for it. A
        process that waits for room must hold no other entry, or two may wait for each other.

        Args:
            name: Key of the entry: the same name means the same content.
            size: Bytes of its files.
            fill: Writes the files into the folder it is given and returns {path: sha256}.
            wait_s: Time to wait for room.

        Raises:
            SlideError: There is no room, or the folder cannot be used (``stage_failed``); and what
                ``fill`` raises.
        """
        try:
            self._make_folder()
            lock, entry = self._held(name, size, fill, wait_s)
        except OSError as error:
            raise _failed(
                f"The staging folder {self._folder} cannot be used: {error.strerror}.",
                "Give another with -o stage_dir=DIR or PATHFLIP_STAGE_DIR.",
            ) from error
        try:
            yield entry
        finally:
            os.close(lock)

    def _held(
        self, name: str, size: int, fill: Callable[[Path], Mapping[str, str]], wait_s: float
    ) -> tuple[int, Entry]:
        folder = self._folder / f"{name}.{size}"
        while True:  # between filling and holding, another process may evict it
            lock = self._lock(name, fcntl.LOCK_SH)
            entry = _checked(folder)
            if lock is not None and entry is not None:
                now = time.time_ns()  # the file system's own clock is too coarse for an order
                os.utime(lock, ns=(now, now))
                return lock, entry
            _close(lock)
            lock = self._lock(name, fcntl.LOCK_EX)
            try:
                if _checked(folder) is None:
                    if folder.exists():
                        logger.warning("%s was damaged and is staged again.", folder)
                        _remove(folder)
                    self._fill(name, size, fill, wait_s)
            finally:
                _close(lock)

    def _fill(
        self, name: str, size: int, fill: Callable[[Path], Mapping[str, str]], wait_s: float
    ) -> None:
        """Fill an entry whose lock this process has."""
        part = self._folder / f"{name}.{size}{_PARTIAL}"
        try:
            self._reserve(part, name, size, wait_s)
            inner = part / uuid.uuid4().hex[:8]
            inner.mkdir()
            files = {
                f"{inner.name}/{path}": {"sha256": digest, "stamp": _stamp(inner / path)}
                for path, digest in fill(inner).items()
            }
            _write_note(part, files)
            part.rename(part.with_name(f"{name}.{size}"))
        except BaseException:
            _remove(part)
            with suppress(OSError):
                self._lock_path(name).unlink()
            raise

    # -- room ------------------------------------------------------------------------------------

    def _reserve(self, part: Path, name: str, size: int, wait_s: float) -> None:
        """Make the folder to fill once there is room for it."""
        if size > self._limit:
            raise _failed(
                f"A slide of {size / 1e9:.3g} GB does not fit the {self._limit / 1e9:.3g} GB that "
                f"may be staged in {self._folder}.",
                "Raise -o stage_gb=N or PATHFLIP_STAGE_GB.",
            )
        deadline = time.monotonic() + wait_s
        while True:
            with self._one_at_a_time():
                others = self._make_room(name, size)
                if others is None:
                    _remove(part)  # of a process that died
                    part.mkdir(mode=0o700)
                    return
            if not others or time.monotonic() >= deadline:
                free = shutil.disk_usage(self._folder).free
                raise _failed(
                    f"There is no room to stage a slide of {size / 1e9:.3g} GB in {self._folder}: "
                    f"{self._limit / 1e9:.3g} GB may be used, {others / 1e9:.3g} GB are in use, "
                    f"and the disk has {free / 1e9:.3g} GB free.",
                    "Raise -o stage_gb=N, or give a larger disk with -o stage_dir=DIR.",
                )
            time.sleep(_POLL_S)

    def _make_room(self, name: str, size: int) -> int | None:
        """Evict until an entry fits; None if it does, else the bytes that others hold."""
        entries = {key: one for key, one in self._entries().items() if key != name}
        used = sum(one.bytes for one in entries.values())
        for key, one in sorted(entries.items(), key=lambda item: item[1].held_ns):
            if self._fits(entries, used + size, size):
                break
            if self._evict(key):
                del entries[key]
                used -= one.bytes
        return None if self._fits(entries, used + size, size) else used

    def _fits(self, entries: Mapping[str, _Taken], total: int, size: int) -> bool:
        coming = sum(one.bytes for one in entries.values() if one.partial)
        free = shutil.disk_usage(self._folder).free
        return total <= self._limit and size + coming + self._spare <= free

    def _entries(self) -> dict[str, _Taken]:
        """Return what takes room: entries, and those being filled."""
        found: dict[str, _Taken] = {}
        for path in self._folder.iterdir():
            name, _, rest = path.name.partition(".")
            size = rest.removesuffix(_PARTIAL)
            if not size.isdigit():
                continue
            held_ns = 0
            with suppress(FileNotFoundError):
                held_ns = self._lock_path(name).stat().st_mtime_ns
            before = found[name].bytes if name in found else 0
            partial = rest.endswith(_PARTIAL)
            found[name] = _Taken(bytes=before + int(size), held_ns=held_ns, partial=partial)
        return found

    def _evict(self, name: str) -> bool:
        """Remove an entry; False if somebody holds it."""
        lock = self._lock(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return False
        try:
            for folder in self._folder.glob(f"{name}.*/"):
                _remove(folder)
            self._lock_path(name).unlink()
        finally:
            os.close(lock)
        return True

    # -- locks -----------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._folder.lstat()
        private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not private or status.st_uid != os.getuid():
            raise _failed(
                f"The staging folder {self._folder} is not this user's own.",
                "Remove it, or give another with -o stage_dir=DIR or PATHFLIP_STAGE_DIR.",
            )

    def _lock_path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def _lock(self, name: str, kind: int) -> int | None:
        """Return the locked file of an entry; None if ``kind`` is not to wait and it is held."""
        path = self._lock_path(name)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, kind)
                # Whoever evicts an entry removes its lock, for which others may have waited.
                if path.stat().st_ino == os.fstat(handle).st_ino:
                    return handle
            except FileNotFoundError:
                pass
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Keep other processes from counting and taking room meanwhile."""
        handle = os.open(self._folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """Room that an entry takes: its bytes, when it was last held, whether it is being filled."""

    bytes: int
    held_ns: int
    partial: bool


def _checked(folder: Path) -> Entry | None:
    """Return an entry if its files are those that were written; None if there is none.

    The kernel changes the times of a file that is written to, so contents are compared only where
    times, size or inode differ, or after a restart, before which a file may not have reached the
    disk.
    """
    try:
        note: dict[str, Any] = json.loads((folder / _NOTE).read_text())
        known: dict[str, dict[str, Any]] = note["files"]
        now = {path: about | {"stamp": _stamp(folder / path)} for path, about in known.items()}
        restarted = note["boot"] != _boot()
        for path, about in now.items():
            if restarted or about != known[path]:
                if about["stamp"][0] != known[path]["stamp"][0]:  # the size
                    return None
                if _digest(folder / path) != about["sha256"]:
                    return None
        if restarted or now != known:
            _write_note(folder, now)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    inner = next(iter(now)).partition("/")[0]
    digests = {path.removeprefix(f"{inner}/"): about["sha256"] for path, about in now.items()}
    return Entry(folder=folder / inner, sha256=digests)


def _write_note(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    write_file(folder / _NOTE, json.dumps({"boot": _boot(), "files": files}))


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _boot() -> str:
    """Return what names this start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _remove(folder: Path) -> None:
    """Remove a folder of files; a reader that still has one open keeps no space of the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):
                os.truncate(path, 0)
    shutil.rmtree(folder, ignore_errors=True)


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _failed(message: str, hint: str) -> SlideError:
    return SlideError(message, hint=hint, code="stage_failed")
