"""Logs as lines of JSON: of commands, of jobs with their ids, of the service."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pathflip import json_logs
from pathflip.archive import Archive
from pathflip.cli import main
from pathflip.progress import Progress, show_progress
from pathflip.synth import make_slide
from serve import logs


@pytest.fixture
def restored() -> Iterator[None]:
    """Loggers as they were before the test."""
    own = [logging.getLogger(name) for name in json_logs.LOGGERS]
    before = [(one.handlers, one.propagate, one.level) for one in own]
    yield
    for one, (handlers, propagate, level) in zip(own, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    """Ask for lines of JSON."""
    monkeypatch.setenv(json_logs.FORMAT, "json")


def lines(text: str) -> list[dict[str, Any]]:
    """Parse what was logged: every line is a document."""
    return [json.loads(line) for line in text.splitlines()]


def test_an_error_of_a_command_is_a_line(
    as_json: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["archive", "stats", "--archive", str(tmp_path / "none")])
    (line,) = lines(capsys.readouterr().err)
    assert (end.value.code, line["level"], line["code"]) == (2, "ERROR", "missing_archive")
    assert str(tmp_path) in line["message"]
    assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_people_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["archive", "stats", "--archive", str(tmp_path / "none")])
    assert capsys.readouterr().err.startswith("pathflip: ")


def test_another_format_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(json_logs.FORMAT, "xml")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 2
    assert "json or text" in capsys.readouterr().err


def test_progress_is_a_line_with_its_share(
    as_json: None, capsys: pytest.CaptureFixture[str]
) -> None:
    json_logs.set_up()
    with show_progress() as progress:
        progress(Progress(what="index", done=2, total=2, seconds=1.0))
    (line,) = lines(capsys.readouterr().err)
    assert (line["logger"], line["fraction"]) == ("pathflip.progress", 1.0)
    assert line["message"].startswith("index 2/2 slides")


def test_an_ingest_names_run_and_slides(
    as_json: None,
    job_here: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its lines have the slides' status and reason as the archive has them."""
    slides = tmp_path / "slides"
    slides.mkdir()
    make_slide(slides / "good.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    (slides / "bad.svs").write_bytes(b"no slide")
    capsys.readouterr()
    json_logs.set_up()
    job_here(slides, tmp_path / "archive")
    found = lines(capsys.readouterr().err)
    rows = Archive(tmp_path / "archive").slides().to_pylist()
    assert len(rows) == 2
    (run,) = {row["run_id"] for row in rows}
    assert {line["run_id"] for line in found} == {run}
    told = {
        line["slide_id"]: (line["status"], line["reason"]) for line in found if "slide_id" in line
    }
    assert told == {row["slide_id"]: (row["status"], row["reason"]) for row in rows}
    assert sum(line.get("slides", 0) for line in found if line["message"] == "committed") == 2


def test_the_service_logs_in_the_same_form(
    as_json: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a client sent, a record is one line."""
    monkeypatch.setenv(logs.FILE, str(tmp_path / "log"))
    logs.set_up()
    logger = logging.getLogger("serve.middleware")
    logger.error("request %s: %s", "1f", 'a\n{"level": "x"}\u2028', extra={"request_id": "1f"})
    logger.info("not of interest")
    (line,) = lines((tmp_path / "log").read_text())
    assert line["request_id"] == "1f"
    assert line["message"] == 'request 1f: a\n{"level": "x"}\u2028'


def test_an_exception_is_within_its_line(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    json_logs.set_up()
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logging.getLogger("jobs.x").exception("it failed")
    (line,) = lines(capsys.readouterr().err)
    assert "broken\nin two" in line["exception"]
