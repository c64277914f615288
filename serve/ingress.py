"""The application: routes of all modules, and the one shape of their errors.

Routes check a request, ask one or two parts, and shape the answer. Parts are plain asynchronous
objects (:class:`serve.routing.Parts`). Behind Ray Serve they are deployments reached through
:class:`serve.app.DeploymentClient`; the same routes run over either. Health, models, search and
chat are here, other routes in the modules of :data:`MODULES`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pathflip import __version__
from pathflip.errors import PathFLIPError
from serve import annotation_routes, answers, pages, sign_in, slide_routes, tile_routes
from serve.audit import AuditLog
from serve.auth import Tokens
from serve.chat import ChatChunks, count_tokens, events, to_engine_request
from serve.limits import Limits, RequestError
from serve.mcp import Endpoint
from serve.metrics import Metrics
from serve.middleware import Guard, problem, status_of
from serve.proxy import Proofs
from serve.routing import Parts, api_router, needs
from serve.schemas import (
    MAX_ID,
    ChatRequest,
    ChatResponse,
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    GroundRequest,
    GroundResponse,
    Health,
    ModelInfo,
    ModelList,
    Outlines,
    SearchRequest,
    SearchResponse,
    SegmentRequest,
    SegmentResponse,
)
from serve.sign_in import SignIn

MODULES = (pages, sign_in, slide_routes, annotation_routes, tile_routes)
"""Modules with further routes, each by its function ``routes(parts, limits)``."""
READY_S = 5.0
"""Seconds a part has to answer a readiness check."""
_READY_CACHE_S = 1.0  # /readyz asks the parts at most this often

_PNG_OR_JSON: dict[str, Any] = {"content": {"image/png": {"schema": {"type": "string"}}}}
_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def make_app(
    parts: Parts,
    *,
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    audit: AuditLog | None = None,
    proofs: Proofs | None = None,
    session_key: bytes | None = None,
    framed: bool = False,
) -> Guard:
    """Assemble the service as an ASGI application.

    Args:
        parts: The parts that answer.
        limits: Limits of this replica.
        tokens: Clients and their tokens; None answers this machine alone.
        audit: Audit log; None writes none.
        proofs: Secrets shared with the proxy in front (:mod:`serve.proxy`); None for no proxy.
        session_key: Secret of sessions that replicas share where there is no proxy; by default
            drawn for this replica.
        framed: Whether pages of this machine may show the viewer in a frame.
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
    app.include_router(_routes(parts, limits, metrics))
    for module in MODULES:
        app.include_router(module.routes(parts, limits))
    app.router.routes.append(Endpoint(parts, limits=limits, metrics=metrics).route())
    _shape_errors(app, parts, limits)
    sessions = None
    if tokens is not None:
        key = os.urandom(32) if session_key is None else session_key
        sessions = SignIn(
            tokens,
            key=key if proofs is None else proofs.sessions.encode(),
            ended=None if audit is None else sign_in.ended_folder(audit.path),
        )
    app.state.sign_in = sessions
    return Guard(
        app, limits=limits, tokens=tokens, audit=audit, metrics=metrics, proofs=proofs,
        sign_in=sessions, framed=framed,
    )  # fmt: skip


def _routes(parts: Parts, limits: Limits, metrics: Metrics) -> APIRouter:
    """Define health, models, search and chat."""
    api, open_api = api_router(), APIRouter()
    ready = _Ready(parts)
    known: dict[str, dict[str, Any]] = {}

    async def about(part: str) -> dict[str, Any]:
        # Models do not change while an ingress runs, so each part is asked once.
        if part not in known:
            known[part] = await parts.need(part).describe()
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
        """Counts and times of this replica, parts that are up and slides, for Prometheus."""
        text = await metrics.scraped(parts, await ready())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @api.get("/openapi.json", dependencies=[needs(None)], include_in_schema=False)
    async def openapi(request: Request) -> Any:
        return JSONResponse(request.app.openapi())

    # -- search, classify, ground, embed ----------------------------------------------------------

    @api.post("/v1/search", dependencies=[needs("search")], response_model=SearchResponse)
    async def search(request: Request, asked: SearchRequest) -> Any:
        """Find slides, regions or patches by a text, a slide, a region or a picture."""
        audit = request.state.audit
        return JSONResponse(await answers.found(parts, asked, limits=limits, audit=audit))

    @api.post("/v1/classify", dependencies=[needs("search")], response_model=ClassifyResponse)
    async def classify(request: Request, asked: ClassifyRequest) -> Any:
        """Score slides against classes that are described in words."""
        request.state.audit["slides"] = asked.slide_ids
        return JSONResponse(await parts.need("grounding").classify(asked.model_dump()))

    @api.post(
        "/v1/ground", dependencies=[needs("search")],
        response_model=GroundResponse | Outlines, response_model_exclude_none=True,
        responses={200: _PNG_OR_JSON},
    )  # fmt: skip
    async def ground(request: Request, asked: GroundRequest) -> Any:
        """Locate a text on a slide: boxes, as GeoJSON too, or a heatmap as PNG."""
        request.state.audit["slides"] = [asked.slide_id]
        found = await parts.need("grounding").ground(asked.model_dump())
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
        classes = await parts.need("embedder").classes(asked.classes, templates=asked.templates)
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
            made = await answers.embedded(parts, asked.image, limits)
        else:
            texts = [asked.input] if isinstance(asked.input, str) else list(asked.input or ())
            made = await parts.need("embedder").texts(texts)
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
        """List the models: for chat, for embeddings, for patches; then slide encoders."""
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
        if parts.embedder is not None:
            embedder = dict(await about("embedder"))
            patches = embedder.pop("patches", None)
            found.append({"capability": "embeddings"} | embedder)
            if patches is not None:
                found.append({"capability": "patches"} | patches)
        # Vectors come in while an ingress runs.
        imported = await parts.search.slide_encoders()
        return found + [{"capability": "slides"} | encoder for encoder in imported]

    @api.post(
        "/v1/chat/completions", dependencies=[needs("chat")], response_model=ChatResponse,
        response_model_exclude_none=True, responses={200: _EVENTS},
    )  # fmt: skip
    async def chat(request: Request, asked: ChatRequest) -> Any:
        """Answer a question about a slide, whole or streamed (server-sent events)."""
        begun = time.perf_counter()
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
        if not asked.choices:  # one of those is chosen, not written
            metrics.first_token.observe(time.perf_counter() - begun)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            body = events(chunks, first, stream, usage=usage, metrics=metrics, public=parts.public)
            return StreamingResponse(body, media_type="text/event-stream")
        text, last = await answers.whole(first, stream)
        count_tokens(metrics, last["usage"])
        return JSONResponse(chunks.whole(text, last))

    api.include_router(open_api)
    return api


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
