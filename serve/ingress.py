"""The routes. Each checks a request, asks one or two parts, and shapes the answer.

Parts are plain asynchronous objects (:class:`serve.embedder.Embedder`,
:class:`serve.search.Search`, :class:`serve.grounding.Grounding`,
:class:`serve.chat_engine.ChatEngine`). Behind Ray Serve they are deployments reached through
:class:`serve.app.DeploymentClient`; the same routes run over either.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pathflip import __version__
from pathflip.errors import PathFLIPError
from serve.audit import AuditLog
from serve.auth import Tokens
from serve.chat import ChatChunks, count_tokens, events, to_engine_request
from serve.limits import Limits, RequestError, read_image, strict_json
from serve.middleware import Guard, Metrics, problem, status_of
from serve.proxy import Proofs
from serve.schemas import (
    MAX_ID,
    MAX_RESULTS,
    ChatRequest,
    ChatResponse,
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    GroundRequest,
    GroundResponse,
    Health,
    Image,
    ModelInfo,
    ModelList,
    Outlines,
    Problem,
    SearchRequest,
    SearchResponse,
    SegmentRequest,
    SegmentResponse,
    SlideInfo,
    SlideList,
)

READY_S = 5.0
"""Seconds a part has to answer a readiness check."""
_LONG_BODY = 64 << 10  # bytes of JSON from which it is parsed in a thread
_READY_CACHE_S = 1.0  # /readyz asks the parts at most this often

_PROBLEM = {"content": {"application/problem+json": {}}, "model": Problem}
_JPEG: dict[str, Any] = {"content": {"image/jpeg": {"schema": {"type": "string"}}}}
_PNG_OR_JSON: dict[str, Any] = {"content": {"image/png": {"schema": {"type": "string"}}}}
_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of the service that routes call.

    Attributes:
        embedder, search, grounding: See their modules.
        instructor: The chat engine; None where there is no language model.
        redactions: {path or URI of the server: what to show instead} in messages.
    """

    embedder: Any
    search: Any
    grounding: Any
    instructor: Any = None
    redactions: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """{name: part} of the parts there are."""
        parts = {name: getattr(self, name) for name in ("embedder", "search", "grounding")}
        return parts if self.instructor is None else parts | {"instructor": self.instructor}

    def public(self, text: str) -> str:
        """Remove the paths of this server from a message."""
        for secret in sorted(self.redactions, key=len, reverse=True):
            text = text.replace(secret, self.redactions[secret])
        return re.sub(r"(?<![\w.])(?:[a-z0-9]+:)?/{1,3}[^\s'\",;]*/[^\s'\",;]*", "…", text)


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) < _LONG_BODY:
            return strict_json(body)
        return await asyncio.to_thread(strict_json, body)


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


def needs(scope: str | None) -> Any:
    """Dependency that requires a scope of the client; None allows any client."""

    async def check(request: Request) -> None:
        client = request.state.client
        if scope is not None and scope not in client.scopes:
            raise RequestError(f"This token lacks the scope {scope}.", code="scope")

    return Depends(check)


def make_app(
    parts: Parts,
    *,
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    audit: AuditLog | None = None,
    proofs: Proofs | None = None,
) -> Guard:
    """Assemble the service as an ASGI application.

    Args:
        parts: The parts that answer.
        limits: Limits of this replica.
        tokens: Clients and their tokens; None answers this machine alone.
        audit: Audit log; None writes none.
        proofs: Secrets shared with the proxy in front (:mod:`serve.proxy`); None for no proxy.
    """
    limits = limits or Limits()
    metrics = Metrics()
    app = FastAPI(
        title="pathflip",
        version=__version__,
        description="Search, ground, classify and ask about the slides of an archive.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.include_router(routes(parts, limits, metrics))
    _shape_errors(app, parts, limits)
    return Guard(app, limits=limits, tokens=tokens, audit=audit, metrics=metrics, proofs=proofs)


def routes(parts: Parts, limits: Limits, metrics: Metrics) -> APIRouter:
    """Define all routes."""
    bearer = Depends(HTTPBearer(auto_error=False, description="A token from the token file."))
    errors: dict[int | str, dict[str, Any]] = {
        code: _PROBLEM for code in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 504)
    }
    api = APIRouter(route_class=_Route, responses=errors, dependencies=[bearer])
    open_api = APIRouter()
    ready = _Ready(parts)
    known: dict[str, dict[str, Any]] = {}

    async def about(part: str) -> dict[str, Any]:
        # Models do not change while an ingress runs, so each part is asked once.
        if part not in known:
            known[part] = await getattr(parts, part).describe()
        return known[part]

    # -- health -----------------------------------------------------------------------------------

    @open_api.get("/healthz", response_model=Health, response_model_exclude_none=True)
    @open_api.head("/healthz", include_in_schema=False)
    async def healthz() -> Any:
        """Report whether the ingress is up. Needs no token."""
        return {"status": "ok"}

    @api.get(
        "/readyz", response_model=Health, response_model_exclude_none=True,
        responses={503: {"model": Health}}, dependencies=[needs(None)],
    )  # fmt: skip
    async def readyz() -> Any:
        """Report whether every part is up."""
        up = await ready()
        body = {"status": "ok" if all(up.values()) else "down", "parts": up}
        return JSONResponse(body, 200 if all(up.values()) else 503)

    @api.get("/metrics", dependencies=[needs("admin")], response_class=Response, responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    async def metrics_text() -> Response:
        """Counts and times of this replica, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/openapi.json", dependencies=[needs(None)], include_in_schema=False)
    async def openapi(request: Request) -> Any:
        return JSONResponse(request.app.openapi())

    # -- slides -----------------------------------------------------------------------------------

    @api.get(
        "/v1/slides", dependencies=[needs("read")], response_model=SlideList,
        response_model_exclude_unset=True,
    )  # fmt: skip
    async def slides(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = 100,
        after: Annotated[str, Query(max_length=MAX_ID)] = "",
    ) -> Any:
        """The slides of the archive, by id."""
        rows, following = await parts.search.slides(after=after, limit=limit)
        request.state.audit["slides"] = [row["slide_id"] for row in rows]
        return {"data": rows, "next": following}

    @api.get(
        "/v1/slides/{slide_id}", dependencies=[needs("read")], response_model=SlideInfo,
        response_model_exclude_unset=True,
    )  # fmt: skip
    async def slide(request: Request, slide_id: _SlidePath) -> Any:
        """One slide."""
        row = await parts.search.slide(slide_id)
        request.state.audit["slides"] = [slide_id]
        return row

    @api.get(
        "/v1/slides/{slide_id}/thumbnail", dependencies=[needs("read")], response_class=Response,
        responses={200: _JPEG},
    )  # fmt: skip
    async def thumbnail(request: Request, slide_id: _SlidePath) -> Response:
        """A small picture of a slide's tissue; never of its label."""
        data = await parts.search.thumbnail(slide_id)
        request.state.audit["slides"] = [slide_id]
        return Response(data, media_type="image/jpeg")

    # -- search, classify, ground, embed ----------------------------------------------------------

    @api.post("/v1/search", dependencies=[needs("search")], response_model=SearchResponse)
    async def search(request: Request, asked: SearchRequest) -> Any:
        """Find slides, regions or patches by a text, a slide, a region or a picture."""
        query = asked.model_dump(exclude={"image"})
        made = None
        if asked.image is not None:
            patches = asked.level == "patch"
            made = await _embed_image(parts, asked.image, limits, patches=patches)
        elif asked.text is not None and asked.level == "patch":
            made = await parts.embedder.patch_text(asked.text)
        elif asked.text is not None and asked.mode != "text":
            made = await parts.embedder.texts([asked.text])
        if asked.slide_id is not None:
            request.state.audit["asked"] = asked.slide_id
        found = await parts.search.search(query, made)
        shown = dict.fromkeys(row["slide_id"] for row in found["results"])
        request.state.audit["slides"] = list(shown)
        return JSONResponse(found)

    @api.post("/v1/classify", dependencies=[needs("search")], response_model=ClassifyResponse)
    async def classify(request: Request, asked: ClassifyRequest) -> Any:
        """Score slides against classes that are described in words."""
        request.state.audit["slides"] = asked.slide_ids
        return JSONResponse(await parts.grounding.classify(asked.model_dump()))

    @api.post(
        "/v1/ground", dependencies=[needs("search")],
        response_model=GroundResponse | Outlines, response_model_exclude_none=True,
        responses={200: _PNG_OR_JSON},
    )  # fmt: skip
    async def ground(request: Request, asked: GroundRequest) -> Any:
        """Locate a text on a slide: boxes, as GeoJSON too, or a heatmap as PNG."""
        request.state.audit["slides"] = [asked.slide_id]
        found = await parts.grounding.ground(asked.model_dump())
        if isinstance(found, bytes):
            return Response(found, media_type="image/png")
        return JSONResponse(found)

    @api.post(
        "/v1/segment", dependencies=[needs("search")], response_model=SegmentResponse | Outlines,
        responses={200: _PNG_OR_JSON},
    )  # fmt: skip
    async def segment(request: Request, asked: SegmentRequest) -> Any:
        """Cut a slide into areas of classes: boxes, outlines as GeoJSON, or a PNG."""
        request.state.audit["slides"] = [asked.slide_id]
        await parts.search.slide(asked.slide_id)  # before many prompts are encoded for nothing
        classes = await parts.embedder.classes(asked.classes, templates=asked.templates)
        found = await parts.search.segment(asked.model_dump(), classes)
        if isinstance(found, bytes):
            return Response(found, media_type="image/png")
        return JSONResponse(found)

    @api.post(
        "/v1/embeddings", dependencies=[needs("search")], response_model=EmbeddingsResponse,
        response_model_exclude_none=True,
    )  # fmt: skip
    async def embeddings(asked: EmbeddingsRequest) -> Any:
        """Embed texts or a picture in the space that is searched."""
        if asked.model is not None and asked.model != (await about("embedder"))["id"]:
            raise RequestError(
                "There is no embedding model of this id; GET /v1/models lists them.",
                code="unknown_model",
            )
        if asked.image is not None:
            made = await _embed_image(parts, asked.image, limits)
        else:
            texts = [asked.input] if isinstance(asked.input, str) else list(asked.input or ())
            made = await parts.embedder.texts(texts)
        vectors = np.asarray(made["vectors"], "<f4")
        rows = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if asked.encoding_format == "base64"
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": made["tokens"], "total_tokens": made["tokens"]}
        return JSONResponse(
            {"object": "list", "model": made["model"], "data": rows, "usage": usage}
        )

    # -- chat -------------------------------------------------------------------------------------

    @api.get(
        "/v1/models", dependencies=[needs(None)], response_model=ModelList,
        response_model_exclude_none=True,
    )  # fmt: skip
    async def models() -> Any:
        """List the models: for chat first, then for embeddings, then for patches."""
        return {"data": await listed()}

    @api.get(
        "/v1/models/{model_id}", dependencies=[needs(None)], response_model=ModelInfo,
        response_model_exclude_none=True,
    )  # fmt: skip
    async def model(model_id: Annotated[str, Path(max_length=MAX_ID)]) -> Any:
        """One model."""
        for found in await listed():
            if found["id"] == model_id:
                return found
        raise RequestError(
            "There is no model of this id; GET /v1/models lists them.", code="unknown_model"
        )

    async def listed() -> list[dict[str, Any]]:
        found = []
        if parts.instructor is not None:
            found.append({"capability": "chat"} | await about("instructor"))
        embedder = dict(await about("embedder"))
        patches = embedder.pop("patches", None)
        found.append({"capability": "embeddings"} | embedder)
        if patches is not None:
            found.append({"capability": "patches"} | patches)
        return found

    @api.post(
        "/v1/chat/completions", dependencies=[needs("chat")], response_model=ChatResponse,
        response_model_exclude_none=True, responses={200: _EVENTS},
    )  # fmt: skip
    async def chat(request: Request, asked: ChatRequest) -> Any:
        """Answer a question about a slide, whole or streamed (server-sent events)."""
        if parts.instructor is None:
            raise RequestError(
                "This service has no language model: it was started without a tuned run.",
                code="no_engine",
            )
        if asked.model != (await about("instructor"))["id"]:
            raise RequestError(
                "There is no chat model of this id; GET /v1/models lists them.",
                code="unknown_model",
            )
        request.state.audit["slides"] = [asked.slide_id]
        stream = parts.instructor.chat(to_engine_request(asked, limits))
        chunks = ChatChunks(
            id=f"chatcmpl-{request.state.request_id}",
            model=asked.model,
            created=int(time.time()),
        )
        # The first chunk is awaited here, so that an error still has a status of its own.
        first = await anext(stream)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            body = events(chunks, first, stream, usage=usage, metrics=metrics, public=parts.public)
            return StreamingResponse(body, media_type="text/event-stream")
        text, last = "", first
        async with aclosing(stream):
            text += first["text"]
            async for last in stream:
                text += last["text"]
        count_tokens(metrics, last["usage"])
        return JSONResponse(chunks.whole(text, last))

    api.include_router(open_api)
    return api


_SlidePath = Annotated[str, Path(max_length=MAX_ID)]


async def _embed_image(parts: Parts, image: Image, limits: Limits, *, patches: bool = False) -> Any:
    pixels = await asyncio.to_thread(read_image, image.data, pixels=limits.image_pixels)
    embed = parts.embedder.patch_image if patches else parts.embedder.image
    return await embed(pixels, mpp=image.mpp)


class _Ready:
    """Readiness of the parts, asked at most once a second."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.at, self.known = -1e9, dict[str, bool]()
        self.lock = asyncio.Lock()

    async def __call__(self) -> dict[str, bool]:
        async with self.lock:
            if time.monotonic() - self.at > _READY_CACHE_S:
                named = self.parts.named()
                up = await asyncio.gather(*map(self._up, named.values()))
                self.known, self.at = dict(zip(named, up, strict=True)), time.monotonic()
            return self.known

    async def _up(self, part: Any) -> bool:
        try:
            await asyncio.wait_for(part.describe(), READY_S)
        except Exception:  # whatever the error, it is not up
            return False
        return True


# -- errors ---------------------------------------------------------------------------------------


def _shape_errors(app: FastAPI, parts: Parts, limits: Limits) -> None:
    """Answer every error as problem JSON."""

    def answer(request: Request, status: int, detail: str, code: str, **more: Any) -> Response:
        request_id = request.state.request_id
        return problem(
            status, detail, code=code, request_id=request_id, retry_s=limits.retry_s, **more
        )

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, PathFLIPError)
        status = status_of(error)
        if status == 500:
            raise error
        message, hint = parts.public(error.message), parts.public(error.hint)
        return answer(request, status, message, error.code, hint=hint)

    async def unfit(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # What the client sent is not repeated.
        faults = [
            {"where": ".".join(map(str, fault["loc"]))[:200], "what": str(fault["msg"])[:300]}
            for fault in error.errors()[:20]
        ]
        return answer(
            request,
            422,
            "The request does not match the API; errors says where.",
            "invalid",
            errors=faults,
        )

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method"}
        return answer(
            request, error.status_code, str(error.detail), codes.get(error.status_code, "invalid"),
            headers=error.headers,
        )  # fmt: skip

    async def broken(request: Request, error: Exception) -> Response:
        code = error.code if isinstance(error, PathFLIPError) else "internal"
        return answer(request, 500, "Internal server error.", code)

    # Answers; the error then goes on to the middleware, which writes it to the log.
    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(PathFLIPError, ours)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(HTTPException, http)
