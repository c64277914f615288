"""Clients that leave, replicas that die, an end under open streams: with a fake engine.

What only the real engine shows is in tests/integration/test_serve_engine.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from serve.app import NAME
from tests.faults import alive, descendants, until
from tests.serving import FAKE_TEXT, Service
from tests.streams import (
    begun,
    chat_replica,
    connect,
    load,
    open_streams,
    post,
    processes,
    read,
    run,
    said,
)

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_clients_vanish(service: Service) -> None:
    """100 clients leave mid-stream, 20 before the whole; no answer would end by itself."""
    body = service.body(max_tokens=512)

    async def main() -> None:
        async with connect(service) as client:
            found = await asyncio.gather(*(read(client, body, [], most=2) for _ in range(100)))
            assert set(found) == {200}
            before = (await load())["begun"]
            whole = [asyncio.create_task(post(client, body)) for _ in range(20)]
            await begun(before + 20)
            for task in whole:
                assert not task.done()
                task.cancel()

    with service.held():
        run(main())
        until(
            lambda: run(load())["running"] == 0,
            seconds=15,
            what="the engine to drop what nobody reads",
        )


def test_replica_dies(service: Service) -> None:
    """At 10 requests a second the replica aborts; what it was saying fails, nothing else."""
    replica = chat_replica()
    counts: Counter[int] = Counter()
    over = threading.Event()

    async def main() -> list[list[str]]:
        async with connect(service) as client:
            with service.held():
                tasks, events = await open_streams(client, service.body(max_tokens=900), 4)
                while not all(events):
                    await asyncio.sleep(0.02)
                os.kill(replica, signal.SIGABRT)
                await asyncio.gather(*tasks)
            short = []
            in_a_row = 0

            async def one() -> None:
                nonlocal in_a_row
                answer = await post(client, service.body(max_tokens=2))
                counts[answer.status_code] += 1
                in_a_row = in_a_row + 1 if answer.status_code == 200 else 0
                if answer.status_code != 200:
                    assert int(answer.headers["retry-after"]) >= 1
                if in_a_row >= 10:
                    over.set()

            while not over.is_set():
                short.append(asyncio.create_task(one()))
                await asyncio.sleep(0.1)
            await asyncio.gather(*short)
        return events

    for events in run(main()):
        assert events[-1] != "[DONE]", "an answer that was cut looks whole"
        assert "error" in json.loads(events[-1])
    assert set(counts) <= {200, 429, 503, 504}  # 504: a slow machine takes long to start another
    assert chat_replica() != replica


class Stranger(ThreadingHTTPServer):
    """Another service at a port: it answers everything, also whether it is up.

    Args:
        port: Port, shared with the process that listens there.
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


def test_a_part_dies_alone(service: Service) -> None:
    """Its clients are told to come back, soon; the others' notice nothing."""
    struck = processes("ServeReplica:pathflip:grounding")
    assert struck
    told: dict[str, Counter[int]] = {"grounding": Counter(), "others": Counter()}
    over = threading.Event()

    async def main() -> None:
        async with connect(service) as client:

            async def ground() -> None:
                answer = await client.post(
                    "/v1/ground", json={"slide_id": "slide000", "text": "necrosis"}
                )
                told["grounding"][answer.status_code] += 1
                if answer.status_code != 200:
                    assert answer.json()["code"] == "unavailable"
                    assert int(answer.headers["retry-after"]) >= 1
                elif told["grounding"][503] and not any(map(alive, struck)):
                    over.set()

            async def other() -> None:
                told["others"][(await client.get("/v1/slides")).status_code] += 1

            await ground()
            for pid in struck:
                os.kill(pid, signal.SIGKILL)
            tasks = []
            while not over.is_set():
                # So many that they would fill the service if they waited.
                tasks += [asyncio.create_task(ground()) for _ in range(2)]
                tasks.append(asyncio.create_task(other()))
                await asyncio.sleep(0.1)
            await asyncio.gather(*tasks)

    run(main())
    assert set(told["grounding"]) == {200, 503}
    assert set(told["others"]) == {200}


@pytest.mark.parametrize("words", ["bin/haproxy", "HAProxyManager", "ServeController"])
def test_what_stands_before_the_parts_dies(service: Service, words: str) -> None:
    """It is there again; of HAProxy connections that it had are lost, of the others nothing."""
    struck = processes(words)
    assert struck

    def ask() -> bool:
        try:
            assert httpx.get(f"{service.url}/v1/slides", timeout=60).status_code == 200
        except httpx.TransportError:
            assert words == "bin/haproxy"
            return False
        return True

    assert ask()
    for pid in struck:
        os.kill(pid, signal.SIGKILL)

    def back() -> bool:
        return ask() and bool(set(processes(words)) - set(struck))

    until(back, seconds=120, what="another to be there")
    for _ in range(20):
        assert ask()


def test_drain(service: Service) -> None:
    """The service is taken down with 20 open streams; all of them end as they should."""
    from ray import serve

    replicas = processes("ServeReplica:pathflip:")
    assert chat_replica() in replicas
    below = descendants(chat_replica())

    async def main() -> list[list[str]]:
        async with connect(service) as client:
            with service.held():
                tasks, events = await open_streams(client, service.body(max_tokens=400), 20)
                going = asyncio.create_task(asyncio.to_thread(serve.delete, NAME))
                while NAME in serve.status().applications and (
                    serve.status().applications[NAME].status != "DELETING"
                ):
                    await asyncio.sleep(0.02)
                assert not any(task.done() for task in tasks)
            assert await asyncio.gather(*tasks) == [200] * 20
            await going
        return events

    words = [f"{word} " for word in FAKE_TEXT.split()]
    for events in run(main()):
        assert said(events) == "".join(words * 4)
    until(
        lambda: not any(map(alive, [*replicas, *below])),
        seconds=15,
        what="the replicas and all below them to end",
    )
