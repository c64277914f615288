"""The process that reads for others: started on first use, replaced when it dies or hangs.

What a request and its answer say is between the program that runs there and its caller.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.errors import SlideError
from pathflip.slides.reader_messages import read_message, write_message


@dataclass(frozen=True, kw_only=True)
class _Request:
    header: dict[str, Any]
    blobs: tuple[bytes, ...]
    timeout_s: float
    deadline: float

    @property
    def name(self) -> str:
        return Path(self.header["path"]).name


class ReaderProcess:
    """A process with memory that it shares with its owner, one request at a time.

    A process that dies while it works on a request costs that request (``reader_crash``). One that
    died before it began on it, idle or between two files, says nothing about this file: it is
    replaced and the new one asked.

    Args:
        program: Module that the process runs. Its arguments are the socket, the shared memory, its
            size, and the further ones (see ``reader_child.serve``).
        arguments: Further arguments.
        memory_bytes: Size of the shared memory; what is not used of it takes none.

    Attributes:
        memory: The shared memory. Its last byte, which is one more than was asked for, says that
            the process has begun on its request.
    """

    def __init__(self, program: str, *arguments: int, memory_bytes: int) -> None:
        self._program, self._arguments = program, arguments
        self._file = os.memfd_create("pathflip-reader", os.MFD_CLOEXEC)
        size = memory_bytes + 1
        os.ftruncate(self._file, size)
        self.memory = mmap.mmap(self._file, size)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the reader
        self._pending: _Request | None = None
        self._served = 0  # answers of the process there is now

    @property
    def pid(self) -> int | None:
        """Number of the process there is now."""
        return None if self._process is None else self._process.pid

    def ask(
        self, header: dict[str, Any], timeout_s: float, *blobs: bytes
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for its answer (see :meth:`receive`)."""
        self.send(header, timeout_s, *blobs)
        return self.receive()

    def send(self, header: dict[str, Any], timeout_s: float, *blobs: bytes) -> None:
        """Send a request: ``header`` names at least its ``op`` and the ``path`` of a file."""
        if self._pending is not None:
            self._stop()  # an answer nobody came for: never mistake it for this one's
        connection = self._start()
        deadline = time.monotonic() + timeout_s
        self._pending = _Request(header=header, blobs=blobs, timeout_s=timeout_s, deadline=deadline)
        self.memory[-1] = 0
        with suppress(OSError):  # a process that is gone is noticed when its answer is waited for
            write_message(connection, header, blobs)

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """Wait for the answer to the request that was sent: its header and blobs.

        Raises:
            SlideError: The answer's own; ``timeout`` when the deadline passed, ``reader_crash``
                when the process died.
        """
        request = self._pending
        if request is None or self._socket is None:
            raise ValueError("nothing was asked")
        try:
            answer, blobs = read_message(self._socket, deadline=request.deadline)
        except TimeoutError:
            self._stop()
            raise SlideError(
                f"{request.name} gave no answer within {request.timeout_s:g} s.",
                hint="The storage is too slow or the file makes the reader hang.",
                code="timeout",
            ) from None
        except (EOFError, OSError):
            # A new process that dies at once would be replaced for ever: that one counts.
            if not self.memory[-1] and self._served:
                self._stop()
                return self.ask(request.header, request.timeout_s, *request.blobs)
            raise self._crashed(request) from None
        self._pending = None
        self._served += 1
        if "error" in answer:
            error = answer["error"]
            raise SlideError(error["message"], hint=error["hint"], code=error["code"])
        return answer, blobs

    def close(self) -> None:
        """Stop the process and release the shared memory."""
        self._stop()
        self._stderr.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _start(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair()
        self._stderr.seek(0)
        self._stderr.truncate()
        threads = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._program]
            + [
                str(number)
                for number in (theirs.fileno(), self._file, len(self.memory), *self._arguments)
            ],
            pass_fds=(theirs.fileno(), self._file),
            env={**os.environ, **threads, "PYTHONPATH": root, "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        theirs.close()
        self._socket = ours
        self._served = 0
        return ours

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel on a dead mount
                self._process.wait(timeout=5)
            self._process = None
        self._pending = None

    def _crashed(self, request: _Request) -> SlideError:
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=5)
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stop()
        died = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
        said = f": {words[-1][:200]}" if words else ""
        return SlideError(
            f"The reader process died on {request.name} ({died}{said}).",
            hint="The file is damaged in a way that crashes the C library, or needs more memory "
            "than a reader may use.",
            code="reader_crash",
        )
