"""Metrics of a running job, in a file that Prometheus reads through node_exporter.

``PATHFLIP_METRICS`` names the file, in the folder of its textfile collector. The file's name is
the label ``run`` of every series, so the same command again goes on with the same series. The file
outlives the job: one that was killed is seen by a ``pathflip_job_updated_timestamp_seconds`` that
grows old while ``pathflip_job_running`` is 1. No series names a slide. ``platform/observability``
has the dashboard and the alerts that read them.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pathflip.errors import ConfigError
from pathflip.files import replacing

logger = logging.getLogger(__name__)

FILE = "PATHFLIP_METRICS"
"""Environment variable with the file of a job."""
EVERY_S = 5.0
"""Seconds between two writes of the file, at least."""

METRICS = {
    "pathflip_job_running": ("gauge", "1 until the job has ended, whatever the end."),
    "pathflip_job_failed": ("gauge", "1 where the job ended with an error or was interrupted."),
    "pathflip_job_progress_ratio": ("gauge", "Share of the present work that is done."),
    "pathflip_job_updated_timestamp_seconds": ("gauge", "Time of the last progress."),
    "pathflip_job_items": ("gauge", "Items of the present work that are done."),
    "pathflip_job_items_expected": ("gauge", "Items of the present work."),
    "pathflip_ingest_slides_total": ("counter", "Slides done, by what became of them."),
    "pathflip_ingest_slides_expected": ("gauge", "Slides found."),
    "pathflip_ingest_quarantined_total": ("counter", "Slides quarantined, by reason."),
    "pathflip_ingest_regions_total": ("counter", "Regions committed."),
    "pathflip_ingest_patches_total": ("counter", "Patches embedded."),
    "pathflip_ingest_bytes_total": ("counter", "Bytes of the slides done."),
    "pathflip_ingest_commit_seconds": ("summary", "Time of commits to the archive."),
    "pathflip_train_step": ("gauge", "Optimisation steps done."),
    "pathflip_train_steps_expected": ("gauge", "Optimisation steps of the run."),
    "pathflip_train_loss": ("gauge", "Loss of the last step."),
    "pathflip_train_items_per_second": ("gauge", "Items trained on in a second."),
    "pathflip_train_validation": ("gauge", "Figures of the last validation, such as recall."),
}
"""{metric: type and text}."""


class Sample(NamedTuple):
    """One figure of a job.

    Attributes:
        metric: One of :data:`METRICS`; of a summary, with ``_sum`` or ``_count``.
        value: The figure.
        labels: Its labels, beside ``run``.
    """

    metric: str
    value: float
    labels: Mapping[str, str] = {}


@contextmanager
def reported() -> Iterator[Callable[[Any], None]]:
    """Yield the callback that keeps the file of a job up to date until the block ends.

    It takes the state of long work (:class:`pathflip.progress.HasLine`), whose ``samples()``, where
    it has that, are written too. Without ``PATHFLIP_METRICS`` nothing is written.

    Raises:
        ConfigError: The file is in no folder, or is not called ``*.prom``.
    """
    named = os.environ.get(FILE)
    if not named:
        yield lambda _: None
        return
    file = _File(_checked(Path(named)))
    file.write(running=True)
    failed = True
    try:
        yield file.note
        failed = False
    finally:
        file.write(running=False, failed=failed)


def _checked(path: Path) -> Path:
    path = path.expanduser().absolute()
    if path.suffix != ".prom" or not path.parent.is_dir():
        raise ConfigError(
            f"{FILE} is {path}; it must be a file *.prom in a folder that is there.",
            hint="Name one in the folder of node_exporter's --collector.textfile.directory.",
            code="metrics",
        )
    return path


class _File:
    """The file of one job."""

    def __init__(self, path: Path) -> None:
        self._path, self._samples = path, list[Sample]()
        self._written, self._updated, self._told = -math.inf, time.time(), False

    def note(self, progress: Any) -> None:
        """Keep the figures of a state, and write them where the last ones were a while ago."""
        own = progress.samples() if hasattr(progress, "samples") else ()
        self._samples = [Sample("pathflip_job_progress_ratio", progress.fraction), *own]
        self._updated = time.time()
        if time.monotonic() - self._written >= EVERY_S:
            self.write(running=True)

    def write(self, *, running: bool, failed: bool = False) -> None:
        """Write the file. A job goes on where that fails, and says so once."""
        self._written = time.monotonic()
        samples = [
            Sample("pathflip_job_running", running),
            Sample("pathflip_job_failed", failed),
            Sample("pathflip_job_updated_timestamp_seconds", self._updated),
            *self._samples,
        ]
        try:
            with replacing(self._path, one_writer=True) as part:
                part.write_text(render(samples, run=self._path.stem), encoding="utf-8")
        except OSError as error:
            if not self._told:
                logger.warning("Metrics cannot be written to %s: %s", self._path, error.strerror)
            self._told = True


def render(samples: list[Sample], *, run: str) -> str:
    """Render figures in Prometheus' text format.

    Args:
        samples: The figures.
        run: Label of all of them.
    """
    by_metric: dict[str, list[str]] = {}
    for sample in samples:
        name = sample.metric.removesuffix("_sum").removesuffix("_count")
        labels = ",".join(
            f'{key}="{_escaped(value)}"' for key, value in {"run": run, **sample.labels}.items()
        )
        value = float(sample.value)
        by_metric.setdefault(name, []).append(f"{sample.metric}{{{labels}}} {value!r}\n")
    text = ""
    for name, lines in by_metric.items():
        kind, what = METRICS[name]
        text += f"# HELP {name} {what}\n# TYPE {name} {kind}\n{''.join(lines)}"
    return text


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
