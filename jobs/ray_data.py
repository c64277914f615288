"""Actors of a job on Ray Data: beyond one machine, or where ``--ray`` asks for it.

Jobs come here through jobs/stages.py. Ray starts an actor that dies again, for ever, and gives its
rows to another one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from jobs.stages import ActorPool


def run(
    rows: Sequence[dict[str, str]], stages: Sequence[ActorPool], *, blocks: int, block_bytes: int
) -> Iterator[pa.Table]:
    """Give rows to the actors of the first stage, what they make to the next; yield the last's.

    Args:
        rows: Columns of text.
        stages: Stages in order.
        blocks: Parts the rows are cut into.
        block_bytes: Largest block of rows between two stages.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.target_max_block_size = block_bytes
    data: Any = ray.data.from_items(list(rows), override_num_blocks=blocks)
    for stage in stages:
        shared = () if stage.shared is None else (_Shared(stage.shared),)
        data = data.map_batches(
            stage.actor,
            fn_constructor_args=(*stage.arguments, *shared),
            batch_size=stage.at_once,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=stage.most, initial_size=stage.first),
            num_cpus=stage.num_cpus,
            num_gpus=stage.num_gpus,
        )
    yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


class _Shared:
    """An object that all actors of a stage call: one more actor, which holds it."""

    def __init__(self, kind: Any) -> None:
        import ray

        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._actor = ray.remote(kind).options(**options).remote()

    def __call__(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments))
