"""Jobs and the service over several hosts: one is lost, cut off for a while, or slow.

Hosts are namespaces of this machine (:mod:`tests.hosts`) on a network of their own, over which
Ray's processes talk as between machines. Slides, archive and runs lie where all of them see them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pathflip import Archive
from tests import failing_reader, faults, hosts, pretraining
from tests.conftest import SETTINGS, content
from tests.failing_ingest import FAILURES
from tests.failpoints import FAIL_AT, WAITING_PRETRAIN
from tests.pretraining import SAVE_EVERY, STEPS, assert_close, curve, logged_step
from tests.unit.serve.service_fixture import TOKENS, make_world

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

SLIDES = 10
HELD = ("3.svs", "4.svs")
"""Slides at which the workers of both hosts are stopped: each host works on one of them."""
PARTITION_S = 30
JOB_S = 300.0
"""Deadline for a job, which has to notice that a host is gone."""

_INGEST = """
from jobs import ingest
from pathflip.cli import main
from tests.failing_ingest import FailingEmbedder

ingest.Embedder = FailingEmbedder
main()
"""

_ASK = """
import asyncio, json, sys, time
import httpx

url, token, log = sys.argv[1:]
questions = {
    "search": ("GET", "/v1/slides", None),
    "embedder": ("POST", "/v1/embeddings", {"input": "necrosis"}),
    "grounding": ("POST", "/v1/ground", {"slide_id": "slide000", "text": "necrosis"}),
}
options = {
    "base_url": url,
    "headers": {"Authorization": f"Bearer {token}"},
    "timeout": 20,
    "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
}

async def ask(http, part, out):
    method, path, body = questions[part]
    at = time.time()
    try:
        answer = await http.request(method, path, json=body)
        status, text = answer.status_code, answer.text
    except httpx.TransportError as error:
        status, text = 0, repr(error)
    line = {"part": part, "at": at, "took": time.time() - at, "status": status, "text": text}
    print(json.dumps(line), file=out, flush=True)

async def main():
    tasks = set()
    with open(log, "w") as out:
        async with httpx.AsyncClient(**options) as http:
            while True:
                for part in questions:
                    tasks.add(task := asyncio.create_task(ask(http, part, out)))
                    task.add_done_callback(tasks.discard)
                await asyncio.sleep(1)

asyncio.run(main())
"""
"""Asks each part of a service every second; status 0 is an answer that did not come in 20 s."""
PARTS = ("search", "embedder", "grounding")


@pytest.fixture(scope="module")
def cluster_of_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    """A Ray over a head and whatever workers tests want."""
    if (reason := hosts.refusal()) is not None:
        pytest.skip(reason)
    with hosts.World(tmp_path_factory.getbasetemp()) as world:
        yield hosts.Cluster(world, tmp_path_factory.mktemp("hosts"))


@pytest.fixture
def cluster(cluster_of_hosts: hosts.Cluster) -> hosts.Cluster:
    """The same with two hosts that work."""
    cluster_of_hosts.grow(2)
    return cluster_of_hosts


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small slides of two chunks each."""
    from pathflip.synth import make_slide

    folder = tmp_path_factory.mktemp("sources")
    for seed in range(SLIDES):
        make_slide(folder / f"{seed}.svs", width=2048, height=1024, mpp=0.5, seed=seed)
    return folder


@pytest.fixture(scope="module")
def expected(
    sources: Path, job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Content of an archive of these slides that one machine made."""
    archive = tmp_path_factory.mktemp("expected") / "archive"
    job_here(sources, archive, "chunk_regions=1")
    found = content(archive)
    assert len(found) == SLIDES
    return found


def ended(run: subprocess.Popen[str]) -> Any:
    """Wait for the end of a job; return its document, all that there is on its standard output."""
    try:
        out, errors = run.communicate(timeout=JOB_S)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    assert run.returncode == 0, errors
    return json.loads(out)


class Ingest:
    """An ingest over hosts, which stops where two of them are at work.

    Args:
        cluster: Cluster it runs on.
        sources: Folder of its slides.
        folder: A new folder for the archive.
    """

    def __init__(self, cluster: hosts.Cluster, sources: Path, folder: Path) -> None:
        self.archive, self._failures = folder / "archive", folder / FAILURES
        failing_reader.write_plan(self._failures, dict.fromkeys(HELD, ("read", "hold")), times=1)
        settings = [*SETTINGS[:1], "chunk_regions=1", "commit_s=0", "read_timeout_s=600"]
        words = [word for each in settings for word in ("-o", each)]
        self._run = cluster.run(
            "-c", _INGEST, "ingest", str(sources), "--archive", str(self.archive), "--json", *words
        )
        self._cluster = cluster

    def at_work(self) -> list[hosts.Host]:
        """Wait until both hosts are stopped in a slide; return them."""
        held = failing_reader.held(self._failures)
        faults.until(
            lambda: self._run.poll() is not None or len(list(held.glob("*.svs"))) == len(HELD),
            seconds=JOB_S,
            what="two hosts at work",
        )
        assert self._run.poll() is None, self._run.communicate()
        names = {(held / name).read_text() for name in HELD}
        assert len(names) == 2
        return [self._cluster.workers[name] for name in sorted(names)]

    def go_on(self) -> None:
        """Let the readers go on."""
        for note in failing_reader.held(self._failures).glob("*"):
            note.unlink()

    def ended(self) -> None:
        """Wait for the end, and check that every slide is ready."""
        counts = ended(self._run)["slides"]
        assert counts == {"ready": SLIDES, "quarantined": 0, "empty": 0, "skipped": 0}


def test_a_host_lost_in_mid_ingest(
    cluster: hosts.Cluster, sources: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """The one that is left does all of its work; the archive is that of one machine."""
    ingest = Ingest(cluster, sources, tmp_path)
    _, lost = ingest.at_work()
    lost.lose()
    ingest.go_on()
    ingest.ended()
    assert content(ingest.archive) == expected


def test_a_partition_in_mid_ingest(
    cluster: hosts.Cluster, sources: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """A host goes on alone for 30 s while Ray gives it up and its work is done elsewhere.

    Nothing that both did is there twice, or in part.
    """
    from datetime import UTC, datetime

    from pathflip.archive.compaction import free_files
    from pathflip.archive.lock import ArchiveLock
    from pathflip.archive.verify import verify

    ingest = Ingest(cluster, sources, tmp_path)
    _, alone = ingest.at_work()
    alone.cut()
    ingest.go_on()
    cluster.cut_off(alone, seconds=PARTITION_S)
    ingest.ended()
    assert content(ingest.archive) == expected
    with ArchiveLock(ingest.archive) as lock:  # as `archive maintain` does after a day
        free_files(lock, Archive(ingest.archive).tables(), before=datetime.now(UTC))
    assert content(ingest.archive) == expected
    assert not verify(ingest.archive).damaged


def test_a_slow_host_in_an_ingest(
    cluster: hosts.Cluster, sources: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """A host with a fifth of its CPU and 10 Mbit/s delays the end and changes nothing."""
    ingest = Ingest(cluster, sources, tmp_path)
    _, slow = ingest.at_work()
    with slow.slow(share=0.2, mbit=10):
        ingest.go_on()
        ingest.ended()
    assert content(ingest.archive) == expected


def test_a_host_lost_in_mid_pretraining(cluster: hosts.Cluster, tmp_path: Path) -> None:
    """A new host takes its place, and the weights are those of a run to which nothing happened."""
    archive = pretraining.make_cohort(tmp_path)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"

    def words(run: Path) -> list[str]:
        return ["pretrain", *pretraining.words(archive, run, "max_workers=2")]

    def attempt(run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run / "attempt.json").read_text())
        return found

    assert ended(cluster.run("-m", "pathflip.cli", *words(undisturbed)))["trained"] == STEPS
    assert attempt(undisturbed)["workers"] == 2

    job = cluster.run("-c", WAITING_PRETRAIN, *words(run))
    faults.until(
        lambda: logged_step(run) >= FAIL_AT or job.poll() is not None,
        seconds=JOB_S,
        what=f"step {FAIL_AT} is logged",
    )
    assert job.poll() is None, job.communicate()
    cluster.up()[-1].lose()
    cluster.grow(2)
    assert ended(job)["steps"] == STEPS
    assert (attempt(run)["workers"], attempt(run)["from_step"]) == (2, SAVE_EVERY)
    assert_close(run, undisturbed, within=1e-6)
    assert curve(run) == pytest.approx(curve(undisturbed), abs=1e-6)


@pytest.fixture
def answers(cluster: hosts.Cluster, tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Function that returns what a service over the hosts has answered, on the head, so far."""
    served = make_world(tmp_path)
    config = yaml.safe_load((faults.ROOT / "platform" / "serve" / "cpu.yaml").read_text())
    replicas = {"search": 2, "ingress": 2, "embedder": 1, "grounding": 1, "annotations": 1}
    config["applications"][0]["args"] = {
        "archive": str(served.archive),
        "run": str(served.run),
        "audit": str(tmp_path / "audit"),
        "token_file": str(served.token_file),
        **{
            name: {"min_replicas": count, "max_replicas": count, "cpus": 0.1}
            for name, count in replicas.items()
        },
    }
    settings, log = tmp_path / "service.yaml", tmp_path / "answers"
    settings.write_text(yaml.safe_dump(config))
    service = cluster.run("-m", "ray.serve.scripts", "run", str(settings))
    url = f"http://{cluster.head.address}:{config['http_options']['port']}"
    asking = cluster.run("-c", _ASK, url, TOKENS["all"][1], str(log))

    def so_far() -> list[dict[str, Any]]:
        assert service.poll() is None, service.communicate()
        assert asking.poll() is None, asking.communicate()
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be begun

    yield so_far
    for run, number in ((asking, signal.SIGKILL), (service, signal.SIGINT)):
        for pid in faults.descendants(run.pid):
            os.kill(pid, number)
        run.communicate(timeout=JOB_S)


def test_the_service_over_hosts_that_are_cut_off_and_lost(
    cluster: hosts.Cluster, answers: Callable[[], list[dict[str, Any]]]
) -> None:
    """No answer is wrong at any moment, and every part is answered again after each blow."""

    def answered(since: float) -> bool:
        parts = {one["part"] for one in answers() if one["at"] > since and one["status"] == 200}
        return parts == set(PARTS)

    def wait(since: float) -> None:
        faults.until(lambda: answered(since), seconds=JOB_S, what="every part answers")

    wait(0)
    right = {one["part"]: one["text"] for one in answers() if one["status"] == 200}
    cut = next(host for host in cluster.up() if has(host, "embedder"))
    cluster.cut_off(cut, seconds=PARTITION_S)
    wait(time.time())

    cluster.grow(2)
    lost = next(host for host in cluster.up() if has(host, "embedder"))
    lost.lose()
    wait(time.time())
    faults.until(
        lambda: {one["status"] for one in answers()[-10:]} == {200},
        seconds=JOB_S,
        what="all is well",
    )
    for one in answers():
        assert one["status"] in (0, 200, 503)
        if one["status"] == 200:
            assert one["text"] == right[one["part"]]
        elif one["status"] == 503:
            assert json.loads(one["text"])["code"] == "unavailable"


def has(host: hosts.Host, part: str) -> bool:
    """Return whether a replica of a part is on a host."""
    words = f"ServeReplica:pathflip:{part}"
    return any(words in faults.command_line(pid) for pid in host.processes())
