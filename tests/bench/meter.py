"""CPU time and memory of everything a job starts, while it runs.

Snapshots before and after lose the CPU time of processes that end in between, and a job on Ray
starts and ends dozens. So the tree under this process is looked at many times a second and each
process's last value is kept. This process makes itself the reaper of orphans, so that nothing that
daemonises leaves the tree; dead orphans stay readable as zombies until it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_CPU_EVERY_S, _MEMORY_EVERY_S = 0.1, 0.5
_SETTLE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """Cost of one step of a job, over all of its processes.

    Attributes:
        cpu_s: CPU seconds, user and system.
        answer: Output of the job for the step.
        pss_mb: Highest sum of proportional set sizes: shared pages count once.
        rss_mb: Highest plain sum of resident sets: shared pages count in every process.
        parts: CPU seconds by program name.
    """

    cpu_s: float
    answer: dict[str, Any]
    pss_mb: float
    rss_mb: float
    parts: dict[str, float]


def run(
    arguments: list[str], *, memory: bool = False, done: Callable[[Step], None] = lambda _: None
) -> list[Step]:
    """Run this interpreter with ``arguments`` and meter each step it announces.

    The process prints a line ``@{json}`` at the end of each step and waits for a line on its stdin.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = [sys.executable, *arguments]
    # Unbuffered: select() must see every line that was not read yet.
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    if job.stdin is None or job.stdout is None:
        raise AssertionError("both are pipes")
    tree = _Tree(os.getpid())
    steps: list[Step] = []
    before = tree.look()
    weighed_at = 0.0
    while True:
        ready, _, _ = select.select([job.stdout], [], [], _CPU_EVERY_S)
        tree.look()
        if memory and time.monotonic() - weighed_at > _MEMORY_EVERY_S:
            tree.weigh()
            weighed_at = time.monotonic()
        if not ready:
            continue
        line = job.stdout.readline()
        if not line:
            break
        if not line.startswith(b"@"):
            continue
        end = time.monotonic() + _SETTLE_S  # what is being shut down belongs to the step
        while time.monotonic() < end:
            time.sleep(_CPU_EVERY_S)
            tree.look()
        after = tree.look()
        parts: dict[str, float] = {}
        for process, (name, cpu) in after.items():
            spent = cpu - before[process][1] if process in before else cpu
            parts[name] = parts.get(name, 0.0) + spent
        steps.append(
            Step(
                cpu_s=sum(parts.values()),
                answer=json.loads(line[1:]),
                pss_mb=tree.pss_mb,
                rss_mb=tree.rss_mb,
                parts={name: round(cpu, 2) for name, cpu in parts.items() if cpu >= 0.05},
            )
        )
        before = after
        done(steps[-1])
        job.stdin.write(b"\n")
    if job.wait():
        raise RuntimeError(f"the measured job failed: {arguments}")
    while tree.look() and tree.alive:  # the next measurement must not count this one's daemons
        time.sleep(0.1)
    return steps


class _Tree:
    """Descendants of ``root``, alive or gone."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[tuple[int, int], tuple[str, float]] = {}
        self.alive: list[int] = []
        self.pss_mb = self.rss_mb = 0.0

    def look(self) -> dict[tuple[int, int], tuple[str, float]]:
        """Every descendant so far: (pid, start time) -> program, CPU seconds when last seen."""
        found: dict[int, tuple[int, str, str, float, int]] = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                text = Path("/proc", entry, "stat").read_text(errors="replace")
            except OSError:
                continue
            name, _, rest = text.partition("(")[2].rpartition(")")
            fields = rest.split()
            cpu = (int(fields[11]) + int(fields[12])) * _TICK_S
            found[int(entry)] = (int(fields[1]), name, fields[0], cpu, int(fields[19]))
        children: dict[int, list[int]] = {}
        for pid, (parent, *_) in found.items():
            children.setdefault(parent, []).append(pid)
        todo, self.alive = list(children.get(self._root, ())), []
        while todo:
            pid = todo.pop()
            todo += children.get(pid, ())
            _, name, state, cpu, started = found[pid]
            self._seen[pid, started] = (name, cpu)
            if state != "Z":
                self.alive.append(pid)
        return dict(self._seen)

    def weigh(self) -> None:
        """Note the memory of all descendants together, if it is the most so far."""
        pss = rss = 0
        for pid in self.alive:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            sizes = {line.split()[0]: line.split()[1] for line in lines[1:]}
            pss, rss = pss + int(sizes.get("Pss:", 0)), rss + int(sizes.get("Rss:", 0))
        self.pss_mb, self.rss_mb = max(self.pss_mb, pss / 1024), max(self.rss_mb, rss / 1024)
