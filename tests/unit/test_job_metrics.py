"""Metrics of jobs: the file, and what it says of a job that ends, fails, or is killed."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pathflip import job_metrics
from pathflip.errors import ConfigError
from pathflip.job_metrics import Sample, render
from pathflip.progress import Progress, show_progress

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(text: str) -> Series:
    """Return {(name, labels): value} as Prometheus' own client reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a job."""
    path = tmp_path / "main.prom"
    monkeypatch.setenv(job_metrics.FILE, str(path))
    monkeypatch.setattr(job_metrics, "EVERY_S", 0.0)
    return path


def value(file: Path, name: str, **labels: str) -> float:
    """Return a figure of a file."""
    return series(file.read_text())[name, tuple(sorted(({"run": "main"} | labels).items()))]


def test_the_file_tells_of_the_work_while_it_runs_and_of_its_end(file: Path) -> None:
    with show_progress() as progress:
        assert value(file, "pathflip_job_running") == 1
        progress(Progress(what="index", done=3, total=12, seconds=2.0))
        labels = {"what": "index", "unit": "slides"}
        assert value(file, "pathflip_job_items", **labels) == 3
        assert value(file, "pathflip_job_items_expected", **labels) == 12
        assert value(file, "pathflip_job_progress_ratio") == 0.25
    assert value(file, "pathflip_job_running") == 0
    assert value(file, "pathflip_job_failed") == 0
    assert value(file, "pathflip_job_items", **labels) == 3
    assert [path.name for path in file.parent.iterdir()] == ["main.prom"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_error_and_an_interrupt_are_told(file: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), show_progress():
        raise error
    assert value(file, "pathflip_job_running") == 0
    assert value(file, "pathflip_job_failed") == 1


def test_the_time_is_that_of_the_last_progress(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is how a job that was killed, or hangs, is noticed."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with show_progress() as progress:
        clock[0] = 1500.0
        progress(Progress(what="index", done=1, total=2, seconds=2.0))
        clock[0] = 9000.0
    assert value(file, "pathflip_job_updated_timestamp_seconds") == 1500.0


def test_what_cannot_be_written_costs_no_job(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING), show_progress() as progress:
        monkeypatch.setattr(os, "replace", _full)
        for done in range(3):
            progress(Progress(what="index", done=done, total=2, seconds=2.0))
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_without_the_variable_nothing_is_written(tmp_path: Path) -> None:
    assert job_metrics.FILE not in os.environ
    with show_progress() as progress:
        progress(Progress(what="index", done=1, total=2, seconds=2.0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["main.txt", "nowhere/main.prom"])
def test_a_file_that_nobody_would_collect_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job_metrics.FILE, str(tmp_path / name))
    with pytest.raises(ConfigError) as caught, show_progress():
        pass
    assert caught.value.code == "metrics"


def test_values_of_labels_are_read_back_as_they_are() -> None:
    hard = 'a "b"\\n\\ c\nd'
    samples = [
        Sample("pathflip_ingest_quarantined_total", 2, {"reason": hard}),
        Sample("pathflip_train_loss", float("nan")),
        Sample("pathflip_ingest_quarantined_total", 3, {"reason": "mpp"}),
        Sample("pathflip_train_step", 10**9),
    ]
    found = series(render(samples, run=hard))
    for sample in samples:
        labels = tuple(sorted(({"run": hard} | dict(sample.labels)).items()))
        read = found.pop((sample.metric, labels))
        assert read == sample.value or (read != read and sample.value != sample.value)
    assert not found
