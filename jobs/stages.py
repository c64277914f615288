"""Rows through pools of actors: the seam between a job and the engine that runs it.

A job says what its stages are and reads the tables that come back. The engine is processes of this
machine (jobs/local.py) or Ray Data (jobs/ray_data.py), as ``cluster.connect`` found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from jobs import cluster
from jobs.cluster import Place
from jobs.worker import from_ipc, to_ipc
from pathflip.cpus import cpus_here
from pathflip.errors import CheckpointError, PathFLIPError, from_dict

T = TypeVar("T")

BLOCKS_PER_ACTOR = 8  # enough that a slow block at the end costs little
_CARRIED = pa.schema([("table", pa.binary()), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """One pool of actors.

    Attributes:
        actor: Class of the actors; called with a table of rows, one returns a table, or several.
        arguments: Arguments of its constructor.
        shared: Class of an object that all actors share. Each gets, as its last argument, a
            function that calls a method of it: ``call("method", argument, …)``.
        at_once: Rows an actor is given together.
        first: Actors to begin with.
        most: Actors at most; None means as many as a cluster grows to.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor: 1, or 1 / n where n actors share one.
        waits: Whether an actor only waits for processes of its own, so that on this machine a
            thread is enough for it.
        deaths: Processes that may die on the same rows before the job is given up.
    """

    actor: Callable[..., Callable[[pa.Table], pa.Table | Iterator[pa.Table]]]
    arguments: tuple[Any, ...]
    shared: Callable[[], Any] | None = None
    at_once: int = 1
    first: int = 1
    most: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    waits: bool = False
    deaths: int = 3


def run_stages(
    rows: Sequence[dict[str, str]],
    stages: Sequence[ActorPool],
    *,
    place: Place,
    blocks: int | None = None,
    block_bytes: int = 1 << 20,
) -> Iterator[pa.Table]:
    """Give rows to the actors of the first stage, what they make to the next; yield the last's.

    Args:
        rows: Columns of text.
        stages: Stages in order.
        place: Engine; see ``cluster.connect``.
        blocks: Parts that Ray cuts the rows into; None means one for every ``at_once`` rows.
        block_bytes: Largest block of rows between Ray's actors.
    """
    if not rows:
        return
    if place == "local":
        from jobs import local

        gpus = cluster.gpus_here() if any(stage.num_gpus for stage in stages) else 0
        yield from local.run(rows, stages, cpus=cpus_here(), gpus=gpus)
    else:
        from jobs import ray_data

        blocks = blocks or math.ceil(len(rows) / stages[0].at_once)
        yield from ray_data.run(rows, stages, blocks=blocks, block_bytes=block_bytes)


def map_actors(
    rows: Sequence[dict[str, str]],
    actor: Callable[..., Callable[[list[dict[str, str]]], pa.Table]],
    arguments: tuple[Any, ...],
    *,
    place: Place,
    workers: int,
    actors: int | None,
    at_once: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Iterator[pa.Table]:
    """Give rows to one pool of actors; yield the tables they make, in no fixed order.

    Args:
        rows: Columns of text.
        actor: Class of the actors, called with some of the rows. A :class:`PathFLIPError` that it
            raises, or its constructor, ends the job with that error.
        arguments: Arguments of its constructor.
        place: Engine; see ``cluster.connect``.
        workers: Actors that this machine or cluster has room for now.
        actors: Actors at most; None where the user named no number.
        at_once: Rows an actor is given together.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor.

    Raises:
        PathFLIPError: The error an actor raised.
    """
    least = math.ceil(len(rows) / at_once)
    blocks = min(least, max(workers * BLOCKS_PER_ACTOR, math.ceil(least / 64)))
    stage = ActorPool(
        actor=Carrier,
        arguments=(actor, arguments),
        at_once=at_once,
        first=1 if place == "cluster" and actors is None else min(workers, blocks),
        # A cluster may grow: what it is given to do is what makes it grow.
        most=actors or (None if place == "cluster" else workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    for batch in run_stages(rows, [stage], place=place, blocks=blocks):
        for row in batch.to_pylist():
            if row["error"]:
                raise from_dict(json.loads(row["error"]))
            yield from_ipc(row["table"])


@contextmanager
def ended(tables: Iterator[T]) -> Iterator[Iterator[T]]:
    """Yield what a generator over actors gives, and end the actors whatever becomes of the reader.

    An exception would otherwise keep them as long as its traceback.
    """
    try:
        yield tables
    finally:
        if isinstance(tables, Generator):
            tables.close()


class Carrier:
    """Holds an actor of :func:`map_actors`; carries its tables and its errors as rows.

    An error raised in an actor would make Ray start it again and again, or drop rows that have
    nothing to do with it.
    """

    def __init__(self, actor: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._error: PathFLIPError | None = None
        try:
            self._actor = actor(*arguments)
        except PathFLIPError as error:
            self._error = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return one row: the table the actor made of the rows, or its error."""
        carried = {"table": b"", "error": ""}
        try:
            if self._error is not None:
                raise self._error
            carried["table"] = to_ipc(self._actor(rows.to_pylist()))
        except PathFLIPError as error:
            carried["error"] = json.dumps(error.to_dict())
        return pa.Table.from_pylist([carried], schema=_CARRIED)


def wrong_model(run: str) -> CheckpointError:
    """Return the error of an actor that finds another model in a run than the driver did."""
    return CheckpointError(
        f"{run} holds another model on this node than on the driver's.",
        hint="Put the run where every node sees the same folder.",
        code="wrong_model",
    )
