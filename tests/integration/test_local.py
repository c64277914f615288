"""An ingest in processes of this machine: it makes what Ray makes, and outlives what kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import ingest
from pathflip import Archive
from pathflip.config import load_config
from tests import failing_reader, faults
from tests.conftest import SETTINGS, Clean, content
from tests.failing_ingest import FAILURES, FailingEmbedder, survives_a_kill_on_every_slide

pytestmark = pytest.mark.timeout(300)

NAMES = ("a.svs", "b.tif", "c.tif")


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three small slides."""
    from pathflip.synth import make_slide

    folder = tmp_path_factory.mktemp("some")
    for name in NAMES:
        make_slide(folder / name, width=1024, height=1024, mpp=0.5, seed=ord(name[0]))
    return folder


@pytest.fixture(scope="module")
def expected(
    some: Path, job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return what a run to which nothing happened makes of them."""
    archive = tmp_path_factory.mktemp("expected") / "archive"
    assert job_here(some, archive).slides["ready"] == len(NAMES)
    return content(archive)


def here(sources: Path, archive: Path, *settings: str) -> Any:
    config = load_config(ingest.IngestConfig, overrides=(*SETTINGS, *settings))
    return ingest.ingest([str(sources)], str(archive), config, address="local")


@pytest.mark.ray
def test_rows_are_those_of_ray(slides: Path, clean: Clean, tmp_path: Path) -> None:
    result = here(slides, tmp_path / "archive")
    assert (result.slides, result.regions, result.patches) == (
        clean.result.slides, clean.result.regions, clean.result.patches,
    )  # fmt: skip
    assert content(tmp_path / "archive") == clean.content


COMMAND = """
import sys
from pathflip.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"ray", "torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def test_the_command_needs_no_ray(some: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Its result, and the same command again; neither loads Ray, nor torch for ``texture``."""
    settings = [word for setting in SETTINGS for word in ("-o", setting)]
    words = ["ingest", str(some), "--archive", str(tmp_path / "archive"), "--json", *settings]
    for where, counts in (([], (3, 0)), (["--local"], (0, 3))):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words, *where],
            cwd=faults.ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        slides = json.loads(done.stdout)["slides"]
        assert (slides["ready"], slides["skipped"]) == counts
        assert done.stderr.splitlines()[-1] == "[]"
    assert content(tmp_path / "archive") == expected


def test_worker_killed_on_every_slide(
    some: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to an embedding worker while its reader has a slide open, once for each slide."""
    monkeypatch.setattr(ingest, "Embedder", FailingEmbedder)
    survives_a_kill_on_every_slide(
        lambda archive: here(some, archive, "actors=1"), NAMES, expected, tmp_path
    )


def test_slide_that_always_kills_its_worker(
    some: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL is what a worker gets when memory runs out: bounded attempts, the others complete."""
    monkeypatch.setattr(ingest, "Embedder", FailingEmbedder)
    failures = tmp_path / FAILURES
    with failing_reader.failing(failures, {"b.tif": ("read", "kill_actor")}):
        result = here(some, tmp_path / "archive", "attempts=2")
    # Each of its two chunks may have been begun before a death is seen.
    assert 2 <= len(failing_reader.failed(failures)["b.tif"]) <= 4
    assert result.exit_code == 3
    assert result.slides == {"ready": 2, "quarantined": 1, "empty": 0, "skipped": 0}
    (row,) = Archive(tmp_path / "archive").slides("quarantined").to_pylist()
    assert (Path(row["uri"]).name, row["reason"]) == ("b.tif", "worker_crash")
    assert "worker processes died" in row["message"]
    others = {s: e for s, e in expected.items() if Path(e["row"]["uri"]).name != "b.tif"}
    assert content(tmp_path / "archive") == others


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL], ids=lambda blow: blow.name)
def test_command_struck_while_it_works(
    blow: signal.Signals, some: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Ctrl-C ends it with 130 and a sentence; nothing outlives it; the same command goes on."""
    archive = tmp_path / "archive"
    settings = [word for setting in (*SETTINGS, "commit_s=0") for word in ("-o", setting)]
    words = ["ingest", str(some), "--archive", str(archive), "--json", *settings]
    run = faults.waiting(*words, table="slides", commits=1)
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "waiting\n"
        below = faults.descendants(run.pid)
        assert any("jobs.worker" in faults.command_line(pid) for pid in below)
        if blow == signal.SIGINT:
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
            os.kill(run.pid, signal.SIGCONT)
            _, err = run.communicate(timeout=150)
            assert run.returncode == 130
            assert "Traceback" not in err
            said = "pathflip: interrupted; the same command continues where it stopped.\n"
            assert err.endswith(said)
    finally:
        run.kill()
        run.communicate()
    faults.until(lambda: not any(map(faults.alive, below)), seconds=30, what="processes end")
    assert len(content(archive)) == 1
    again = here(some, archive)
    assert (again.slides["ready"], again.slides["skipped"]) == (2, 1)
    assert content(archive) == expected
