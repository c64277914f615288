"""The Slurm script: Ray on every node of an allocation, an end in time, and going on after it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pathflip import Archive
from pathflip.errors import PathFLIPError
from tests.conftest import SETTINGS, content
from tests.faults import descendants
from tests.slurm import SCRIPT, Allocation

pytestmark = pytest.mark.timeout(600)

START_S = 240.0
"""Deadline for what takes seconds on a machine with nothing else to do."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Allocation]:
    """Two nodes of Slurm; nothing of a job may stay on them."""
    before = set(Path("/tmp").glob("pf.*"))
    allocation = Allocation(tmp_path, nodes=2)
    yield allocation
    assert allocation.left() == []
    assert set(Path("/tmp").glob("pf.*")) <= before


@pytest.mark.ray
def test_job_whose_time_is_up_goes_on_and_ends_as_one_that_had_it(
    nodes: Allocation, job_here: Callable[..., Any], tmp_path: Path
) -> None:
    from pathflip.synth import make_slide

    slides, archive = tmp_path / "slides", tmp_path / "archive"
    slides.mkdir()
    for seed in range(16):  # enough to be interrupted among
        make_slide(slides / f"{seed}.svs", width=1024, height=1024, mpp=0.5, seed=seed)
    job_here(slides, tmp_path / "expected")
    expected = content(tmp_path / "expected")
    settings = [word for each in (*SETTINGS[:2], "commit_s=0", "actors=1") for word in ("-o", each)]
    command = ("python", "-m", "jobs.ingest", str(slides), "--archive", str(archive))
    secrets = tmp_path / "secrets"
    secrets.write_text("AWS_SECRET_ACCESS_KEY=planted\n")
    secrets.chmod(0o600)
    use = {"PATHFLIP_SECRETS": str(secrets)}

    first = nodes.submit(*command, *settings, **use)
    try:
        wait_for(lambda: ready(archive) >= 1, first)
        (token,) = (tmp_path / "state").glob("*/token")
        assert token.stat().st_mode & 0o77 == 0
        assert len(token.read_text()) == 64
        below = processes(first.pid)
        raylets = [pid for pid, words in below.items() if words[0].endswith("/raylet")]
        drivers = [pid for pid, words in below.items() if "jobs.ingest" in words]
        assert len(raylets) == 2, "one on every node"
        assert all("planted" in environment(pid) for pid in (*raylets, *drivers))
        assert not any("planted" in word for words in below.values() for word in words)
        os.kill(first.pid, signal.SIGUSR1)  # which Slurm sends some minutes before the end
        _, errors = first.communicate(timeout=START_S)
    finally:
        end(first)
    assert first.returncode == 130, errors
    assert nodes.queued_again() == ["requeue 4711"]
    assert "Ray has 2 nodes" in errors
    assert 1 <= ready(archive) < len(expected), "it was interrupted too late to see anything"

    # Which the queue starts again: the same command, on whatever nodes there are.
    job_here(slides, archive)
    assert content(archive) == expected


def end(job: subprocess.Popen[str]) -> None:
    """End a job with all that it started, if it still runs."""
    below = [job.pid, *descendants(job.pid)] if job.poll() is None else []
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ready(archive: Path) -> int:
    """Slides that are to be seen by now."""
    if not archive.exists():
        return 0
    try:
        return Archive(archive).slides("ready", columns=["slide_id"]).num_rows
    except PathFLIPError:  # it is being made
        return 0


def wait_for(found: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    """Wait until something is so, while the job runs."""
    end = time.monotonic() + START_S
    while not found():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def processes(pid: int) -> dict[int, list[str]]:
    """Words of every process below ``pid``."""
    found = {}
    for one in descendants(pid):
        with suppress(OSError):
            found[one] = Path(f"/proc/{one}/cmdline").read_text().split("\0")
    return found


def environment(pid: int) -> str:
    """Variables that a process was started with."""
    return Path(f"/proc/{pid}/environ").read_text()


# -- what is refused, before Ray is started --------------------------------------------------------


def test_secrets_that_others_may_read_are_refused(nodes: Allocation, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("AWS_SECRET_ACCESS_KEY=planted\n")
    secrets.chmod(0o640)
    job = nodes.submit("true", PATHFLIP_SECRETS=str(secrets))
    _, errors = job.communicate(timeout=START_S)
    assert job.returncode == 2
    assert "chmod 600" in errors
    assert "planted" not in errors


def test_a_script_without_a_command_says_so(nodes: Allocation) -> None:
    job = nodes.submit()
    _, errors = job.communicate(timeout=START_S)
    assert job.returncode == 2
    assert "Say which command" in errors


def test_a_script_that_is_no_job_says_how_to_make_it_one() -> None:
    outside = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    ended = subprocess.run(
        ["bash", SCRIPT, "python", "-m", "jobs.ingest"], env=outside, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"pathflip: There is no Slurm job here: sbatch {SCRIPT} python -m jobs.ingest\n"
    )


@pytest.mark.parametrize(("tries", "queued"), [("0", ["requeue 4711"]), ("10", [])])
def test_a_head_that_does_not_start_is_tried_again_so_many_times(
    nodes: Allocation, tries: str, queued: list[str]
) -> None:
    job = nodes.submit("true", PATHFLIP_SCRATCH="/nowhere", SLURM_RESTART_COUNT=tries)
    _, errors = job.communicate(timeout=START_S)
    assert job.returncode == 1
    assert "head did not start" in errors
    assert nodes.queued_again() == queued


def test_slurm_sends_its_signal_to_the_script_and_a_lost_node_ends_nothing() -> None:
    options = [line[8:] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@300", "--requeue", "--no-kill", "--ntasks-per-node=1"} <= set(options)
    assert not [option for option in options if "export" in option or "mail" in option]
