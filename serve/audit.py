"""Audit log: one line of JSON per request, each chained to the line before by hashes.

Every ingress replica has a file of its own in the folder. A line holds its number, the hash
of the line before and its own: changing, removing or inserting one breaks the chain. A file begins
with the number and hash of the last lines of the files before it, so that cutting one of those
short is seen as well. No folder can show that all of it was written anew: keep its heads
(``pathflip audit verify`` prints them) elsewhere, and give them to it (``--head``).

Lines hold ids and names of tokens; no question, answer or picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pathflip.errors import ConfigError, PathFLIPError

SYNC_S = 0.2
"""Seconds until a line, which the operating system has before its answer leaves, is on disk."""
_START = "0" * 64
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_OTHERS = 32  # newest files whose heads a new file repeats


class AuditError(PathFLIPError):
    """The log cannot be written, or was changed."""

    default_code = "audit"


class AuditLog:
    """Writes the log of one process; safe to use from several threads.

    Args:
        folder: Folder of the log; made, for its owner only, if missing.

    Raises:
        ConfigError: If the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            heads = _heads(folder)
            self.path = _fresh(folder)
            # The owner reads and writes; every write goes to the end.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
            self._file = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"The audit log cannot be written in {folder}: {error.strerror}.",
                hint="Name another folder: -o audit=DIR",
                code="audit",
            ) from error
        self._lock, self._number, self._hash = threading.Lock(), 0, _START
        self._dirty, self._closed = threading.Event(), threading.Event()
        self._syncing = threading.Thread(target=self._sync, name="audit", daemon=True)
        self._syncing.start()
        self.write({"action": "open", "others": heads})

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry as a line with its number, time and hashes.

        Raises:
            AuditError: The line cannot be written, for instance because the disk is full; nothing
                of it stays.
        """
        with self._lock:
            body = {
                "number": self._number + 1,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                **entry,
                "before": self._hash,
            }
            digest = _digest(body)
            line = json.dumps({**body, "hash": digest}).encode() + b"\n"
            begin = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes")
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._file, begin)
                raise AuditError(f"The audit log {self.path} cannot be written.") from error
            self._number, self._hash = self._number + 1, digest
        self._dirty.set()

    def close(self) -> None:
        """Bring all lines to disk and close the file."""
        if not self._closed.is_set():
            self._closed.set()
            self._dirty.set()
            self._syncing.join()
            os.close(self._file)

    def _sync(self) -> None:
        while not self._closed.is_set():
            self._dirty.wait()
            self._dirty.clear()
            os.fsync(self._file)
            self._closed.wait(SYNC_S)
        os.fsync(self._file)


@dataclass(frozen=True, kw_only=True)
class Head:
    """End of a verified file.

    Attributes:
        lines: Number of lines.
        hash: Hash of the last line.
        torn: Whether a half line follows: its writer was killed while writing.
    """

    lines: int
    hash: str
    torn: bool


def verify(path: str | Path, *, kept: Iterable[str] = ()) -> dict[str, Head]:
    """Verify the chain of a file, or of a folder's files and of the heads they hold of each other.

    Args:
        path: Folder of the log, or one of its files.
        kept: Heads that were kept elsewhere: each must be the hash of a line that is still there.

    Returns:
        {file name: its head}.

    Raises:
        AuditError: If a line was changed, removed, inserted or cut off; the message names it.
        ConfigError: If there is no log, or what was kept is no head.
    """
    path, kept = Path(path), list(kept)
    for head in kept:
        if not _HASH.fullmatch(head):
            raise ConfigError(f"{head!r} is no head.", hint="It has 64 hex digits, in lower case.")
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"{path} holds no audit log.", hint="Give its folder or a file of it.")
    heads: dict[str, Head] = {}
    hashes: dict[str, list[str]] = {}
    repeated: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        with file.open("rb") as lines:
            heads[file.name], hashes[file.name], first = _verify(file, lines)
        repeated.append((file.name, first.get("others", {})))
    if path.is_dir():
        for holder, others in repeated:
            for name, (lines_then, digest) in others.items():
                own = hashes.get(name, [])
                if lines_then > len(own) or own[lines_then - 1] != digest:
                    raise AuditError(
                        f"{name} was changed: {holder} knows {lines_then} lines of it; "
                        f"{len(own)} are there, or they differ."
                    )
    there = {digest for own in hashes.values() for digest in own}
    for head in kept:
        if head not in there:
            raise AuditError(
                f"{path} has no line of the kept head {head}: it was cut short or written anew."
            )
    return heads


def _verify(file: Path, lines: Iterable[bytes]) -> tuple[Head, list[str], dict[str, Any]]:
    before, hashes, first = _START, list[str](), dict[str, Any]()
    torn = False
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            torn = True
            break
        try:
            entry = json.loads(line)
            digest = entry.pop("hash")
            whole = entry["before"] == before and entry["number"] == number
            whole = whole and digest == _digest(entry)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise AuditError(f"{file}, line {number}: the line was changed.")
        if number == 1:
            first = entry
        before = digest
        hashes.append(digest)
    if not hashes:
        raise AuditError(f"{file} has lost its first line.")
    return Head(lines=len(hashes), hash=before, torn=torn), hashes, first


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _fresh(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return folder / f"{stamp}-{os.getpid()}-{os.urandom(3).hex()}.jsonl"


def _heads(folder: Path) -> dict[str, tuple[int, str]]:
    """Number and hash of the last whole line of each file; only ends are read."""
    heads = {}
    for file in sorted(folder.glob("*.jsonl"))[-_MAX_OTHERS:]:
        with file.open("rb") as handle:
            line = _last_line(handle)
        try:
            entry = json.loads(line)
            heads[file.name] = (int(entry["number"]), str(entry["hash"]))
        except (ValueError, KeyError, TypeError):
            continue  # verify reports it
    return heads


def _last_line(handle: BinaryIO) -> bytes:
    handle.seek(0, os.SEEK_END)
    at, tail = handle.tell(), b""
    while at > 0 and tail.count(b"\n") < 3:
        step = min(at, 64 << 10)
        at -= step
        handle.seek(at)
        tail = handle.read(step) + tail
    whole = tail[: tail.rfind(b"\n")] if b"\n" in tail else b""
    return whole[whole.rfind(b"\n") + 1 :]
