"""Read-ahead of batches for the training loop, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import torch

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
    pin: torch.device | None = None,
) -> Iterator[list[Batch]]:
    """Yield a worker's micro-batches of steps ``start`` to ``stop``, read ahead by a thread.

    Args:
        dataset: Dataset that draws the batches.
        start: First step.
        stop: Step after the last.
        rank: This worker.
        world: Number of workers.
        pin: GPU for whose copies they are put into page-locked memory; None for a CPU.
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
            if pin is not None and pin.index is not None:
                torch.cuda.set_device(pin)  # a thread's own; it would take memory of the first
            for step in range(start, stop):
                if over.is_set():
                    return
                made = dataset.micro_batches(step, rank=rank, world=world, pin=pin is not None)
                offer(list(made))
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
