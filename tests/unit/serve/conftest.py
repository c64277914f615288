"""The service in this process: the routes over the real parts, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from serve.annotations import Annotations
from serve.audit import AuditLog
from serve.auth import read_tokens
from serve.embedder import Embedder
from serve.grounding import Grounding
from serve.ingress import make_app
from serve.limits import Limits
from serve.proxy import Proofs
from serve.reader_pool import ReadingConfig
from serve.routing import Parts
from serve.search import Search
from serve.tiles import Tiles
from tests.unit.serve.service_fixture import World, bearer, make_world

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def parts(world: World) -> Parts:
    archive, run = str(world.archive), str(world.run)
    return Parts(
        embedder=Embedder(archive, run),
        search=Search(archive, model=world.loaded.name, fingerprint=world.loaded.fingerprint),
        grounding=Grounding(archive, run),
        annotations=Annotations(archive),
        tiles=Tiles(archive, config=ReadingConfig(readers=1)),
        redactions={archive: "the archive", run: "the run"},
    )


@pytest.fixture(scope="session")
def loop() -> Any:
    """One event loop, as in a replica."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="session")
def serving(parts: Parts, world: World, loop: asyncio.AbstractEventLoop) -> Callable[..., Ask]:
    """``serving(limits=…, audit=…, …)(method, path, …)``: asks a service made with these."""

    def make(
        *,
        tokens: bool = True,
        limits: Limits | None = None,
        audit: AuditLog | None = None,
        proofs: Proofs | None = None,
    ) -> Ask:
        app = make_app(
            parts,
            limits=limits,
            tokens=read_tokens(world.token_file) if tokens else None,
            audit=audit,
            proofs=proofs,
        )

        def ask(method: str, path: str, *, who: str | None = "all", **options: Any) -> Any:
            headers = dict(bearer(who) if who and tokens else {}) | options.pop("headers", {})
            base = options.pop("base", "http://127.0.0.1")
            client = options.pop("client", ("127.0.0.1", 1))

            async def send() -> httpx.Response:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
                async with httpx.AsyncClient(transport=transport, base_url=base) as http:
                    return await http.request(method, path, headers=headers, **options)

            return loop.run_until_complete(send())

        ask.app = app  # type: ignore[attr-defined]
        return ask

    return make


@pytest.fixture(scope="session")
def ask(serving: Callable[..., Ask]) -> Ask:
    """``ask(method, path, who=…, …)``: a service with tokens."""
    return serving()


@pytest.fixture
def together(loop: asyncio.AbstractEventLoop) -> Callable[[Awaitable[Any]], Any]:
    """Run a coroutine on that loop."""
    return lambda work: loop.run_until_complete(work)
