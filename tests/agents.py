"""Agents of tests: the package's own client, over HTTP to an application and over stdio."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

import httpx2
import numpy as np
import uvicorn
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
MODES = ("legacy", "auto")
"""The two generations of the protocol: with a handshake, and without."""


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """Serve an application on a port of this machine; yields its base URL."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off", loop="asyncio")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as own:
        task = asyncio.create_task(server.serve(sockets=[own]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{own.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def over_http(
    url: str, headers: Mapping[str, str] | None = None, *, mode: str = "auto"
) -> AsyncIterator[Client]:
    """Connect an agent to a service."""
    async with httpx2.AsyncClient(headers=dict(headers or {}), timeout=60) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


@asynccontextmanager
async def over_stdio(
    *arguments: str, errors: TextIO = sys.stderr, mode: str = "auto", env: Mapping[str, str] = {}
) -> AsyncIterator[Client]:
    """Connect an agent to ``pathflip mcp`` with these arguments."""
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "pathflip.cli", "mcp", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        cwd=ROOT,
    )
    async with Client(stdio_client(command, errlog=errors), mode=mode) as client:
        yield client


async def result(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Structured result of a tool that must not fail; its text says the same."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, texts(answer)
    assert json.loads(texts(answer)[0]) == answer.structured_content
    found: dict[str, Any] = answer.structured_content
    return found


async def fault(client: Client, tool: str, **arguments: Any) -> tuple[str, str]:
    """Code and text of a tool's error."""
    answer = await client.call_tool(tool, arguments)
    assert answer.is_error
    assert answer.structured_content is None
    code, text = answer.meta["code"], texts(answer)[0]
    assert text.startswith(f"{code}: ")
    return code, text


def texts(answer: Any) -> Sequence[str]:
    """Return the texts of an answer."""
    return [block.text for block in answer.content if block.type == "text"]


def pictures(answer: Any) -> list[NDArray[np.uint8]]:
    """Return the pictures of an answer, RGB [h, w, 3]."""
    from PIL import Image

    found = []
    for block in answer.content:
        if block.type == "image":
            assert block.mime_type == "image/jpeg"
            with Image.open(io.BytesIO(base64.b64decode(block.data))) as image:
                found.append(np.asarray(image.convert("RGB")))
    return found
