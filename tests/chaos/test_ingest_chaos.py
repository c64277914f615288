"""The job loses its driver, its workers, a node, its disk, or meets itself: it must not show.

After each blow the archive is opened as a user would; when the same command has run to its end,
everything equals the run to which nothing happened.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import faults
from tests.conftest import SETTINGS, Clean, content

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(300)]

OURS = ("Planner", "Embedder", "pathflip.slides.reader", "raylet/raylet", "gcs_server")
"""Processes of a private Ray; its agents look for their node only once a minute."""


def command(slides: Path, archive: Path, *, address: str | None) -> subprocess.Popen[str]:
    """``pathflip ingest`` in a process group of its own."""
    words = ["ingest", str(slides), "--archive", str(archive), "--json"]
    words += [word for setting in SETTINGS for word in ("-o", setting)]
    words += ["--address", address] if address else []
    return faults.pathflip(*words)


def locked(archive: Path, pid: int) -> bool:
    """Return whether the run of this process has begun to write."""
    try:
        return bool(json.loads((archive / ".lock").read_text())["pid"] == pid)
    except (OSError, ValueError, KeyError):
        return False


def ready_part(archive: Path, clean: Clean) -> int:
    """Check that visible slides are whole and right; return the number of ready ones."""
    from pathflip import Archive

    if not (archive / "meta.lance").exists():  # killed before there was one
        return 0
    if not Archive(archive).encoders():
        return 0
    found = content(archive)
    for slide, entry in found.items():
        assert entry == clean.content[slide]
    return len(found)


# -- the driver -----------------------------------------------------------------------------------


def test_driver_killed_at_random_then_run_again(
    slides: Path, clean: Clean, cluster: str, tmp_path: Path
) -> None:
    """Nothing partial is ever visible, nothing twice, and the end is the clean end."""
    from pathflip.archive.verify import verify

    archive = tmp_path / "archive"
    rng = random.Random(3)
    ready = [0]
    for _ in range(3):
        run = command(slides, archive, address=cluster)
        faults.until(
            lambda run=run: locked(archive, run.pid) or run.poll() is not None,
            seconds=90,
            what="the run begins to write",
        )
        with_progress = ready[-1]
        moment = time.monotonic() + rng.uniform(0.0, 1.5)
        if rng.random() < 0.75:  # else while it starts
            faults.until(
                lambda run=run, seen=with_progress: (
                    run.poll() is not None or fragments(archive) > seen
                ),
                seconds=120,
                what="workers write",
            )
            moment = time.monotonic() + rng.uniform(0.0, 3.0)
        while time.monotonic() < moment and run.poll() is None:
            time.sleep(0.01)
        run.kill()
        run.communicate()
        ready.append(ready_part(archive, clean))
        assert ready[-1] >= ready[-2], "a slide that was there is gone"
    run = command(slides, archive, address=cluster)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert json.loads(out)["slides"]["skipped"] == ready[-1]
    assert content(archive) == clean.content
    assert not verify(archive).damaged


def fragments(archive: Path) -> int:
    """Data files of features written so far, committed or not."""
    return len(list(archive.glob("features_*.lance/data/*.lance")))


def test_killed_driver_leaves_no_process(slides: Path, clean: Clean, tmp_path: Path) -> None:
    """A Ray of its own ends with the driver, and so do the readers."""
    archive = tmp_path / "archive"
    run = command(slides, archive, address=None)
    try:
        faults.until(lambda: fragments(archive) > 0, seconds=120, what="workers write")
        below = [
            pid
            for pid in faults.descendants(run.pid)
            if any(word in faults.command_line(pid) for word in OURS)
        ]
        assert any("pathflip.slides.reader" in faults.command_line(pid) for pid in below)
    finally:
        run.kill()
        run.communicate()
    ready_part(archive, clean)
    faults.until(
        lambda: not any(faults.alive(pid) for pid in below), seconds=30, what="processes end"
    )


def test_same_command_twice_at_once(
    slides: Path, clean: Clean, cluster: str, tmp_path: Path
) -> None:
    """One works, the other says who holds the archive; or both come to the same end."""
    archive = tmp_path / "archive"
    runs = [command(slides, archive, address=cluster) for _ in range(2)]
    ended = [(*run.communicate(timeout=200), run) for run in runs]
    codes = sorted(run.returncode for _, _, run in ended)
    assert codes in ([0, 2], [0, 0]), [err for _, err, _ in ended]
    for out, err, run in ended:
        if run.returncode == 2:
            (other,) = (each.pid for each in runs if each is not run)
            error = json.loads(out)["error"]
            assert error["code"] == "locked"
            assert str(other) in error["message"]
            assert "Traceback" not in err
    assert content(archive) == clean.content


# -- workers and nodes ----------------------------------------------------------------------------


def test_worker_killed_three_times(
    slides: Path, clean: Clean, job: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL to an embedding worker while it has a slide open."""
    killed: list[int] = []
    orphans: list[int] = []
    over = threading.Event()

    def strike() -> None:
        while not over.is_set() and len(killed) < 3:
            for reader in faults.readers(os.getpid(), "Embedder"):
                worker = faults.parent(reader)
                busy = any(faults.has_open(reader, path) for path in slides.iterdir())
                if busy and worker not in killed and "Embedder" in faults.command_line(worker):
                    orphans.append(reader)
                    killed.append(worker)
                    os.kill(worker, signal.SIGKILL)
                    break
            time.sleep(0.005)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        result = job(slides, tmp_path / "archive")
    finally:
        over.set()
        thread.join()
    assert len(killed) == 3
    assert result.slides == clean.result.slides
    assert content(tmp_path / "archive") == clean.content
    faults.until(
        lambda: not any(faults.alive(pid) for pid in orphans), seconds=10, what="readers end"
    )


NODES = """
import json, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from jobs.ingest import IngestConfig, ingest
from pathflip.config import load_config

slides, archive, settings = sys.argv[1], sys.argv[2], sys.argv[3:]
store = {"object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
for _ in range(2):
    cluster.add_node(num_cpus=1, **store)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

def replace():
    while all(node["Alive"] for node in ray.nodes()):
        time.sleep(0.1)
    cluster.add_node(num_cpus=1, **store)

threading.Thread(target=replace, daemon=True).start()
result = ingest([slides], archive, load_config(IngestConfig, overrides=settings))
print(json.dumps(result.slides), flush=True)
sys.stdin.read()  # whoever started this ends it, and all below it
"""


def test_node_lost_while_it_embeds(slides: Path, clean: Clean, tmp_path: Path) -> None:
    """A head without CPUs, two workers with small stores, one lost, one added."""
    archive = tmp_path / "archive"
    script = [sys.executable, "-c", NODES, str(slides), str(archive), *SETTINGS]
    own = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie below it
    environment = os.environ | {"RAY_TMPDIR": own}
    with subprocess.Popen(
        script,
        cwd=faults.ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            node = 0
            while not node:
                assert run.poll() is None, "the run ended before a node was lost"
                for reader in faults.readers(run.pid, "Embedder"):
                    above = faults.parent(faults.parent(reader))
                    busy = any(faults.has_open(reader, path) for path in slides.iterdir())
                    if busy and "raylet" in faults.command_line(above):
                        node = above
            os.kill(node, signal.SIGKILL)
            assert run.stdout is not None
            printed = next(line for line in run.stdout if line.startswith("{"))
        finally:
            below = faults.descendants(run.pid)
            run.kill()
            for pid in below:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(own, ignore_errors=True)
    assert json.loads(printed) == clean.result.slides
    assert content(archive) == clean.content


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
    clean: Clean,
    job: Callable[..., Any],
    small_disk: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Exit 1 and a sentence about space; freed, the same command comes to the clean end."""
    from pathflip.cli import main

    archive = small_disk / "archive"
    job(slides / "g.tif", archive)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"\0" * (free - (600 << 10)))
    words = [word for setting in SETTINGS for word in ("-o", setting)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(slides), "--archive", str(archive), "--json", *words])
    out, err = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(out)["error"]["code"] == "disk_full"
    assert "full (free: " in err
    assert "Free some space and run the same command again" in err
    assert "Traceback" not in err
    assert 1 <= ready_part(archive, clean) < len(clean.content)

    (small_disk / "filler").unlink()
    job(slides, archive)
    assert content(archive) == clean.content
