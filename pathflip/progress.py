"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere.

Whoever works calls back with something that has a line and a fraction (:class:`HasLine`):
:class:`Progress` where counting is all there is to say, a class of its own where a job has more.
What has ``samples()``, too, gives its figures to :mod:`pathflip.job_metrics`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pathflip import job_metrics, json_logs
from pathflip.job_metrics import Sample

logger = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class HasLine(Protocol):
    """State of long work that can be shown: one line, and the share that is done."""

    def line(self) -> str:
        """One line for people."""
        ...

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        ...


Report = Callable[[HasLine], None]
"""Progress callback."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Number of items done, with the time it took.

    Attributes:
        what: Name of the work.
        done: Number of items done.
        total: Number of items in all.
        seconds: Seconds since the work began.
        unit: Name of the items, in the plural.
        note: Further text, such as a loss.
    """

    what: str
    done: int
    total: int
    seconds: float
    unit: str = "slides"
    note: str = ""

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    def line(self) -> str:
        """One line for people, with the rate and the time left."""
        parts = [f"{self.what} {self.done:,}/{self.total:,} {self.unit}", self.note]
        if self.done and self.seconds > 0:
            rate = self.done / self.seconds
            parts.append(f"{rate:,.1f}/s · {duration((self.total - self.done) / rate)} left")
        return " · ".join(part for part in parts if part)

    def samples(self) -> list[Sample]:
        """Return the counts, for Prometheus."""
        labels = {"what": self.what, "unit": self.unit}
        return [
            Sample("pathflip_job_items", self.done, labels),
            Sample("pathflip_job_items_expected", self.total, labels),
        ]


def duration(seconds: float) -> str:
    """Format seconds for people: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yield the callback to give to long work as ``progress``: it is shown and measured."""
    with job_metrics.reported() as measure, _shown() as show:

        def report(progress: HasLine) -> None:
            show(progress)
            measure(progress)

        yield report


@contextmanager
def _shown() -> Iterator[Report]:
    as_json = json_logs.is_set_up()
    if as_json or not sys.stderr.isatty():
        last = [0.0]

        def plain(progress: HasLine) -> None:
            now = time.monotonic()
            if now - last[0] >= LINE_EVERY_S or progress.fraction >= 1:
                last[0] = now
                if as_json:
                    logger.info("%s", progress.line(), extra={"fraction": progress.fraction})
                else:
                    print(progress.line(), file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def moving(progress: HasLine) -> None:
            bar.update(task, completed=progress.fraction, description=progress.line())

        yield moving
