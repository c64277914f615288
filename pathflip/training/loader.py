"""Read-ahead of batches for the training loop, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from pathflip.training.objective import Batch, Dataset

AHEAD = 2
"""Steps read ahead of the one being trained on."""


def stream(
    dataset: Dataset,
    start: int,
    stop: int,
    *,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Iterator[list[Batch]]:
    """Yield a worker's micro-batches of steps ``start`` to ``stop``, read ahead by a thread.

    Args:
        dataset: Dataset that draws the batches.
        start: First step.
        stop: Step after the last.
        rank: This worker.
        world: Number of workers.
        pin: Put them into page-locked memory, for copies to a GPU.
    """
    ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(AHEAD)
    over = threading.Event()

    def offer(item: list[Batch] | BaseException | None) -> None:
        while not over.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in range(start, stop):
                if over.is_set():
                    return
                made = dataset.micro_batches(step, rank=rank, world=world)
                offer([batch.pin_memory() for batch in made] if pin else list(made))
            offer(None)
        except BaseException as error:  # raised again where it is waited for
            offer(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        over.set()
        thread.join()
