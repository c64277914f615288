"""Clients that leave, a replica that dies, an end under open streams, which the last test makes."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import httpx
import pytest

from serve.app import NAME
from tests.faults import alive, command_line, descendants, resident_bytes, until
from tests.serving import Service, cpu_s

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

Result = TypeVar("Result")


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """One for all, which never rests: else Serve's handles would not hear of new replicas."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine gives; it ends when the wait for it does."""
    future = asyncio.run_coroutine_threadsafe(work, loop())
    try:
        return future.result()
    finally:
        future.cancel()


def processes(words: str) -> list[int]:
    """Processes of this test run whose command line holds the words."""
    return [pid for pid in descendants(os.getpid()) if words in command_line(pid)]


def instructor() -> tuple[int, int]:
    """The instructor's replica and its engine: the largest below it, as it may lack its title."""
    (replica,) = processes("ServeReplica:pathflip:Instructor")
    return replica, max(descendants(replica), key=lambda pid: resident_bytes([pid]))


async def load() -> dict[str, int]:
    """What the engine's replica says of itself."""
    from ray import serve

    handle = serve.get_deployment_handle("Instructor", NAME)
    found: dict[str, int] = await handle.load.remote()
    return found


async def read(
    client: httpx.AsyncClient, body: dict[str, Any], events: list[str], *, most: int = 10**6
) -> int:
    """Read a streamed answer's events into a list, and leave after so many; its status."""
    body = body | {"stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                if len(events) == most:
                    break
    return 200


async def open_streams(
    client: httpx.AsyncClient, body: dict[str, Any], count: int
) -> tuple[list[asyncio.Task[int]], list[list[str]]]:
    """So many streams, each of which has reached the replica."""
    before = (await load())["begun"]
    events: list[list[str]] = [[] for _ in range(count)]
    tasks = [asyncio.create_task(read(client, body, own)) for own in events]
    while (await load())["begun"] < before + count:
        await asyncio.sleep(0.02)
    return tasks, events


def connect(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=service.url, timeout=300, limits=httpx.Limits(max_connections=None)
    )


def said(events: list[str]) -> str:
    """The text of an answer that ended as it should."""
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_clients_vanish(service: Service) -> None:
    """E4: 100 clients leave mid-stream, 20 before the whole; that would take a minute to write."""
    body = service.body(max_tokens=512)

    async def main() -> None:
        async with connect(service) as client:
            found = await asyncio.gather(*(read(client, body, [], most=3) for _ in range(100)))
            assert set(found) == {200}
            before = (await load())["begun"]
            whole = [
                asyncio.create_task(client.post("/v1/chat/completions", json=body))
                for _ in range(20)
            ]
            while (await load())["begun"] < before + 20:
                await asyncio.sleep(0.02)
            for task in whole:
                assert not task.done()
                task.cancel()

    run(main())
    until(
        lambda: run(load())["running"] == 0,
        seconds=15,
        what="the engine to drop what nobody reads",
    )
    _, engine = instructor()

    def idle() -> bool:
        before = cpu_s(engine)
        time.sleep(0.5)
        return cpu_s(engine) - before < 0.1

    until(idle, seconds=15, what="the engine's process to rest")


def test_replica_dies(service: Service) -> None:
    """E2: at 10 requests a second the replica aborts; what it was saying fails, nothing else."""
    replica, engine = instructor()
    counts: Counter[int] = Counter()
    over = threading.Event()

    async def main() -> list[list[str]]:
        async with connect(service) as client:
            begun, events = await open_streams(client, service.body(max_tokens=900), 4)
            while not all(events):
                await asyncio.sleep(0.02)
            os.kill(replica, signal.SIGABRT)
            short = []
            in_a_row = 0

            async def one() -> None:
                nonlocal in_a_row
                answer = await client.post("/v1/chat/completions", json=service.body(max_tokens=2))
                counts[answer.status_code] += 1
                in_a_row = in_a_row + 1 if answer.status_code == 200 else 0
                if answer.status_code != 200:
                    assert int(answer.headers["retry-after"]) >= 1
                if in_a_row >= 10:
                    over.set()

            while not over.is_set():
                short.append(asyncio.create_task(one()))
                await asyncio.sleep(0.1)
            await asyncio.gather(*short, *begun)
        return events

    for events in run(main()):
        assert events[-1] != "[DONE]", "an answer that was cut looks whole"
        assert "error" in json.loads(events[-1])
    assert set(counts) <= {200, 429, 503, 504}  # 504: a slow machine takes long to start another
    assert not alive(engine), "the engine outlived its replica"
    (now,) = processes("ServeReplica:pathflip:Instructor")
    assert now != replica


class Stranger(ThreadingHTTPServer):
    """Another service at a port: it answers everything, also whether it is up.

    Args:
        port: Where, beside whoever is there and shares it.
    """

    SAYS = "rows of another"

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", port), _Says)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class _Says(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(Stranger.SAYS)))
        self.end_headers()
        self.wfile.write(Stranger.SAYS.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_nobody_else_answers_for_a_dead_ingress(service: Service) -> None:
    """The ingress is killed, and another service listens where every Ray has its fallback.

    Clients are told 503 until the service's own is back. (That nobody is heard who listens at the
    dead one's port is seen in tests/unit/serve/test_proxy.py: here it is rarely free in time.)
    """
    replicas = processes("ServeReplica:pathflip:ingress")
    told: Counter[int] = Counter()
    stranger = Stranger(8500)

    def back() -> bool:
        try:
            answer = httpx.get(f"{service.url}/v1/slides", timeout=60)
        except httpx.RemoteProtocolError:  # it was being asked when it died
            return False
        assert Stranger.SAYS not in answer.text, f"a stranger answered: {told}"
        told[answer.status_code] += 1
        if answer.status_code != 200:
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code == 200 and not any(map(alive, replicas))

    try:
        assert replicas
        for pid in replicas:
            os.kill(pid, signal.SIGKILL)
        until(back, seconds=120, what="the service's own ingress to answer")
    finally:
        stranger.shutdown()
        stranger.server_close()
    assert told[503], "nothing was asked while no ingress was there"
    assert "/v1/slides" not in stranger.asked  # the checks of another Ray may be


def test_drain(service: Service) -> None:
    """E3: the service is taken down with 20 open streams; all of them end as they should."""
    from ray import serve

    replica, _ = instructor()
    below = descendants(replica)

    async def main() -> list[list[str]]:
        async with connect(service) as client:
            tasks, events = await open_streams(client, service.body(max_tokens=400), 20)
            assert not any(task.done() for task in tasks)
            await asyncio.to_thread(serve.delete, NAME)
            assert await asyncio.gather(*tasks) == [200] * 20
        return events

    assert len({said(events) for events in run(main())}) == 1
    until(
        lambda: not any(map(alive, [replica, *below])),
        seconds=15,
        what="the replica and all below it to end",
    )
