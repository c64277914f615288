"""Drivers killed at any moment, storage that is slow or goes away, a clock that jumps.

Actors of these runs are in the driver's process, so that many runs take seconds; what Ray adds is
in tests/chaos. Each ends where a run to which nothing happened does.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pathflip import Archive
from pathflip.archive.maintain import maintain
from pathflip.archive.verify import verify
from tests import failing_reader, faults
from tests.conftest import SETTINGS, content

pytestmark = pytest.mark.timeout(300)

NAMES = ("a.tif", "b.svs", "c.tif")
KILLS = 10


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three slides."""
    from pathflip.synth import make_slide

    folder = tmp_path_factory.mktemp("three")
    for name, options in zip(
        NAMES,
        (
            {"width": 2048},
            {"width": 1024, "layout": "aperio", "components": "rgb"},
            {"width": 1024},
        ),
        strict=True,
    ):
        make_slide(folder / name, **{"height": 1024, "mpp": 0.5, "seed": ord(name[0]), **options})
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    three: Path, job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return what a run to which nothing happened makes of them."""
    archive = tmp_path_factory.mktemp("undisturbed") / "archive"
    assert job_here(three, archive).slides["ready"] == len(NAMES)
    return content(archive)


def names_of(found: dict[str, dict[str, Any]]) -> set[str]:
    return {Path(entry["row"]["uri"]).name for entry in found.values()}


# -- the driver -----------------------------------------------------------------------------------

DRIVER = """
import os, sys
from tests.in_threads import in_threads
from jobs.ingest import IngestConfig, ingest
from pathflip.config import load_config

slides, settings = sys.argv[1], sys.argv[2:]
config = load_config(IngestConfig, overrides=settings)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()  # before anything here started a thread
    if pid:
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
        continue
    os.setsid()
    with in_threads():
        ingest([slides], line.strip(), config)
    os._exit(0)
"""


class Drivers:
    """Starts ingests that can be killed, each in a process of its own; imports are done once."""

    def __init__(self, slides: Path) -> None:
        command = [sys.executable, "-c", DRIVER, str(slides), *SETTINGS, "commit_s=0"]
        self._process = subprocess.Popen(
            command, cwd=faults.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, archive: Path, *, kill_after: float | None = None) -> tuple[bool, float]:
        """Ingest; return whether the process was killed while it worked, and how long it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{archive}\n")
        self._process.stdin.flush()
        pid, began = int(self._line()), time.monotonic()
        below: list[int] = []
        if kill_after is not None:
            time.sleep(kill_after)
            if faults.alive(pid):
                below = faults.descendants(pid)
                os.kill(pid, signal.SIGKILL)
        status = int(self._line())
        faults.until(lambda: not any(map(faults.alive, below)), seconds=30, what="readers end")
        assert status in (0, signal.SIGKILL)
        return status != 0, time.monotonic() - began

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture
def drivers(three: Path) -> Iterator[Drivers]:
    made = Drivers(three)
    yield made
    made.end()


def test_ten_drivers_killed_at_random_moments(
    drivers: Drivers, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """After each, visible slides are whole and right; the same command again comes to the end."""
    killed, runs, moments = 0, 0, random.Random(4)
    archive = tmp_path / "0"
    _, whole_s = drivers.run(tmp_path / "whole")
    assert content(tmp_path / "whole") == undisturbed
    while killed < KILLS:
        runs += 1
        assert runs < 4 * KILLS, "nothing was running when it was to be killed"
        struck, _ = drivers.run(archive, kill_after=moments.uniform(0.02, 1) * whole_s)
        killed += struck
        if any((archive / "meta.lance" / "_versions").glob("*.manifest")):  # the last to be made
            for slide, entry in content(archive).items():
                assert entry == undisturbed[slide]
        if not struck or runs % 4 == 0:
            assert drivers.run(archive)[0] is False
            assert content(archive) == undisturbed
            assert not verify(archive).damaged
            archive = tmp_path / str(runs)
    assert drivers.run(archive)[0] is False
    assert content(archive) == undisturbed
    assert not verify(archive).damaged


# -- storage --------------------------------------------------------------------------------------


@pytest.fixture
def share(three: Path, tmp_path: Path) -> Path:
    """A copy of the slides, as on a share that may go away."""
    shutil.copytree(three, tmp_path / "share")
    return tmp_path / "share"


def same_as(
    archive: Path, expected: dict[str, dict[str, Any]], *, but: tuple[str, ...] = ()
) -> bool:
    """Return whether the ready slides are those of another folder, wherever the files lie."""

    def plain(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            slide: entry
            | {"row": {k: v for k, v in entry["row"].items() if k not in ("uri", "mtime_ns")}}
            for slide, entry in found.items()
            if Path(entry["row"]["uri"]).name not in but
        }

    return plain(content(archive)) == plain(expected)


def test_storage_that_is_slow_stalls_or_fails_a_read(
    share: Path, undisturbed: dict[str, Any], job_here: Callable[..., Any], tmp_path: Path
) -> None:
    """Slow is only slow; a stall costs an attempt; a read that fails costs its slide, by name."""
    plan = {"a.tif": ("read", "slow"), "b.svs": ("read", "stall"), "c.tif": ("read", "fail_reads")}
    archive = tmp_path / "archive"
    with failing_reader.failing(tmp_path / "failures", plan, times=1):
        result = job_here(share, archive, "read_timeout_s=8")
    assert result.exit_code == 3
    rows = {Path(row["uri"]).name: row for row in Archive(archive).slides().to_pylist()}
    assert (rows["a.tif"]["status"], rows["a.tif"]["attempts"]) == ("ready", 1)
    assert (rows["b.svs"]["status"], rows["b.svs"]["attempts"]) == ("ready", 2)
    assert rows["c.tif"]["status"] == "quarantined"
    assert rows["c.tif"]["reason"] in ("unreadable", "too_many_bad_tiles")
    expected = {s: e for s, e in undisturbed.items() if "c.tif" not in e["row"]["uri"]}
    assert same_as(archive, expected)
    job_here(share, archive, "retry=true")
    assert same_as(archive, undisturbed)


def test_storage_that_goes_away_and_comes_back(
    share: Path, undisturbed: dict[str, Any], job_here: Callable[..., Any], tmp_path: Path
) -> None:
    """From one read to the next the folder is empty, as when a mount is lost."""
    archive = tmp_path / "archive"
    with failing_reader.failing(tmp_path / "failures", {"b.svs": ("read", "unmount")}, times=1):
        result = job_here(share, archive)
    assert result.slides["ready"] == 1
    for row in Archive(archive).slides("quarantined").to_pylist():
        assert row["reason"] in ("not_a_file", "source_changed"), row["message"]
        assert Path(row["uri"]).name in row["message"]
    assert names_of(content(archive)) == {"a.tif"}
    share.rmdir()
    share.with_name("away").rename(share)
    assert job_here(share, archive, "retry=true").exit_code == 0
    assert same_as(archive, undisturbed)
    assert not verify(archive).damaged


# -- the clock ------------------------------------------------------------------------------------


def test_clock_that_jumps(
    share: Path,
    undisturbed: dict[str, Any],
    job_here: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two years on, four years back, and now: a slide replaced meanwhile is the newer one."""
    from pathflip.synth import make_slide

    days = [730]

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days[0])

    for module in ("jobs.ingest.ledger", "pathflip.archive.compaction", "pathflip.files"):
        monkeypatch.setattr(f"{module}.datetime", Jumping)
    archive = tmp_path / "archive"
    (share / "c.tif").rename(share / "kept")
    make_slide(share / "c.tif", width=1024, height=1024, mpp=0.5, seed=7)
    assert job_here(share, archive).slides["ready"] == len(NAMES)
    assert not same_as(archive, undisturbed)
    maintain(archive)
    days[0] = -730
    os.replace(share / "kept", share / "c.tif")
    assert job_here(share, archive).slides["ready"] == 1
    maintain(archive)
    for days[0] in (-730, 730, 0):
        assert job_here(share, archive).slides["skipped"] == len(NAMES)
        assert same_as(archive, undisturbed)
    years = [row["ingested_at"].year for row in Archive(archive).slides().to_pylist()]
    assert max(years) > datetime.now(UTC).year > min(years)  # it did jump
    assert not verify(archive).damaged
