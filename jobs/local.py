"""Actors of a job in processes of this machine, without Ray: few processes, started as work comes.

One loop in the driver gives rows to idle actors and takes what they make. A process that dies costs
its rows nothing: they go to another one, and only rows on which several died end the job. Queues
between stages are short, so memory does not grow with the number of slides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs import worker
from jobs.cluster import PATIENT
from jobs.worker import GONE, from_ipc, to_ipc
from pathflip.errors import PathFLIPError, from_dict

if TYPE_CHECKING:
    from jobs.stages import ActorPool

_ROOT = str(Path(__file__).resolve().parents[1])  # of pathflip and jobs
_LOOK_S = 1.0  # deaths that no connection tells of, as a child of the process holds it
_END_S = 10.0  # for a process to end by itself once its work is done
_AHEAD = 2  # rows that wait for a stage, for each of its actors


def run(
    rows: Sequence[dict[str, Any]], stages: Sequence[ActorPool], *, cpus: int, gpus: int
) -> Iterator[pa.Table]:
    """Give rows to the actors of the first stage, what they make to the next; yield the last's.

    Args:
        rows: Rows of the first stage.
        stages: Stages in order.
        cpus: CPUs of this machine.
        gpus: Its GPUs.

    Raises:
        PathFLIPError: Several processes died on the same rows (``workers_died``), or an actor
            raised it.
        RuntimeError: An actor raised; the message has its traceback.
    """
    pools = [_Pool(stage, cpus=cpus, gpus=gpus) for stage in stages]
    pools[0].put(pa.Table.from_pylist(list(rows)))
    for pool in pools:
        pool.expect()  # an actor loads its model while the first rows are on their way
    done = False
    try:
        while any(pool.waiting or pool.busy for pool in pools):
            for at in reversed(range(len(pools))):
                if at + 1 == len(pools) or pools[at + 1].has_room:
                    pools[at].give()
            at_work = {
                one.connection: (at, one) for at, pool in enumerate(pools) for one in pool.busy
            }
            for connection in wait(list(at_work), timeout=_LOOK_S):
                at, one = at_work[connection]  # type: ignore[index]
                for table in pools[at].take(one):
                    if at + 1 == len(pools):
                        yield table
                    else:
                        pools[at + 1].put(table)
            for pool in pools:
                pool.bury()
        done = True
    finally:
        for pool in pools:
            pool.end(kill=not done)


@dataclass
class _Rows:
    """Rows that are given to an actor together, and the processes that died on them."""

    table: pa.Table
    deaths: int = 0


class _Pool:
    """Actors of one stage, and the rows that wait for them."""

    def __init__(self, stage: ActorPool, *, cpus: int, gpus: int) -> None:
        self._stage = stage
        sharing = int(1 // stage.num_gpus) if stage.num_gpus else 0  # actors of a GPU
        room = gpus * sharing if sharing else int(cpus // max(stage.num_cpus, 0.1))
        self._most = max(1, min(stage.most or room, room))
        self._gpus = [*range(gpus)] * sharing
        self._actors: list[_Actor] = []
        self._shared = None if stage.shared is None else stage.shared()
        self.waiting: deque[_Rows] = deque()

    @property
    def busy(self) -> list[_Actor]:
        """Actors at work."""
        return [one for one in self._actors if one.rows is not None]

    @property
    def has_room(self) -> bool:
        """Room for what the stage before makes next: it would not wait for long."""
        return len(self.waiting) < _AHEAD * self._most

    def put(self, table: pa.Table) -> None:
        """Queue rows."""
        step = self._stage.at_once
        for start in range(0, len(table), step):
            self.waiting.append(_Rows(table.slice(start, step)))

    def expect(self) -> None:
        """Start one actor."""
        self._actors.append(_Actor(self._stage, gpu=self._gpus.pop(0) if self._gpus else None))

    def give(self) -> None:
        """Give waiting rows to idle actors; start another where all are busy and there may be."""
        idle = [one for one in self._actors if one.rows is None]
        while self.waiting and (idle or len(self._actors) < self._most):
            if not idle:
                self.expect()
                idle.append(self._actors[-1])
            idle.pop(0).give(self.waiting.popleft())

    def take(self, one: _Actor) -> list[pa.Table]:
        """Return the table an actor made; none where it is done, asked for something, or died."""
        try:
            what, content = one.connection.recv()
        except GONE:
            self._lose(one)
            return []
        if what == "call":
            method, arguments = content
            with suppress(*GONE):  # its end is seen in the next round
                one.connection.send(getattr(self._shared, method)(*arguments))
            return []
        if what == "error":
            raise from_dict(content)
        if what == "failed":
            raise RuntimeError(f"{self._stage.actor.__name__} failed.\n{content}")
        if what == "table":
            table = from_ipc(content)
            if not one.may_die:
                return [table]
            one.made.append(table)  # another one makes it again where this one dies before the end
            return []
        made, one.rows, one.made = one.made, None, []
        return made

    def bury(self) -> None:
        """Look for processes that died though something of theirs still holds the connection."""
        for one in list(self._actors):
            if one.is_dead and not (one.rows is not None and one.connection.poll()):
                self._lose(one)

    def _lose(self, one: _Actor) -> None:
        said = one.end(kill=True)
        self._actors.remove(one)
        if one.gpu is not None:
            self._gpus.insert(0, one.gpu)
        rows = one.rows
        if rows is None:
            return
        rows.deaths += 1
        if rows.deaths > self._stage.deaths:
            raise PathFLIPError(
                f"{rows.deaths} processes died one after the other on the same work"
                f"{': ' + said if said else '.'}",
                hint="They were killed, or ran out of memory: see the memory of this machine, then "
                "run the same command again.",
                code="workers_died",
            )
        self.waiting.appendleft(rows)

    def end(self, *, kill: bool) -> None:
        """End all actors: by themselves, as nothing is left to do, or at once."""
        for one in self._actors:
            one.connection.close()
        for one in self._actors:
            one.end(kill=kill)
        self._actors.clear()


class _Actor:
    """One actor, its process or thread, and the rows it works on."""

    def __init__(self, stage: ActorPool, *, gpu: int | None) -> None:
        self.gpu = gpu
        self.rows: _Rows | None = None
        self.made: list[pa.Table] = []
        self.connection, theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if _in_thread(stage):
            self._thread = threading.Thread(
                target=worker.serve, args=(theirs,), name=stage.actor.__name__, daemon=True
            )
            self._thread.start()
        else:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = _start(stage, theirs, gpu=gpu, stderr=self._stderr)
            theirs.close()
        self._tell((stage.actor, stage.arguments, stage.shared is not None))

    @property
    def may_die(self) -> bool:
        """Return whether it may die while the driver lives: it is a process, not a thread."""
        return self._process is not None

    @property
    def is_dead(self) -> bool:
        """Death of its process."""
        return self._process is not None and self._process.poll() is not None

    def give(self, rows: _Rows) -> None:
        """Give it rows."""
        self.rows = rows
        self._tell(to_ipc(rows.table))

    def _tell(self, message: Any) -> None:
        with suppress(*GONE):  # its end is seen when the driver listens
            self.connection.send(message)

    def end(self, *, kill: bool) -> str:
        """End it; return the last line its process wrote to stderr."""
        self.connection.close()
        if self._thread is not None and not kill:
            self._thread.join(_END_S)
        if self._process is None:
            return ""
        if not kill:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stderr.close()
        return lines[-1][:300] if lines else ""


def _in_thread(stage: ActorPool) -> bool:
    """Return whether a thread of the driver is enough for an actor."""
    return stage.waits


def _start(
    stage: ActorPool, theirs: Connection, *, gpu: int | None, stderr: Any
) -> subprocess.Popen[bytes]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(gpu)]
    path = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        # Not the working folder first: a jobs.py may lie there.
        [sys.executable, "-P", "-m", worker.__name__, str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        env={
            "OMP_NUM_THREADS": str(max(1, int(stage.num_cpus))),
            **PATIENT,
            "LANCE_LOG": "error",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "CUDA_VISIBLE_DEVICES": "" if gpu is None else visible[gpu % len(visible)],
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
