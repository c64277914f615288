"""Answers while each process of the service is killed: ``python -m tests.bench.serve_restarts``.

``pathflip serve`` runs over a small archive, with tokens and the fake engine. Clients ask four
kinds of things, each :data:`RATE` times a second; one process after the other is killed with
SIGKILL. For each kind it is counted how often the answer was 200, a 503 with ``Retry-After``, none
at all (the connection broke or was refused), or anything else, and when the last answer came that
was not 200. A process without which there is no service ends it, and it is started anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.faults import alive, command_line, descendants
from tests.serving import free_port, make_tuned

RATE = 2.0
"""Questions of each kind in a second."""
TOKEN = "restarts" * 4
VICTIMS = {
    "embedder": "ServeReplica:pathflip:embedder",
    "search": "ServeReplica:pathflip:search",
    "grounding": "ServeReplica:pathflip:grounding",
    "instructor": "ServeReplica:pathflip:instructor",
    "ingress": "ServeReplica:pathflip:ingress",
    "HAProxy": "bin/haproxy",
    "above HAProxy": "proxy_process.py",
    "HAProxy's actor": "HAProxyManager",
    "Serve's controller": "ServeController",
    "Serve's own proxy": "ProxyActor",
    "GCS": "gcs_server",
    "raylet": "raylet/raylet",
}
"""{process: words of its command line}."""
WATCHED_S = {"GCS": 90.0}
"""Seconds for which a process's absence may not show."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question and what came.

    Attributes:
        kind: Part that answers it, behind the ingress.
        at: Second it was asked, from the kill on.
        ended: Second of its answer.
        seen: ``200``, ``503`` (with ``Retry-After``), ``none`` or another status and its code.
    """

    kind: str
    at: float
    ended: float
    seen: str


def questions(model: str) -> dict[str, tuple[str, str, Any]]:
    """{part: (method, path, body)} of what is asked."""
    messages = [{"role": "user", "content": "What is seen?"}]
    chat = {"model": model, "slide_id": "slide000", "messages": messages, "max_tokens": 4}
    return {
        "embedder": ("POST", "/v1/embeddings", {"input": "necrosis"}),
        "search": ("GET", "/v1/slides", None),
        "grounding": ("POST", "/v1/ground", {"slide_id": "slide000", "text": "necrosis"}),
        "instructor": ("POST", "/v1/chat/completions", chat),
    }


def seen(answer: httpx.Response) -> str:
    """Name an answer."""
    if answer.status_code == 200:
        return "200"
    retry = int(answer.headers.get("retry-after", 0)) >= 1
    if answer.status_code == 503 and retry and answer.json()["code"] == "unavailable":
        return "503"
    return f"{answer.status_code} {answer.text[:80]}"


async def strike(
    url: str, pids: list[int], *, least_s: float, most_s: float, over: Callable[[], bool]
) -> list[Asked]:
    """Ask, kill the processes, and ask until all is well for five seconds again, or over."""
    found: list[Asked] = []
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        model = next(entry["id"] for entry in listed if entry["capability"] == "chat")
        struck = time.monotonic() + 3

        async def ask(kind: str, method: str, path: str, body: Any) -> None:
            at = time.monotonic()
            try:
                what = seen(await http.request(method, path, json=body))
            except httpx.TransportError:
                what = "none"
            ended = time.monotonic()
            found.append(Asked(kind=kind, at=at - struck, ended=ended - struck, seen=what))

        tasks, killed = [], False
        while True:
            now = time.monotonic() - struck
            if not killed and now >= 0:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                killed = True
            bad = max((each.ended for each in found if each.seen != "200"), default=0.0)
            if over() or now > most_s or now > max(least_s, bad + 5):
                break
            tasks += [
                asyncio.create_task(ask(kind, *how)) for kind, how in questions(model).items()
            ]
            await asyncio.sleep(1 / RATE)
        await asyncio.gather(*tasks)
    return found


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    """Start the service and wait until it is ready."""
    command = [
        sys.executable, "-m", "pathflip.cli", "serve", "--json", "--port", str(port),
        "--archive", str(folder / "archive"), "--run", str(folder / "run"),
        "--token-file", str(folder / "tokens"), "-o", f"audit={folder / 'audit'}",
        "-o", "engine.backend=fake", "-o", "engine.fake.text=There is necrosis. ",
        "-o", "engine.fake.repeat=true",
    ]  # fmt: skip
    with (folder / "stderr").open("a") as errors:
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert service.stdout is not None
    assert service.stdout.readline(), (folder / "stderr").read_text()
    return service


def summary(name: str, found: list[Asked], ended: int | None) -> dict[str, Any]:
    """Counts of what was seen from the kill on, by kind."""
    kinds = {
        kind: dict(Counter(each.seen for each in found if each.kind == kind and each.ended > 0))
        for kind in sorted({each.kind for each in found})
    }
    last = {
        kind: round(max(bad), 1)
        for kind in kinds
        if (bad := [e.ended for e in found if e.kind == kind and e.seen != "200" and e.ended > 0])
    }
    return {"killed": name, "seen": kinds, "last_not_200_s": last, "exit_status": ended}


def main() -> None:
    """Kill what was named, or everything in turn, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("victims", nargs="*", metavar="VICTIM", help=", ".join(VICTIMS))
    parser.add_argument("--seconds", type=float, default=120.0, help="most seconds of a restart")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, port, service = Path(name), free_port(), None
        make_tuned(folder)
        (folder / "tokens").write_text(f"all read,search,chat,admin {TOKEN}\n")
        (folder / "tokens").chmod(0o600)
        try:
            for victim in arguments.victims or VICTIMS:
                if service is None or service.poll() is not None:
                    service = start(folder, port)
                words = VICTIMS[victim]
                pids = [p for p in descendants(service.pid) if words in command_line(p)]
                running = service
                work = strike(
                    f"http://127.0.0.1:{port}", pids,
                    least_s=WATCHED_S.get(victim, 10.0), most_s=arguments.seconds,
                    over=lambda running=running: running.poll() is not None,
                )  # fmt: skip
                found = asyncio.run(work)
                rows.append(summary(victim, found, service.poll()) | {"load": os.getloadavg()[0]})
                if not arguments.json:
                    print(json.dumps(rows[-1]), flush=True)
        finally:
            below = [] if service is None else [service.pid, *descendants(service.pid)]
            if service is not None:
                service.terminate()
                service.wait(90)
            for pid in filter(alive, below):
                os.kill(pid, signal.SIGKILL)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
