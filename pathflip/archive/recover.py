"""Recovers intact rows of a damaged fragment, in a child process.

Damaged lengths and offsets can make native decoding panic, abort, hang or ask for all memory, so
bytes that failed their digest are never decoded in the caller's process.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from pathflip.archive.schema import intact_rows
from pathflip.archive.storage import is_failure, open_table, rows_per_batch
from pathflip.archive.tables import key_of

_SECONDS = 300
_MEMORY = 16 << 30
_GO_ON, _PANICKED = b"+", b"-"
_FAILED_READS = 500  # give up the rest of the fragment after so many


class Salvager:
    """A child process that decodes damaged fragments, one after another.

    It starts with the first fragment, and anew after one on which it panicked, died or hung: what
    native code leaves behind then is nothing to read another fragment with.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; the next fragment starts another."""
        if self._child is None:
            return
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.kill()
        self._child.wait()
        self._child = None

    def decode(
        self, uri: str, table: str, fragment: int, folder: str, *, version: int | None = None
    ) -> None:
        """Write a fragment's rows to ``folder``, as :func:`salvage` reads them.

        Raises:
            OSError: If the process died or took too long.
        """
        if self._child is None:
            self._child = _start()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        order = json.dumps([uri, table, key_of(table), fragment, folder, version])
        answer = b""
        try:
            self._child.stdin.write(order.encode() + b"\n")
            if select.select([self._child.stdout], [], [], _SECONDS)[0]:
                answer = os.read(self._child.stdout.fileno(), 1)
        finally:
            if answer != _GO_ON:
                self.close()
        if not answer:
            raise OSError("The process that read the fragment did not finish.")


def salvage(
    salvager: Salvager, uri: str, table: str, fragment: int, *, version: int | None = None
) -> tuple[pa.Table | None, list[tuple[str, str | None]]]:
    """Read a fragment that may be damaged, of the newest version or of the one that is named.

    Returns:
        Its rows whose checksum is right (None when nothing could be read), and (key, slide_id) of
        the rows that could be read but whose checksum is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="pathflip-salvage-") as folder:
        try:
            salvager.decode(uri, table, fragment, folder, version=version)
            bad = json.loads(Path(folder, "bad.json").read_text())
            with pa.OSFile(str(Path(folder, "good.arrow"))) as source:
                good = pa.ipc.open_file(source).read_all()
        except (OSError, ValueError):
            return None, []
    return good, [(str(key), slide) for key, slide in bad]


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": path, "RUST_BACKTRACE": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )


def _main() -> None:
    """Decode the fragments named on stdin, one JSON line each; answer each by one byte."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing else may look like an answer
    for order in sys.stdin:
        os.write(answers, _PANICKED if _decode(*json.loads(order)) else _GO_ON)


def _decode(uri: str, table: str, key: str, number: int, folder: str, version: int | None) -> bool:
    """Write the good rows and the names of the bad ones; return whether a read panicked."""
    dataset = open_table(uri, table)
    if version is not None and version != dataset.version:
        dataset = dataset.checkout_version(version)
    fragment = dataset.get_fragment(number)
    step, count = rows_per_batch(dataset.schema), fragment.count_rows()
    bad: list[tuple[Any, Any]] = []
    panicked: list[bool] = []  # of each read that failed
    with (
        pa.OSFile(str(Path(folder, "good.arrow")), "wb") as sink,
        pa.ipc.new_file(sink, dataset.schema) as writer,
    ):
        for start in range(0, count, step):
            for rows in _readable(fragment, start, min(start + step, count), panicked):
                ok = intact_rows(rows)
                writer.write_table(rows.filter(pa.array(ok)))
                wrong = rows.filter(pa.array(~ok))
                owners = (
                    wrong["slide_id"].to_pylist()
                    if "slide_id" in wrong.column_names
                    else [None] * wrong.num_rows
                )
                bad += zip(wrong[key].to_pylist(), owners, strict=True)
    Path(folder, "bad.json").write_text(json.dumps(bad))
    return any(panicked)


def _readable(fragment: Any, start: int, stop: int, panicked: list[bool]) -> Iterator[pa.Table]:
    """Yield the rows [start, stop) that can be read, halving ranges that cannot."""
    if len(panicked) > _FAILED_READS:
        return
    try:
        rows = fragment.to_table(offset=start, limit=stop - start)
        rows.validate(full=True)
    except BaseException as error:
        if not is_failure(error):
            raise
        panicked.append(not isinstance(error, Exception))
        if stop - start > 1:
            middle = (start + stop) // 2
            yield from _readable(fragment, start, middle, panicked)
            yield from _readable(fragment, middle, stop, panicked)
        return
    yield rows


if __name__ == "__main__":
    _main()
