"""Processes of a service on this machine: none may outlive it, whatever ends it.

Ray, its workers, HAProxy and vLLM are a tree of processes whose inner ones may die first. A process
that has called :func:`adopt_orphans` becomes the parent of what they leave, so that everything that
was ever started stays below it, where :func:`kill_below` finds it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from pathflip.imports import without_pandas

_PR_SET_CHILD_SUBREAPER = 36
SETUP_HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "serve.processes.import_serve"}
"""Variable with which Ray calls a function in every process that it starts."""
_KILLING_S = 10.0
"""Seconds to wait for killed processes: one that waits for a disk ends only then."""


def import_serve() -> None:
    """Import Ray Serve without pandas, which it takes along for data frames that nobody sends.

    Each process of a service would hold it: 40 MB and a quarter of a second of CPU. Ray calls this
    in every process it starts (:data:`SETUP_HOOK`), where Arrow is imported already.
    """
    with without_pandas():
        import ray.serve  # noqa: F401


def adopt_orphans(*, on: bool = True) -> None:
    """Let orphans below this process become its children, and not those of the machine's first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def children(pid: int) -> set[int]:
    """Processes whose parent this is, also those that have ended and wait to be reaped."""
    return {child for child, (parent, _) in _processes().items() if parent == pid}


def below(pid: int) -> list[int]:
    """Running processes below one."""
    every = _processes()
    inner: dict[int, list[int]] = {}
    for child, (parent, _) in every.items():
        inner.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        own = inner.get(todo.pop(), [])
        todo += own
        found += [child for child in own if every[child][1] != "Z"]
    return found


def above(pid: int) -> list[int]:
    """The process itself, its parent, and so on."""
    every, found = _processes(), [pid]
    while found[-1] in every:
        found.append(every[found[-1]][0])
    return found[:-1]


def kill_below(pid: int) -> None:
    """Kill all processes below one, and what these start meanwhile."""
    deadline = time.monotonic() + _KILLING_S
    while (left := below(pid)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def reap(pids: set[int]) -> None:
    """Take the end of children that have ended, so that nothing of them stays."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def listener(port: int) -> int | None:
    """A process of this user that listens at a TCP port of this machine; None if none is seen."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = row.split()
                if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{words[9]}]")
    for pid in _processes() if sockets else ():
        with suppress(OSError):  # another user's
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if os.readlink(entry) in sockets:
                        return pid
    return None


def command_line(pid: int) -> list[str]:
    """Words of a process's command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _processes() -> dict[int, tuple[int, str]]:
    """{process: (parent, state)} of this machine."""
    found = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with suppress(OSError, IndexError):
                words = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                found[int(entry)] = int(words[1]), words[0]
    return found
