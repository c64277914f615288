"""Rows over Ray Data actors that each hold a vLLM engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from pathflip.errors import ArchiveError, CheckpointError, ConfigError, PathFLIPError
from pathflip.vllm_engine import EngineConfig

_KINDS: dict[str, type[PathFLIPError]] = {
    kind.__name__: kind for kind in (ArchiveError, CheckpointError, ConfigError)
}


def spread(
    rows: Sequence[dict[str, str]],
    actor: type,
    arguments: tuple[Any, ...],
    *,
    at_once: int,
    actors: int | None,
    engine: EngineConfig,
    address: str | None,
) -> Iterator[list[dict[str, str]]]:
    """Give rows to actors and yield what they return, a batch at a time, in no fixed order.

    Args:
        rows: What to do; columns of text.
        actor: Class of the actors: takes {column: values}, returns the same with a column
            ``fatal``, empty or an error by :func:`fatal`. It must not raise: Ray would start it
            again and again.
        arguments: Of its constructor.
        at_once: Rows given to an actor together.
        actors: How many; None means one per GPU, or one where there is none.
        engine: Whether they need a GPU.
        address: Ray cluster; see ``cluster.connect``.

    Raises:
        PathFLIPError: The error an actor returned.
    """
    if not rows:
        return
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from jobs.cluster import connect

    connect(address)
    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    resources = dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0)) if engine.device != "cpu" else 0
    blocks = -(-len(rows) // at_once)
    done = ray.data.from_items(list(rows), override_num_blocks=blocks).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=at_once,
        compute=ActorPoolStrategy(size=min(actors or max(gpus, 1), blocks)),
        num_cpus=float(engine.threads),
        num_gpus=1.0 if gpus or engine.device == "cuda" else 0.0,
    )
    batches: Any = done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in batches:
        found = batch.to_pylist()
        for row in found:
            if row["fatal"]:
                error = json.loads(row["fatal"])
                kind = _KINDS.get(error.pop("kind"), ConfigError)
                raise kind(error.pop("message"), **error)
        yield found


def tell(error: PathFLIPError) -> dict[str, str]:
    """An error as JSON."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def fatal(error: PathFLIPError) -> str:
    """An error that ends the job, as actors return it."""
    return json.dumps({"kind": type(error).__name__, **tell(error)})
