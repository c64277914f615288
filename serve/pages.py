"""The viewer's page and its scripts, as ``make viewer`` built them from ``serve/viewer``.

They hold no data, so they need no token. All of it is read into memory when it is first asked for:
a request names one of the files there are, and no path is made of what a client sends. Scripts and
styles have the hash of their content in their names, so browsers keep them for ever; the page
itself is asked for again each time, and answered with 304 where it is the same.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.limits import Limits
from serve.routing import Parts

DIST = Path(__file__).with_name("viewer") / "dist"
"""Folder of the built viewer."""
ASSETS = "/assets/"
"""Path below which its scripts, styles and pictures are."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors {}"
)
"""Content security policy of the page: scripts of this service alone, none of them inline."""
NOT_BUILT = (
    "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>pathflip</title>\n"
    "<p>The viewer is not built. Run <code>make viewer</code> in the checkout, then load this page "
    "again. The API below <code>/v1</code> works meanwhile.\n"
)
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_SMALL = 1024  # bytes that are not worth compressing
_FOR_EVER = "public, max-age=31536000, immutable"


def is_page(method: str, path: str) -> bool:
    """Return whether a request reads the page or one of its files, which needs no token."""
    return method in ("GET", "HEAD") and (path == "/" or path.startswith(ASSETS))


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of the viewer: its bytes, compressed as well where that helps, type and digest."""

    plain: bytes
    packed: bytes | None
    media_type: str
    digest: str


class Pages:
    """The built viewer in memory; read again when it was built anew.

    Args:
        folder: Folder that vite wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._built: tuple[int, int] | None = None

    def page(self) -> _File | None:
        """The page; None if the viewer is not built."""
        try:
            state = (self._folder / "index.html").stat()
        except OSError:
            self._built, self._files = None, {}
            return None
        built = state.st_mtime_ns, state.st_size
        if built != self._built:
            self._files = _read(self._folder)
            self._built = built
        return self._files.get("/")

    def asset(self, name: str) -> _File | None:
        """One of its other files, by its path below :data:`ASSETS`."""
        if self._built is None:
            self.page()
        return self._files.get(name)


def routes(parts: Parts, limits: Limits) -> APIRouter:
    """Define the routes of the page."""
    api = APIRouter(include_in_schema=False)
    pages = Pages(DIST)

    @api.api_route("/", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        found = pages.page()
        if found is None:
            retry = {"retry-after": str(limits.retry_s)}
            return Response(NOT_BUILT, 503, headers=retry, media_type=_TYPES[".html"])
        return _answer(request, found, "no-cache")

    @api.api_route(ASSETS + "{name:path}", methods=["GET", "HEAD"])
    def asset(request: Request, name: str) -> Response:
        found = pages.asset(name)
        if found is None:
            return Response("There is no such file.", 404, media_type="text/plain")
        return _answer(request, found, _FOR_EVER)

    return api


def _answer(request: Request, file: _File, kept: str) -> Response:
    accepted = request.headers.get("accept-encoding", "")
    packed = file.packed if "gzip" in accepted else None
    tag = f'"{file.digest}{"-gzip" if packed is not None else ""}"'
    headers = {"etag": tag, "cache-control": kept, "vary": "accept-encoding"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if packed is not None:
        headers["content-encoding"] = "gzip"
    body = file.plain if packed is None else packed
    return Response(body, headers=headers, media_type=file.media_type)


def _read(folder: Path) -> dict[str, _File]:
    """Read the page, as ``/``, and everything below ``assets``."""
    assets = folder / ASSETS.strip("/")
    files: dict[str, Any] = {"/": folder / "index.html"}
    files |= {
        path.relative_to(assets).as_posix(): path
        for path in sorted(assets.rglob("*"))
        if path.is_file() and path.suffix != ".map"
    }
    return {name: _file(path) for name, path in files.items()}


def _file(path: Path) -> _File:
    plain = path.read_bytes()
    known = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    text = known is not None and known.startswith(("text/", "application/json", "image/svg"))
    packed = gzip.compress(plain, 9, mtime=0) if text and len(plain) > _SMALL else None
    return _File(
        plain=plain,
        packed=packed,
        media_type=known or "application/octet-stream",
        digest=hashlib.sha256(plain).hexdigest()[:32],
    )
