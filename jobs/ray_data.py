"""Ray Data as the jobs use it: its settings, the machines there are, rows over a pool of actors.

:func:`set_up` and :func:`available` are for every job on Ray Data. :func:`map_actors` is a whole
job of one stage: rows go to actors that each hold a model, tables come back, and an error of an
actor is raised on the driver.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pathflip.errors import CheckpointError, ConfigError, PathFLIPError, from_dict

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

BLOCKS_PER_ACTOR = 8  # enough that a slow block at the end costs little
_CARRIED = pa.schema([("table", pa.binary()), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Available:
    """CPUs and GPUs of a Ray cluster that a job may use.

    Attributes:
        cpus: CPUs of the cluster.
        gpus: Its GPUs; 0 where the job's device is ``cpu``.
        use_gpu: Whether the job runs on GPUs. On a cluster that grows there may be none yet.
    """

    cpus: int
    gpus: int
    use_gpu: bool


def set_up(*, block_bytes: int | None = None) -> None:
    """Set Ray Data up in the driver: no bars, no chatter, and no block of rows may fail unseen.

    Args:
        block_bytes: Largest block of rows; None leaves Ray's own.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    if block_bytes is not None:
        context.target_max_block_size = block_bytes


def available(device: str, *, private: bool) -> Available:
    """Return the CPUs and GPUs that a job may use; Ray is connected to already.

    Args:
        device: The job's setting: auto, cpu or cuda.
        private: Whether Ray runs on this machine alone, as ``cluster.connect`` says.

    Raises:
        ConfigError: The device is cuda and this machine, which is all there is, has no GPU
            (``no_gpu``).
    """
    import ray

    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(found.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and private and not gpus:
        raise ConfigError(
            "device is cuda but this machine has no GPU.",
            hint="Leave device on auto, or name a cluster with GPUs (--address).",
            code="no_gpu",
        )
    return Available(cpus=int(found.get("CPU", 1)), gpus=gpus, use_gpu=gpus > 0 or device == "cuda")


def spread(
    slides: int, *, workers: int, actors: int | None, private: bool
) -> tuple[int, ActorPoolStrategy]:
    """Return the blocks that slides are cut into, and the pool of actors they are given to.

    Args:
        slides: Number of slides.
        workers: Actors that this machine or cluster has room for now.
        actors: Actors at most; None where the user named no number.
        private: Whether Ray runs on this machine alone, as ``cluster.connect`` says.
    """
    from ray.data import ActorPoolStrategy

    blocks = min(slides, max(workers * BLOCKS_PER_ACTOR, math.ceil(slides / 64)))
    return blocks, ActorPoolStrategy(
        min_size=1,
        # A cluster may grow: what it is given to do is what makes it grow.
        max_size=actors or (workers if private else None),
        initial_size=min(workers, blocks) if private else 1,
    )


def map_actors(
    rows: Sequence[dict[str, str]],
    actor: Callable[..., Callable[[list[dict[str, str]]], pa.Table]],
    arguments: tuple[Any, ...],
    *,
    at_once: int,
    blocks: int | None = None,
    pool: ActorPoolStrategy,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Iterator[pa.Table]:
    """Give rows to a pool of actors; yield the tables they make, in no fixed order.

    Args:
        rows: Columns of text.
        actor: Class of the actors, called with some of the rows. A :class:`PathFLIPError` that it
            raises, or its constructor, ends the job with that error.
        arguments: Arguments of its constructor.
        at_once: Rows an actor is given together.
        blocks: Parts the rows are cut into; None means one for every ``at_once`` rows.
        pool: Number of actors.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor.

    Raises:
        PathFLIPError: The error an actor raised.
    """
    if not rows:
        return
    import ray.data

    set_up(block_bytes=1 << 20)
    made = ray.data.from_items(
        list(rows), override_num_blocks=blocks or -(-len(rows) // at_once)
    ).map_batches(
        Carrier,
        fn_constructor_args=(actor, arguments),
        batch_size=at_once,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    batches: Any = made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in batches:
        for row in batch.to_pylist():
            if row["error"]:
                raise from_dict(json.loads(row["error"]))
            yield from_ipc(row["table"])


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


def to_ipc(table: pa.Table) -> bytes:
    """Return a table as bytes, which a row can carry."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(data: bytes) -> pa.Table:
    """Return the table of :func:`to_ipc`."""
    return pa.ipc.open_stream(data).read_all()


def wrong_model(run: str) -> CheckpointError:
    """Return the error of an actor that finds another model in a run than the driver did."""
    return CheckpointError(
        f"{run} holds another model on this node than on the driver's.",
        hint="Put the run where every node sees the same folder.",
        code="wrong_model",
    )
