"""Stages of the demo: announced, timed, and run beside each other where one core is enough."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from pathflip.errors import PathFLIPError, TrainingError, from_dict


@dataclass
class Lane:
    """Work in a process of its own; ``result`` is there when the block beside it has ended."""

    result: Any = None


@dataclass
class Stages:
    """Announcer of stages on stderr, with the time each took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def run(self, name: str, saying: str) -> Iterator[None]:
        """Time one stage."""
        print(f"{saying} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    @contextmanager
    def beside(
        self, name: str, saying: str, work: Callable[..., Any], *args: Any
    ) -> Iterator[Lane]:
        """Run ``work(*args)`` in a process of its own beside the block, and wait for both.

        Raises:
            PathFLIPError: The error of the work. One of the block ends the work.
        """
        print(f"{saying}, beside what follows …", file=sys.stderr, flush=True)
        context = get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(there, work, args), daemon=True)
        process.start()
        there.close()
        lane = Lane()
        try:
            yield lane
            try:
                found = here.recv()
            except EOFError:
                process.join()
                raise TrainingError(
                    f"The process of {name} ended with {process.exitcode}.",
                    hint="The same command goes on where this one stopped.",
                    code="workers_died",
                ) from None
        finally:
            process.terminate()
            process.join()
            here.close()
        if "error" in found:
            raise from_dict(found["error"])
        self.seconds[name], lane.result = found["seconds"], found["result"]


def _work(there: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    start = time.monotonic()
    try:
        result = work(*args)
        there.send({"result": result, "seconds": time.monotonic() - start})
    except PathFLIPError as error:
        there.send({"error": error.to_dict()})
    except KeyboardInterrupt:
        pass  # so was the command, which says so
