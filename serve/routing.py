"""Parts, scopes and the router that every module of routes begins with.

A module of routes has a function ``routes(parts, limits) -> APIRouter``, which
:data:`serve.ingress.MODULES` lists. Each of its routes says the scope it needs (:func:`needs`),
asks its part by :meth:`Parts.need`, and adds the ids it shows to ``request.state.audit``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from serve.limits import MAX_NAMES, RequestError, strict_json
from serve.schemas import MAX_ID, Problem

JPEG: dict[str, Any] = {"content": {"image/jpeg": {"schema": {"type": "string"}}}}
"""Response of a route that answers with a JPEG."""
SlidePath = Annotated[str, Path(max_length=MAX_ID)]
"""Slide id in the path of a route."""

_MAX_TAGS = 8192  # characters of If-None-Match
_LONG_BODY = 64 << 10  # bytes of JSON from which it is parsed in a thread
_PROBLEM = {"content": {"application/problem+json": {}}, "model": Problem}
_MISSING = {
    "embedder": ("This service was started without a trained run.", "no_model"),
    "grounding": ("This service was started without a trained run.", "no_model"),
    "instructor": (
        "This service has no language model: it was started without a tuned run.", "no_engine",
    ),
}  # fmt: skip
"""{part: message and code where the service has none}."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of the service that routes call.

    Attributes:
        search: Search over the archive and its slides.
        embedder, grounding: See their modules; None without a trained run.
        instructor: The chat engine; None where there is no language model.
        tiles: Pixels of slides (:mod:`serve.tiles`).
        annotations: Annotations of slides.
        redactions: {path or URI of the server: what to show instead} in messages.
    """

    search: Any
    embedder: Any = None
    grounding: Any = None
    instructor: Any = None
    tiles: Any = None
    annotations: Any = None
    redactions: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """{name: part} of the parts there are."""
        names = ("embedder", "search", "grounding", "instructor", "tiles", "annotations")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def need(self, name: str) -> Any:
        """Return a part.

        Raises:
            RequestError: The service has none: ``no_model``, ``no_engine``, ``no_part``.
        """
        part = getattr(self, name)
        if part is None:
            message, code = _MISSING.get(name, (f"This service has no {name}.", "no_part"))
            raise RequestError(message, code=code)
        return part

    def public(self, text: str) -> str:
        """Remove the paths of this server from a message."""
        for secret in sorted(self.redactions, key=len, reverse=True):
            text = text.replace(secret, self.redactions[secret])
        return re.sub(r"(?<![\w.])(?:[a-z0-9]+:)?/{1,3}[^\s'\",;]*/[^\s'\",;]*", "…", text)


def api_router() -> APIRouter:
    """Make a router whose routes parse JSON strictly and answer errors as problem JSON."""
    bearer = Depends(HTTPBearer(auto_error=False, description="A token from the token file."))
    errors: dict[int | str, dict[str, Any]] = {
        code: _PROBLEM for code in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 504)
    }
    return APIRouter(route_class=_Route, responses=errors, dependencies=[bearer])


def needs(scope: str | None) -> Any:
    """Dependency that requires a scope of the client; None allows any client."""

    async def check(request: Request) -> None:
        client = request.state.client
        if scope is not None and scope not in client.scopes:
            raise RequestError(f"This token lacks the scope {scope}.", code="scope")

    return Depends(check)


def known_tags(request: Request) -> list[str]:
    """Return the ETags of what the client has."""
    return re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")[:_MAX_TAGS])


class _StrictRequest(Request):
    async def json(self) -> Any:
        return await strict_body(self)


async def strict_body(request: Request, *, names: int = MAX_NAMES) -> Any:
    """Parse a body by :func:`serve.limits.strict_json`, a long one in a thread."""
    body = await request.body()
    if len(body) < _LONG_BODY:
        return strict_json(body, names=names)
    return await asyncio.to_thread(strict_json, body, names=names)


class _Route(APIRoute):
    """Route that parses JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Any:
            strict_request = _StrictRequest(request.scope, request.receive)
            try:
                return await handle(strict_request)
            except HTTPException as error:
                # FastAPI wraps whatever reading the body raised.
                if isinstance(error.__cause__, RequestError):
                    raise error.__cause__ from None
                raise

        return strict
