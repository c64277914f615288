"""A reader process that fails as it begins with a slide, and an ingest whose readers do.

The process has the slide open by then and has said that it works on it, so a failure is counted
as one of that slide however busy the machine is. What fails, and how, stands in a folder.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pathflip.slides import reader_child
from pathflip.slides.reader import SlideReader

FOLDER = "PATHFLIP_TEST_FAILURES"
"""Variable that names the folder; without it nothing fails."""
PLAN = "plan.json"


@contextmanager
def failing(folder: Path, plan: dict[str, tuple[str, str]], *, times: int = 99) -> Iterator[None]:
    """Have the readers of this process, and of those that see the folder, fail on some slides.

    Args:
        folder: A new folder; see :func:`failed`.
        plan: {name of a slide: (request: ``plan``, ``read`` or ``tile``, a function below)}.
        times: Failures of each slide, after which it is read as any other.
    """
    write_plan(folder, plan, times=times)
    with (
        mock.patch.dict(os.environ, {FOLDER: str(folder)}),
        mock.patch.object(SlideReader, "program", __name__),
    ):
        yield


def write_plan(folder: Path, plan: dict[str, tuple[str, str]], *, times: int) -> None:
    """Make the folder of :func:`failing`, for processes that have it named otherwise."""
    folder.mkdir()
    (folder / PLAN).write_text(json.dumps({"slides": plan, "times": times}))
    held(folder).mkdir()


def held(folder: Path) -> Path:
    """Folder of the files of :func:`hold`."""
    return folder.with_suffix(".held")


def failed(folder: Path) -> dict[str, list[int]]:
    """Return {name of a slide: readers that failed on it, by pid}."""
    return {
        path.name: [int(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
        if path.name != PLAN
    }


def abort(_: Path) -> None:
    """End as GLib does when it cannot allocate."""
    os.kill(os.getpid(), signal.SIGABRT)


def hang(_: Path) -> None:
    """Never answer."""
    os.kill(os.getpid(), signal.SIGSTOP)


def swap(path: Path) -> None:
    """Put another slide in the place of this one."""
    os.replace(path.with_name(f".{path.name}.new"), path)


def delete(path: Path) -> None:
    """Take the slide away."""
    path.unlink()


def slow(_: Path) -> None:
    """Answer late, but in time."""
    time.sleep(1)


def stall(_: Path) -> None:
    """Answer after the deadline: the process is ended meanwhile."""
    time.sleep(3600)


def fail_reads(_: Path) -> None:
    """Let every read of the file system fail from here on, as a share that lost its server."""

    def failing(*_: Any) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    os.pread = failing  # type: ignore[assignment]


def unmount(path: Path) -> None:
    """Leave an empty folder in the place of the slide's."""
    path.parent.rename(path.parent.with_name("away"))
    path.parent.mkdir()


def hold(path: Path) -> None:
    """Note the host in a file, and wait until that is removed."""
    note = held(Path(os.environ[FOLDER])) / path.name
    made = note.with_suffix(".new")
    made.write_text(os.uname().nodename)
    made.rename(note)
    while note.exists():
        time.sleep(0.05)


def kill_actor(_: Path) -> None:
    """Kill the process that asked, and go on as if in C code that takes for ever."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)


def kill_node(_: Path) -> None:
    """Kill the raylet above the process that asked."""
    above = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    assert "raylet" in Path(f"/proc/{above}/cmdline").read_text()
    os.kill(int(above), signal.SIGKILL)
    time.sleep(3600)


class FailingReader(reader_child.ReaderChild):
    """Reader that fails where the plan says so."""

    def plan(self, request: dict[str, Any], blobs: list[bytes]) -> reader_child.Answer:
        """Answer ``SlideReader.plan``, or fail."""
        self._fail("plan", request)
        return super().plan(request, blobs)

    def read(self, request: dict[str, Any], blobs: list[bytes]) -> reader_child.Answer:
        """Answer ``SlideReader.start_read``, or fail."""
        self._fail("read", request)
        return super().read(request, blobs)

    def tile(self, request: dict[str, Any], blobs: list[bytes]) -> reader_child.Answer:
        """Answer ``SlideReader.tile``, or fail."""
        self._fail("tile", request)
        return super().tile(request, blobs)

    def _fail(self, asked: str, request: dict[str, Any]) -> None:
        path, folder = Path(request["path"]), Path(os.environ[FOLDER])
        plan = json.loads((folder / PLAN).read_text())
        when, how = plan["slides"].get(path.name, ("", ""))
        if asked != when or len(failed(folder).get(path.name, ())) >= plan["times"]:
            return
        self.slide(request)
        with open(folder / path.name, "a") as log:
            print(os.getpid(), file=log)
        globals()[how](path)


if __name__ == "__main__":
    reader_child.ReaderChild = FailingReader  # type: ignore[misc]
    reader_child.main(sys.argv[1:])
