"""Progress of a job for people: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_EVERY_S = 10.0


class HasLine(Protocol):
    """What is shown: one line, and how much of the whole is done."""

    def line(self) -> str:
        """One line for people."""
        ...

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        ...


@contextmanager
def show_progress() -> Iterator[Callable[[HasLine], None]]:
    """Yield the callback to give a job as ``progress``."""
    if not sys.stderr.isatty():
        last = [0.0]

        def plain(progress: HasLine) -> None:
            now = time.monotonic()
            if now - last[0] >= LINE_EVERY_S or progress.fraction >= 1:
                last[0] = now
                print(progress.line(), file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def moving(progress: HasLine) -> None:
            bar.update(task, completed=progress.fraction, description=progress.line())

        yield moving
