"""Stand-in of the Hugging Face hub on this machine, as far as models are fetched from it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(kw_only=True)
class Repository:
    """A repository: files by name, its licence, whether it is gated."""

    files: dict[str, bytes]
    licence: str = "apache-2.0"
    gated: bool = False

    @property
    def commit(self) -> str:
        names = "\n".join(f"{n} {hashlib.sha256(b).hexdigest()}" for n, b in self.files.items())
        return hashlib.sha1(names.encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by ``owner/name``, and the files that were sent.

    Attributes:
        altered: ``owner/name/file`` whose next transfer has another first byte.
        stuck: {``owner/name/file``: bytes after which the next transfer of it waits}.
        go_on: Ends that waiting, and with it the transfer.
    """

    url: str
    repositories: dict[str, Repository]
    sent: list[str] = field(default_factory=list)
    altered: set[str] = field(default_factory=set)
    stuck: dict[str, int] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)


def digest_of(name: str, body: bytes) -> str:
    """Return what the hub calls a file by: SHA-256 of large ones, git's SHA-1 of small ones."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve repositories on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if about := re.match(
                r"/api/models/([^/]+/[^/?]+)(?:/(revision|tree|auth-check)(?:/([^/?]+))?)?",
                self.path,
            ):
                self._about(about[1], about[2], about[3])
            elif asked := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path):
                self._file(asked[1], asked[3])
            else:
                self._answer(404)

        do_HEAD = do_GET

        def _about(self, name: str, what: str | None, revision: str | None) -> None:
            found = repositories.get(name)
            if found is None:
                return self._answer(404, {"X-Error-Code": "RepoNotFound"})
            if revision not in (None, "main", found.commit):
                return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            if what == "auth-check":
                gate = {"X-Error-Code": "GatedRepo"} if found.gated else {}
                return self._answer(403 if gate else 200, gate)
            if what == "tree":
                return self._answer(200, body=[_entry(n, b) for n, b in found.files.items()])
            return self._answer(
                200,
                body={
                    "id": name,
                    "sha": found.commit,
                    "gated": "manual" if found.gated else False,
                    "siblings": [_sibling(name, body) for name, body in found.files.items()],
                    "cardData": {"license": found.licence},
                },
            )

        def _file(self, name: str, file: str) -> None:
            found = repositories.get(name)
            if found is None or file not in found.files:
                return self._answer(404, {"X-Error-Code": "EntryNotFound"})
            if found.gated:
                return self._answer(403, {"X-Error-Code": "GatedRepo"})
            body = found.files[file]
            digest = digest_of(file, body)
            headers = {"X-Repo-Commit": found.commit, "ETag": f'"{digest}"'}
            if file.endswith(".safetensors"):
                headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            if self.command == "GET":
                return self._send(f"{name}/{file}", headers, body)
            return self._answer(200, headers, body)

        def _send(self, path: str, headers: dict[str, str], body: bytes) -> None:
            hub.sent.append(path)
            if path in hub.altered:
                hub.altered.remove(path)
                body = bytes([body[0] ^ 1]) + body[1:]
            if path not in hub.stuck:
                return self._answer(200, headers, body)
            self._head(200, headers, len(body))
            self.wfile.write(body[: hub.stuck.pop(path)])
            self.wfile.flush()
            self.close_connection = True
            hub.go_on.wait(60)

        def _answer(
            self, status: int, headers: dict[str, str] | None = None, body: object = b""
        ) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self._head(status, headers, len(data))
            if self.command == "GET":
                self.wfile.write(data)

        def _head(self, status: int, headers: dict[str, str] | None, length: int) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _entry(name: str, body: bytes) -> dict[str, object]:
    git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return {"type": "file", "path": name, "size": len(body), "oid": git} | _lfs(name, body, "oid")


def _sibling(name: str, body: bytes) -> dict[str, object]:
    git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return {"rfilename": name, "size": len(body), "blobId": git} | _lfs(name, body, "sha256")


def _lfs(name: str, body: bytes, key: str) -> dict[str, object]:
    if not name.endswith(".safetensors"):
        return {}
    return {"lfs": {key: digest_of(name, body), "size": len(body), "pointerSize": 130}}


def put_in_cache(cache: Path, name: str, folder: Path) -> Path:
    """Copy a model's folder into a cache as the hub's client keeps it, and return the copy."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))
