"""Middleware: authentication, limits, audit log, response headers and counts of every request.

:class:`Guard` is the outermost layer of the ingress: it checks that the service's own
proxy asks (:mod:`serve.proxy`), the token (:mod:`serve.auth`), the number of running requests and
the size of the body (:mod:`serve.limits`), then writes the line in the audit log and adds headers.
:func:`problem` gives every error one shape, without trace or path.
"""

from __future__ import annotations

import asyncio
import collections
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from pathflip import tracing
from pathflip.errors import ArchiveError, PathFLIPError
from serve.audit import AuditError, AuditLog
from serve.auth import LOCAL, Client, Tokens, is_local
from serve.limits import Limits, RequestError, read_body
from serve.metrics import Metrics
from serve.pages import POLICY, is_page
from serve.proxy import ANSWERED_BY, ASKED_BY, Proofs
from serve.sign_in import SignIn, check_site

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/healthz",)
"""Paths that need no token, beside those of the page (:func:`serve.pages.is_page`)."""
UNCOUNTED = ("/healthz", "/readyz", "/metrics")
"""Paths that are answered whatever the load, as is the page: whoever reads it slowly, without a
token, takes no place of a client that has one."""

AUDITED = ("/v1/", "/mcp")
"""Beginnings of paths that show slides."""

_PLACES = 8
"""Places of a program that a line of the log names at most."""
_WITH_BODY = ("POST", "PUT", "PATCH")

STATUS = {
    "unknown_slide": 404,
    "unknown_region": 404,
    "unknown_model": 404,
    "no_thumbnail": 404,
    "unknown_tile": 404,
    "no_dzi": 404,
    "no_engine": 404,
    "no_model": 404,
    "unknown_annotation": 404,
    "stale": 409,
    "too_many_annotations": 422,
    "no_part": 404,
    "no_mcp": 404,
    "no_tokens": 404,
    "no_encoder": 404,
    "no_patches": 404,
    "not_found": 404,
    "source_changed": 409,
    "store_failed": 503,
    "stage_failed": 503,
    "not_indexed": 409,
    "wrong_model": 409,
    "wrong_encoder": 409,
    "unknown_encoder": 409,
    "other_encoder": 409,
    "other_tiling": 409,
    "no_captions": 409,
    "no_features": 409,
    "bad_json": 400,
    "bad_request": 400,
    "too_large": 413,
    "media_type": 415,
    "too_slow": 408,
    "no_token": 401,
    "not_local": 403,
    "not_proxied": 403,
    "scope": 403,
    "cross_site": 403,
    "busy": 429,
    "unavailable": 503,
    "engine_dead": 503,
    "audit": 503,
    "internal": 500,
    "deadline": 504,
}
"""HTTP status by error code. Other errors of ours are 422 if the client can mend the request, else
500."""
_SERVER_FAULTS = (ArchiveError, AuditError)  # 500 unless STATUS has their code
_RETRY = (429, 503, 504)

_REQUEST_ID = (b"request-id", b"x-request-id")
_POLICY = b"content-security-policy"
_ALL_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_UNFRAMED = (b"x-frame-options", b"DENY")
_HEADERS = (
    *_ALL_HEADERS, _UNFRAMED, (_POLICY, b"default-src 'none'; frame-ancestors 'none'; sandbox"),
)  # fmt: skip
_PAGE_HEADERS = (
    *_ALL_HEADERS, _UNFRAMED, (_POLICY, POLICY.format("'none'").encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
)  # fmt: skip
_FRAMED_HEADERS = (
    *_ALL_HEADERS,
    (_POLICY, POLICY.format("http://127.0.0.1:* http://localhost:*").encode()),
)


def _is_counted(scope: Scope) -> bool:
    """Return whether a request is one of those of which only so many may run."""
    return scope["path"] not in UNCOUNTED and not is_page(scope["method"], scope["path"])


def status_of(error: PathFLIPError) -> int:
    """HTTP status of an error of ours."""
    if error.code in STATUS:
        return STATUS[error.code]
    return 500 if isinstance(error, _SERVER_FAULTS) else 422


def problem(
    status: int,
    detail: str,
    *,
    code: str,
    request_id: str,
    hint: str = "",
    errors: Sequence[Mapping[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
    retry_s: int = 1,
) -> Response:
    """Render an error as problem JSON (RFC 9457), in ASCII so that no client text can break it."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "message": f"{detail} {hint}".strip(),
        "code": code,
        "request_id": request_id,
    }
    if hint:
        body["hint"] = hint
    if errors:
        body["errors"] = list(errors)
        body["message"] += f" {errors[0]['where']}: {errors[0]['what']}"
    sent = dict(headers or {})
    if status in _RETRY:
        sent["Retry-After"] = str(retry_s)
    if status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers=sent, media_type="application/problem+json")


class Guard:
    """ASGI middleware around all routes.

    Routes find in ``scope["state"]``: ``client``, ``session`` where it signed in by cookie,
    ``request_id``, and a dict ``audit`` to which they add the ids they show.

    Args:
        app: The application of the routes.
        limits: Limits of this replica.
        tokens: Clients and their tokens; None answers this machine alone.
        audit: Audit log; None writes none.
        metrics: Counts requests.
        proofs: Secrets shared with the proxy in front (:mod:`serve.proxy`); None for no proxy.
        sign_in: Sessions of the clients that have tokens; None knows none.
        framed: Whether pages of this machine may show the viewer in a frame.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        tokens: Tokens | None,
        audit: AuditLog | None,
        metrics: Metrics,
        proofs: Proofs | None = None,
        sign_in: SignIn | None = None,
        framed: bool = False,
    ) -> None:
        self.app, self.limits, self.tokens, self.sign_in = app, limits, tokens, sign_in
        self.audit, self.metrics, self.proofs = audit, metrics, proofs
        self.page_headers = _FRAMED_HEADERS if framed else _PAGE_HEADERS
        self.running, self.stopping = 0, False
        self.of_client = collections.Counter[str]()
        self.most_of_client = limits.concurrent
        if tokens is not None and len(tokens.digests) > 1:
            self.most_of_client = limits.of_client

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait for running ones, at most so many seconds."""
        self.stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.running:
                    await asyncio.sleep(0.05)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks another protocol
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(self, scope, send)
        counted = _is_counted(scope)
        self.running += counted
        self.metrics.in_flight.inc(counted)
        try:
            with answer.traced():
                await self._answer(answer, scope, receive)
        finally:
            if answer.place is not None:
                self.of_client[answer.place] -= 1
            self.running -= counted
            self.metrics.in_flight.dec(counted)
            answer.count()

    async def _answer(self, answer: _Answer, scope: Scope, receive: Receive) -> None:
        try:
            headers = Headers(scope=scope)
            if self.proofs is not None:
                shown = headers.get(ASKED_BY, "").encode("latin-1")
                if not hmac.compare_digest(shown, self.proofs.asks.encode()):
                    raise RequestError(
                        "Send requests to the address of the service, not to a replica.",
                        code="not_proxied",
                    )
                answer.proof = self.proofs.answers.encode()
            if scope["path"] not in OPEN and not is_page(scope["method"], scope["path"]):
                answer.client = self._client(scope, headers)
                scope["state"]["client"] = answer.client
            if _is_counted(scope):
                if self.stopping:
                    raise RequestError("The service is stopping.", code="unavailable")
                if self.running > self.limits.concurrent:
                    raise RequestError("Too many concurrent requests.", code="busy")
                self._take_place(answer)
            # What no route reads is not read here either: it would be held, and counted nowhere.
            body: bytes | None = b""
            if scope["method"] in _WITH_BODY:
                body = await self._body(headers, receive)
            if body is None:
                return
            async with asyncio.timeout(self.limits.answer_s) as answer.deadline:
                await self.app(scope, _replay(body, receive), answer)
        except TimeoutError:
            late = RequestError("No answer began in time.", code="deadline")
            await answer.refuse(late, retry_s=self.limits.retry_s)
        except Exception as error:  # the outermost line of a request
            ours = error if isinstance(error, PathFLIPError) else RequestError("", code="internal")
            if status_of(ours) == 500:
                told = {"request_id": answer.request_id, "code": ours.code}
                logger.error("request %s: %s", answer.request_id, on_one_line(error), extra=told)
            if not answer.complete:
                await answer.refuse(ours, retry_s=self.limits.retry_s)

    def _take_place(self, answer: _Answer) -> None:
        """Count a request to its client, and leave some places to the others."""
        assert answer.client is not None
        name = answer.client.name
        if self.of_client[name] >= self.most_of_client:
            raise RequestError("Too many concurrent requests of this token.", code="busy")
        self.of_client[name] += 1
        answer.place = name

    def _client(self, scope: Scope, headers: Headers) -> Client:
        if self.tokens is None:
            if not is_local((scope.get("client") or (None,))[0], headers):
                raise RequestError(
                    "Without tokens, only requests from this machine to localhost are answered.",
                    code="not_local",
                )
            if {"origin", "sec-fetch-site"} & set(headers.keys()):  # a browser's
                check_site(scope["method"], headers)
            return LOCAL
        authorization = headers.get("authorization")
        client = self.tokens.client(authorization)
        if authorization is None and self.sign_in is not None:
            session = self.sign_in.find(headers.getlist("cookie"))
            if session is not None:
                check_site(scope["method"], headers)
                scope["state"]["session"] = session
                scope["state"]["audit"]["session"] = session.id
                return session.client
        if client is None:
            raise RequestError("Send a valid token: Authorization: Bearer TOKEN.", code="no_token")
        return client

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        # Browsers do not send this type to another site without a preflight.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError("Content-Type must be application/json.", code="media_type")
        return await read_body(receive, headers, self.limits)


class _Answer:
    """Sends one response: audited before its first byte, counted after its last."""

    def __init__(self, guard: Guard, scope: Scope, send: Send) -> None:
        self.guard, self.scope, self._send = guard, scope, send
        self.request_id = uuid.uuid4().hex
        self.client: Client | None = None
        self.place: str | None = None  # client to whom it is counted
        self.proof: bytes | None = None
        self.deadline: asyncio.Timeout | None = None
        self.status, self.complete = 0, False
        self.begun = time.perf_counter()
        state = scope.setdefault("state", {})
        state["request_id"], state["audit"] = self.request_id, {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.deadline is not None:
                loop = asyncio.get_running_loop()
                self.deadline.reschedule(loop.time() + self.guard.limits.stream_s)
            self._write_audit(message["status"])
            self.status = message["status"]
            self.guard.metrics.first.labels(self.route).observe(time.perf_counter() - self.begun)
            page = is_page(self.scope["method"], self.scope["path"])
            added = self.guard.page_headers if page else _HEADERS
            own = {name for name, _ in added} | set(_REQUEST_ID)
            sent = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in own]
            if not any(name.lower() == b"cache-control" for name, _ in sent):
                sent.append((b"cache-control", b"no-store"))
            # OpenAI's clients read the second name.
            sent += [*added, *((name, self.request_id.encode()) for name in _REQUEST_ID)]
            if self.proof is not None:
                sent.append((ANSWERED_BY.encode(), self.proof))
            message = {**message, "headers": sent}
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    @property
    def route(self) -> str:
        """Template of the path, never the path itself."""
        return str(getattr(self.scope.get("route"), "path", "none"))

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Begin a trace, or go on with the client's; what only asks how the service is has none."""
        if self.scope["path"] in UNCOUNTED:
            yield
            return
        # Of what a client may say of its trace only ids are taken: the rest is free text.
        given = Headers(scope=self.scope).get("traceparent")
        with tracing.span("request", traceparent=given, begins=True) as span:
            try:
                yield
            finally:
                if span is not None:
                    span.update_name(f"{self.method} {self.route}")
                    span.set_attribute("http.request.method", self.method)
                    span.set_attribute("http.route", self.route)
                    span.set_attribute("http.response.status_code", self.status)
                    span.set_attribute("pathflip.request_id", self.request_id)
                    if self.status >= 500:
                        tracing.fail(span, str(self.status))

    @property
    def method(self) -> str:
        """Method of the request, where a route has it: others are the client's words."""
        return str(self.scope["method"]) if self.route != "none" else "none"

    async def refuse(self, error: PathFLIPError, *, retry_s: int) -> None:
        """Answer with an error, if no answer has begun."""
        if self.status:
            # Part of an answer is out: the connection is cut, so that it is not taken for whole.
            raise RuntimeError(f"the answer was cut: {error.code}")
        self.deadline = None  # no longer applies
        status = status_of(error)
        detail = "Internal server error." if status == 500 else error.message
        response = problem(
            status, detail, code=error.code, request_id=self.request_id, retry_s=retry_s,
            hint="" if status == 500 else error.hint,
        )  # fmt: skip
        try:
            await response(self.scope, _nothing, self)
        except AuditError as broken:
            told = {"request_id": self.request_id, "code": broken.code}
            logger.error("request %s: %s", self.request_id, broken.message, extra=told)
            self.client = None  # nothing is shown, so nothing is audited
            response = problem(
                503, "The audit log cannot be written.", code="audit",
                request_id=self.request_id, retry_s=retry_s,
            )  # fmt: skip
            await response(self.scope, _nothing, self)

    def _write_audit(self, status: int) -> None:
        """Write a line for a request under /v1, or of an agent, by a known client."""
        if self.guard.audit is None or self.client is None:
            return
        if not self.scope["path"].startswith(AUDITED):
            return
        peer = (self.scope.get("client") or ("",))[0]
        self.guard.audit.write(
            {
                "request": self.request_id,
                "who": self.client.name,
                "from": peer,
                "action": f"{self.scope['method']} {self.route}",
                **self.scope["state"]["audit"],
                "outcome": status,
            }
        )

    def count(self) -> None:
        metrics, status = self.guard.metrics, str(self.status or "gone")
        metrics.requests.labels(self.route, self.method, status).inc()
        metrics.seconds.labels(self.route).observe(time.perf_counter() - self.begun)


def on_one_line(error: Exception) -> str:
    """Describe an error; one that is not ours with the innermost places it passed.

    In ASCII: what a client sent may be in the message, and must not begin a line of its own.
    """
    if isinstance(error, PathFLIPError):
        return f"{type(error).__name__} {error.code}: {error.message!a}"
    passed = traceback.extract_tb(error.__traceback__)[-_PLACES:]
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(passed)]
    return " < ".join((ascii(error), *places))


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replay a body that was read, then pass on further messages of the client."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
