"""Clients of the service in tests: streamed answers, what the chat replica says, its processes."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

from tests.faults import command_line, descendants, resident_bytes
from tests.serving import Service

Result = TypeVar("Result")


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """One for all, which never rests: else Serve's handles would not hear of new replicas."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Result of a coroutine; it ends when the wait for it does."""
    future = asyncio.run_coroutine_threadsafe(work, loop())
    try:
        return future.result()
    finally:
        future.cancel()


def processes(words: str) -> list[int]:
    """Processes of this test run whose command line holds the words."""
    return [pid for pid in descendants(os.getpid()) if words in command_line(pid)]


def chat_replica() -> int:
    """Process of the one replica of the chat engine."""
    (replica,) = processes("ServeReplica:pathflip:instructor")
    return replica


def engine_of(replica: int) -> int:
    """Process of a replica's vLLM: the largest below it, as it may lack its title."""
    return max(descendants(replica), key=lambda pid: resident_bytes([pid]))


async def load() -> dict[str, int]:
    """Answers begun and running, as the chat replica counts them."""
    from ray import serve

    from serve.app import NAME

    handle = serve.get_deployment_handle("instructor", NAME)
    found: dict[str, int] = await handle.load.remote()
    return found


async def begun(at_least: int) -> None:
    """Wait until so many answers have begun."""
    while (await load())["begun"] < at_least:
        await asyncio.sleep(0.02)


def connect(service: Service) -> httpx.AsyncClient:
    """A client without a limit of connections."""
    return httpx.AsyncClient(
        base_url=service.url, timeout=300, limits=httpx.Limits(max_connections=None)
    )


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    """Ask for a whole answer."""
    return await client.post("/v1/chat/completions", json=body)


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
    await begun(before + count)
    return tasks, events


def said(events: list[str]) -> str:
    """The text of an answer that ended as it should."""
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
