"""Classify and ground over HTTP, alone and with 64 clients: part ``grounding`` of the bench.

96 slides of 16 to 32 regions x 256 patches x 131 features, preset ``pathflip/mini``, ingress and
grounding as the service runs them. *Alone* is one request after another: first of slides that were
not asked about before (``new``), then of the same again (``kept``). Then 64 clients ask about all
at once, each as soon as it was answered: when most slides are new to the service, and again. CPU ms
are of all processes of the service, for each answer.

``python -m tests.bench.serve --only grounding --json``
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.bench.ingest import say
from tests.faults import command_line, descendants, resident_bytes
from tests.serving import cpu_s, free_port

CLIENTS = 64
SLIDES = 96
ALONE = 40
TILING = {
    "region_um": 2048.0,
    "patch_um": 128.0,
    "mpp": 0.5,
    "min_patch_tissue": 0.5,
    "min_region_patches": 0.1,
}
ORGANS = ("colon", "breast", "lung", "muscle", "liver", "kidney", "skin", "thyroid")
WORDS = ("necrosis", "mucin", "keratin", "fibrosis", "tumour", "lymphocytes", "glands", "fat")


def grounding(folder: Path, seconds: float) -> dict[str, Any]:
    """Milliseconds and CPU of both routes, alone and with 64 clients."""
    uri, run = make_inputs(folder)
    report: dict[str, Any] = {}
    for route in ("classify", "ground"):
        # A service for each, so that the slides of both are cold at first.
        with running(uri, run) as url:
            report[route] = asyncio.run(_measure(url, route, seconds))
        say(f"{route}: {json.dumps(report[route])}")
    return report


def make_inputs(folder: Path) -> tuple[str, str]:
    """Make archive and run below a folder."""
    from pathflip.archive import Archive
    from tests.archives import make_archive

    dim = 131
    uri = make_archive(folder / "archive", slides=SLIDES, regions=(16, 32), dim=dim, tiling=TILING)
    texts = Archive(uri).captions()["text"].to_pylist()
    return str(uri), make_run(folder / "run", uri, texts=texts, dim=dim)


def make_run(folder: Path, uri: Path, *, texts: list[str], dim: int) -> str:
    """Make a run, untrained, that fits an archive with features of encoder ``tex``."""
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import write_whole
    from pathflip.models import PathFLIP

    archive = Archive(uri)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PathFLIP.from_preset("pathflip/mini", feature_dim=dim, texts=texts).eval()
    about = {
        "run": "run",
        "fingerprint": model.fingerprint(),
        "encoder": {"name": "tex", "revision": archive.encoders()["tex"]["revision"], "dim": dim},
        "tiling": archive.tiling(),
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)
    return str(folder)


@contextmanager
def running(uri: str, run: str, **settings: Any) -> Iterator[str]:
    """The service without a language model on a Ray of its own; yields its URL."""
    import ray
    from ray import serve

    from serve.app import NAME, build

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        port = free_port()
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        serve.run(build({"archive": uri, "run": run} | settings), name=NAME)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def _measure(url: str, route: str, seconds: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        for number in range(5):  # the first of all is never like the rest
            await _ask(client, route, number, slide=SLIDES - 1)
        cold = [await _ask(client, route, n, slide=n) for n in range(ALONE)]
        warm = [await _ask(client, route, n + 3, slide=n) for n in range(ALONE)]
        loads = {name: await _load(url, route, seconds) for name in ("new", "kept")}
    alone = {
        name: statistics.median(ms for _, ms in one)
        for name, one in (("new", cold), ("kept", warm))
    }
    return {
        "alone_p50_ms": alone,
        "at_64": loads,
        "p99_over_alone": {name: loads[name]["p99_ms"] / alone[name] for name in loads},
        "grounding_replicas": len(_replicas("grounding")),
        "grounding_mb": [round(resident_bytes([pid]) / 2**20) for pid in _replicas("grounding")],
    }


async def _load(url: str, route: str, seconds: float) -> dict[str, Any]:
    """Let 64 clients ask for some seconds, each as soon as it was answered."""
    before = _cpu_ms()
    took: list[float] = []
    status: Counter[int] = Counter()
    began = time.perf_counter()

    async def work(mine: int) -> None:
        number = 7 * mine
        # Each its own connections: one pool looks at all of them for every request.
        async with httpx.AsyncClient(base_url=url, timeout=300) as own:
            while time.perf_counter() < began + seconds:
                number += 1
                code, ms = await _ask(own, route, number, slide=(number * 37 + mine) % SLIDES)
                status[code] += 1
                took.append(ms)

    await asyncio.gather(*(work(n) for n in range(CLIENTS)))
    wall, after = time.perf_counter() - began, _cpu_ms()
    took.sort()
    return {
        "p50_ms": took[len(took) // 2],
        "p99_ms": took[len(took) * 99 // 100],
        "per_s": len(took) / wall,
        "status": {str(code): count for code, count in sorted(status.items())},
        "cpu_ms": {name: (ms - before.get(name, 0)) / len(took) for name, ms in after.items()},
    }


async def _ask(
    client: httpx.AsyncClient, route: str, number: int, *, slide: int
) -> tuple[int, float]:
    """Send one request: status, milliseconds."""
    a, b = WORDS[number % 8], WORDS[number // 8 % 8]
    body: dict[str, Any] = {"slide_id": f"slide{slide:03d}", "text": f"{a} beside {b} {number % 5}"}
    if route == "classify":
        shown = [ORGANS[(number + step) % 8] for step in range(3)]
        body = {
            "slide_ids": [f"slide{slide:03d}"],
            "classes": {organ: [f"{organ} tissue"] for organ in shown},
        }
    began = time.perf_counter()
    answer = await client.post(f"/v1/{route}", json=body)
    ms = 1e3 * (time.perf_counter() - began)
    if answer.status_code == 200 and route == "ground":
        assert answer.json()["text"] == body["text"]
    return answer.status_code, ms


def _replicas(part: str) -> list[int]:
    words = f"ServeReplica:pathflip:{part}"
    return [pid for pid in descendants(os.getpid()) if words in command_line(pid)]


def _cpu_ms() -> dict[str, float]:
    """CPU ms of this process, which is the clients, and of all processes below it, by part."""
    found: Counter[str] = Counter()
    for pid in descendants(os.getpid()):
        command = command_line(pid)
        name = next((part for part in ("grounding", "ingress", "haproxy") if part in command), "")
        found[name or "other"] += 1e3 * cpu_s(pid)
    return {"clients": 1e3 * time.process_time(), **found}
