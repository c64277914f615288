"""Signing in from a browser: a token is exchanged once for a session cookie.

The cookie holds no token: name of the client, expiry, id of the session, and an HMAC-SHA256 over
these and the digest of the token, by a key of this service. So it dies with the service's key, with
its token, when it expires, and when its owner signs out. Ingress replicas and the proxy
(:mod:`serve.proxy`) know the same key and check cookies without asking each other; sessions that
were ended are noted in a folder that replicas of a machine share.

A browser sends cookies by itself, also when another page makes it ask. ``SameSite=Strict`` keeps
other sites out, and :func:`check_site` pages of this machine's other ports, which count as the same
site.

Read in this order: :class:`SignIn`, :func:`check_site`, :func:`routes`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from pydantic import Field

from pathflip.errors import PathFLIPError
from serve.auth import Client, Tokens
from serve.limits import Limits, RequestError
from serve.routing import Parts, api_router, needs
from serve.schemas import In, Out

logger = logging.getLogger(__name__)

COOKIE = "pathflip_session"
"""Name of the cookie."""
SESSION_S = 12 * 3600
"""Seconds until a session expires."""
MAX_ENDED = 1_000
"""Most sessions of one client that were ended before they expired and are remembered: whoever ends
more keeps only others of the same token from ending theirs."""
_VALUE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9]{1,12}):([0-9a-f]{32}):([0-9a-f]{64})")
_SAFE = ("GET", "HEAD", "OPTIONS")


def ended_folder(audit: Path) -> Path:
    """Folder of ended sessions: beside the files of an audit log."""
    return audit.with_name("ended-sessions")


class Empty(In):
    """The body of a request that says nothing but what its headers say."""


class Can(Out):
    """Abilities of a client: those that the service has and the client's scopes allow."""

    search: bool = Field(description="Finding slides and regions by words or examples.")
    ground: bool = Field(description="Locating a text on a slide.")
    chat: str | None = Field(description="Id of the chat model; null where nothing answers.")
    annotate: bool = Field(description="Drawing annotations.")
    patients: bool = Field(description="Whether patients' ids are shown.")


class SessionInfo(Out):
    """The client who asks."""

    name: str = Field(examples=["lab"])
    scopes: list[str] = Field(examples=[["read", "search"]])
    expires: str | None = Field(description="End of the session; null without a cookie.")
    tokens: bool = Field(description="Whether this service has tokens.")
    can: Can


def session_text(name: str, until: int | str, number: str, digest: bytes) -> str:
    """Text that a session's HMAC is made of; :mod:`serve.proxy` has HAProxy make the same."""
    return f"session:{name}:{until}:{number}:{digest.hex()}"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session of a signed-in client.

    Attributes:
        client: The client.
        until: Unix time at which it expires.
        id: Random id, as the audit log shows it.
    """

    client: Client
    until: int
    id: str


class SignIn:
    """Makes, checks and ends the sessions of a service.

    Args:
        tokens: Clients and the digests of their tokens.
        key: Secret of the service, the same in all replicas.
        ended: Folder where ended sessions are noted, shared by the replicas; made when the first
            one ends. None notes them in this process alone.
    """

    def __init__(self, tokens: Tokens, *, key: bytes, ended: Path | None = None) -> None:
        self._known = {client.name: (digest, client) for digest, client in tokens.digests}
        self._key, self._folder = key, ended
        self._ended: dict[str, int] = {}  # by the name of its note

    def start(self, client: Client) -> tuple[str, Session]:
        """Start a session; return the value of its cookie, and the session."""
        until, number = int(time.time()) + SESSION_S, os.urandom(16).hex()
        digest, known = self._known[client.name]
        proof = self._proof(client.name, until, number, digest)
        session = Session(client=known, until=until, id=number)
        return f"{client.name}:{until}:{number}:{proof}", session

    def find(self, cookies: Sequence[str]) -> Session | None:
        """Session of a request's Cookie headers; None if there is no valid one.

        Two cookies of the name are none: another page of this host may have added one.
        """
        values = {
            value
            for header in cookies
            for name, _, value in (pair.strip().partition("=") for pair in header.split(";"))
            if name == COOKIE
        }
        found = _VALUE.fullmatch(values.pop()) if len(values) == 1 else None
        if found is None:
            return None
        name, until, number, shown = found.groups()
        digest, client = self._known.get(name, (b"", None))
        proof = self._proof(name, until, number, digest)
        if not hmac.compare_digest(proof, shown) or client is None:
            return None
        if int(until) <= time.time() or self._has_ended(_note(name, number)):
            return None
        return Session(client=client, until=int(until), id=number)

    def end(self, session: Session) -> None:
        """End a session before it expires.

        Raises:
            RequestError: ``busy``: too many of this client were ended within the last hours.
        """
        now, own = time.time(), _note(session.client.name, "")
        note = own + session.id
        self._ended = {one: until for one, until in self._ended.items() if until > now}
        kept = {one for one in self._ended if one.startswith(own)}
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in self._folder.iterdir():
                with suppress(FileNotFoundError):  # another replica was first
                    if file.stat().st_mtime <= now:
                        file.unlink()
                    elif file.name.startswith(own):
                        kept.add(file.name)
        if len(kept) >= MAX_ENDED:
            raise RequestError("Too many sessions of this token were ended.", code="busy")
        if self._folder is not None:
            noted = self._folder / note
            noted.touch(mode=0o600)
            os.utime(noted, (session.until, session.until))
        self._ended[note] = session.until

    def _has_ended(self, note: str) -> bool:
        if note in self._ended:
            return True
        return self._folder is not None and (self._folder / note).exists()

    def _proof(self, name: str, until: int | str, number: str, digest: bytes) -> str:
        text = session_text(name, until, number, digest)
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def _note(name: str, number: str) -> str:
    """Return the name under which it is noted that a client's session ended."""
    return f"{name}:{number}"


def warn_of_nodes(ended: Path, *, nodes: int) -> None:
    """Say that replicas on several nodes must share the folder of ended sessions.

    Args:
        ended: Folder of ended sessions.
        nodes: Nodes of the cluster.
    """
    if nodes > 1:
        logger.warning(
            "This cluster has %d nodes: a session that was signed out has ended at those ingress "
            "replicas that share %s. Put it on storage of all nodes (-o audit=DIR); else others "
            "take a copied cookie of that session until it expires, after %d hours.",
            nodes, ended, SESSION_S // 3600,
        )  # fmt: skip


def check_site(method: str, headers: Mapping[str, str]) -> None:
    """Refuse what a page of another origin made the browser ask, by the client's rights.

    Browsers say so in ``Sec-Fetch-Site``, or in ``Origin`` where the service has no TLS.

    Raises:
        RequestError: ``cross_site``.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site == "same-origin" or (site == "none" and method in _SAFE)
    elif origin is not None:
        try:
            own = urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
        except ValueError:
            own = False
    else:
        own = method in _SAFE
    if not own:
        raise RequestError(
            "This request came from another page; the service answers its own alone.",
            code="cross_site",
        )


def cookie_header(value: str, *, seconds: int, secure: bool) -> str:
    """Header that sets the cookie, or with 0 seconds removes it."""
    kept = f"{COOKIE}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict"
    return f"{kept}; Secure" if secure else kept


def routes(parts: Parts, limits: Limits) -> APIRouter:
    """Define the routes of the session."""
    api = api_router()
    able = _Able(parts)

    @api.get("/v1/session", dependencies=[needs(None)], response_model=SessionInfo)
    async def session(request: Request) -> Any:
        """Name, scopes and expiry of the client, and what it can do here."""
        client: Client = request.state.client
        own: Session | None = getattr(request.state, "session", None)
        expires = None if own is None else datetime.fromtimestamp(own.until, UTC).isoformat()
        return {
            "name": client.name,
            "scopes": sorted(client.scopes),
            "expires": expires,
            "tokens": request.app.state.sign_in is not None,
            "can": await able(client),
        }

    @api.post("/v1/session", dependencies=[needs(None)], status_code=204, response_class=Response)
    async def sign_in(request: Request, asked: Empty) -> Response:
        """Exchange a token for a session cookie."""
        made: SignIn | None = request.app.state.sign_in
        if made is None:
            raise RequestError(
                "This service has no tokens: there is nothing to sign in to.", code="no_tokens"
            )
        value, session = made.start(request.state.client)
        request.state.audit["session"] = session.id
        header = cookie_header(value, seconds=SESSION_S, secure=_is_https(request))
        return Response(status_code=204, headers={"set-cookie": header})

    @api.delete("/v1/session", dependencies=[needs(None)], status_code=204, response_class=Response)
    async def sign_out(request: Request) -> Response:
        """End the session."""
        made: SignIn | None = request.app.state.sign_in
        own: Session | None = getattr(request.state, "session", None)
        if made is not None and own is not None:
            made.end(own)
        header = cookie_header("", seconds=0, secure=_is_https(request))
        return Response(status_code=204, headers={"set-cookie": header})

    return api


def _is_https(request: Request) -> bool:
    """Return whether the browser asked over TLS, which ends in a proxy before this service."""
    origin = request.headers.get("origin", "")
    return request.url.scheme == "https" or origin.startswith("https://")


class _Able:
    """Tells what the service and a client's scopes allow."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._chat: str | None = None

    async def __call__(self, client: Client) -> dict[str, Any]:
        parts, scopes = self._parts, client.scopes
        archive: dict[str, bool] = {}
        with suppress(PathFLIPError):  # a part that restarts can do nothing for the moment
            archive = await parts.search.offers()
        if parts.instructor is not None and self._chat is None:
            with suppress(PathFLIPError):
                self._chat = (await parts.instructor.describe())["id"]
        finds = "search" in scopes
        return {
            "search": finds and parts.embedder is not None and archive.get("indexed", False),
            "ground": finds and parts.grounding is not None,
            "chat": self._chat if "chat" in scopes else None,
            "annotate": "annotate" in scopes and parts.annotations is not None,
            "patients": archive.get("patients", False),
        }
