"""The job loses its driver, its workers, a node, its disk, or meets itself: it must not show.

After each blow the archive is opened as a user would; when the same command has run to its end,
everything equals the run to which nothing happened.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import ingest
from pathflip import Archive
from tests import failing_reader, faults
from tests.conftest import SETTINGS, Clean, content
from tests.failing_ingest import FAILURES, FailingEmbedder, survives_a_kill_on_every_slide

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(300)]

OURS = {
    "--local": ("jobs.worker", "pathflip.slides.reader"),
    "--ray": ("Embedder", "pathflip.slides.reader", "raylet/raylet", "gcs_server"),
}
"""Processes below a driver; agents of Ray look for their node only once a minute."""
SLIDES = ("a.svs", "c.tif", "g.tif")
"""Those of the clean run that are ingested here: both readers, several chunks."""
ONE_ACTOR = (*SETTINGS, "actors=1")


@pytest.fixture
def some(slides: Path) -> list[str]:
    """Return the paths of the slides to ingest."""
    return [str(slides / name) for name in SLIDES]


@pytest.fixture
def expected(clean: Clean) -> dict[str, dict[str, Any]]:
    """Return what a run to which nothing happened makes of them."""
    found = {s: e for s, e in clean.content.items() if Path(e["row"]["uri"]).name in SLIDES}
    assert len(found) == len(SLIDES)
    return found


def words(slides: list[str], archive: Path, *where: str) -> list[str]:
    """Words of ``pathflip ingest`` that commits every slide as soon as it is done."""
    settings = [word for each in (*ONE_ACTOR, "commit_s=0") for word in ("-o", each)]
    return [*slides, "--archive", str(archive), "--json", *settings, *where]


def ready_part(archive: Path, expected: dict[str, dict[str, Any]]) -> int:
    """Check that visible slides are whole and right; return the number of ready ones."""
    found = content(archive)
    for slide, entry in found.items():
        assert entry == expected[slide]
    return len(found)


# -- the driver -----------------------------------------------------------------------------------


def test_driver_killed_as_it_commits_then_run_twice_at_once(
    some: list[str], expected: dict[str, Any], cluster: str, tmp_path: Path
) -> None:
    """Nothing partial is ever visible, nothing twice, no process stays, the end is the clean end.

    The first driver has a Ray, the second processes of its own, which end with it, and so do the
    readers. Of the two at the end one works and the other says who holds the archive; or both come
    to the same end.
    """
    from pathflip.archive.verify import verify

    archive = tmp_path / "archive"
    for commits, engine in enumerate(("--ray", "--local")):
        given = ("ingest", *words(some, archive, engine))
        run = faults.waiting(*given, table="slides", commits=commits)
        below: list[int] = []
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "waiting\n"
            ours = OURS[engine]
            lines = {pid: faults.command_line(pid) for pid in faults.descendants(run.pid)}
            below = [pid for pid, line in lines.items() if any(word in line for word in ours)]
            for word in ours:
                assert any(word in lines[pid] for pid in below), word
        finally:
            run.kill()
            run.communicate()
        assert ready_part(archive, expected) == commits
        faults.until(
            lambda below=below: not any(faults.alive(pid) for pid in below),
            seconds=30,
            what="processes end",
        )

    given = ("ingest", *words(some, archive, "--address", cluster))
    runs = [faults.pathflip(*given) for _ in range(2)]
    ended = [(*run.communicate(timeout=200), run) for run in runs]
    codes = sorted(run.returncode for _, _, run in ended)
    assert codes in ([0, 2], [0, 0]), [err for _, err, _ in ended]
    skipped = set()
    for out, err, run in ended:
        if run.returncode == 2:
            (other,) = (each.pid for each in runs if each is not run)
            error = json.loads(out)["error"]
            assert error["code"] == "locked"
            assert str(other) in error["message"]
            assert "Traceback" not in err
        else:
            skipped.add(json.loads(out)["slides"]["skipped"])
    assert skipped in ({1}, {1, len(SLIDES)})
    assert content(archive) == expected
    assert not verify(archive).damaged


# -- workers and nodes ----------------------------------------------------------------------------


def test_worker_killed_three_times(
    some: list[str],
    expected: dict[str, Any],
    job: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL to an embedding worker while its reader has a slide open, once for each slide."""
    monkeypatch.setattr(ingest, "Embedder", FailingEmbedder)
    survives_a_kill_on_every_slide(
        lambda archive: job(some, archive, "actors=1"), SLIDES, expected, tmp_path
    )


def test_slide_that_always_kills_its_worker(
    some: list[str],
    expected: dict[str, Any],
    job: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL is what a worker gets when memory runs out: bounded attempts, the others complete."""
    monkeypatch.setattr(ingest, "Embedder", FailingEmbedder)
    failures = tmp_path / FAILURES
    victim = SLIDES[1]
    with failing_reader.failing(failures, {victim: ("read", "kill_actor")}):
        result = job(some, tmp_path / "archive", "actors=1", "attempts=2")
    # Each of its two chunks may have been begun before a death is seen.
    died = len(failing_reader.failed(failures)[victim])
    assert 2 <= died <= 4
    assert result.exit_code == 3
    assert result.slides == {"ready": 2, "quarantined": 1, "empty": 0, "skipped": 0}
    (row,) = Archive(tmp_path / "archive").slides("quarantined").to_pylist()
    assert (Path(row["uri"]).name, row["reason"]) == (victim, "worker_crash")
    assert "2 worker processes died" in row["message"]
    others = {s: e for s, e in expected.items() if Path(e["row"]["uri"]).name != victim}
    assert content(tmp_path / "archive") == others


NODES = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import ray
from ray.cluster_utils import Cluster
from jobs import ingest
from pathflip.config import load_config
from tests.failing_ingest import FailingEmbedder

archive, slides, settings = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
store = {"object_store_memory": 80 << 20}
head = {"num_cpus": 0, "include_dashboard": False, **store}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1, **store)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

ingest.Embedder = FailingEmbedder
config = load_config(ingest.IngestConfig, overrides=settings)
with ThreadPoolExecutor(1) as pool:
    run = pool.submit(ingest.ingest, slides, archive, config)
    while all(node["Alive"] for node in ray.nodes()) and not run.done():
        time.sleep(0.1)
    cluster.add_node(num_cpus=1, **store)  # refused in any thread but this
    print(json.dumps(run.result().slides), flush=True)
sys.stdin.read()  # whoever started this ends it, and all below it
"""


def test_node_lost_while_it_embeds(
    some: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """A head without CPUs, and the one node with an actor of each kind lost and replaced."""
    archive = tmp_path / "archive"
    script = [sys.executable, "-c", NODES, str(archive), " ".join(some), *ONE_ACTOR]
    own = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie below it
    environment = os.environ | {"RAY_TMPDIR": own}
    failures = tmp_path / FAILURES
    with (
        failing_reader.failing(failures, {SLIDES[1]: ("read", "kill_node")}, times=1),
        subprocess.Popen(
            script,
            cwd=faults.ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as run,
    ):
        try:
            assert run.stdout is not None
            printed = next(line for line in run.stdout if line.startswith("{"))
        finally:
            faults.kill_tree(run)
            shutil.rmtree(own, ignore_errors=True)
    assert len(failing_reader.failed(failures)[SLIDES[1]]) == 1
    assert json.loads(printed)["ready"] == len(SLIDES)
    assert content(archive) == expected


# -- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(where)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_disk_full_then_freed(
    slides: Path,
    some: list[str],
    expected: dict[str, Any],
    cluster: str,
    job_here: Callable[..., Any],
    small_disk: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Exit 1 and a sentence about space; freed, the same command comes to the clean end."""
    from pathflip.cli import main

    archive = small_disk / "archive"
    job_here(slides / "g.tif", archive)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"\0" * (free - (100 << 10)))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["ingest", *words(some, archive)])
    out, err = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(out)["error"]["code"] == "disk_full"
    assert "full (free: " in err
    assert "Free some space and run the same command again" in err
    assert "Traceback" not in err
    assert 1 <= ready_part(archive, expected) < len(expected)

    (small_disk / "filler").unlink()
    job_here(some, archive)
    assert content(archive) == expected
