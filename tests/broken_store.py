"""A store that breaks: passes requests on to the store of the session, and harms some answers."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from tests.s3 import HOST, Store, environment

Harm = Callable[[str, str, int], str]
"""(method, path, how many requests of these came before) to "", "cut", "403", "503" or "wait"."""


@dataclass
class BrokenStore:
    """A running store that breaks.

    Attributes:
        environment: Variables by which Arrow finds it.
        harm: Decides what becomes of an answer.
        seen: Requests so far, as (method, path).
    """

    environment: dict[str, str] = field(default_factory=dict)
    harm: Harm = lambda *_: ""
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def broken(store: Store) -> Iterator[BrokenStore]:
    """Run one in front of a store as long as the block lasts."""
    state = BrokenStore()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            before = state.seen.count((self.command, path))
            state.seen.append((self.command, path))
            harm = state.harm(self.command, path, before)
            status, headers, body = self._answer()
            if harm.isdigit():
                status, headers, body = int(harm), {}, b""
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if harm == "cut" else body)
            self.close_connection = harm == "cut"

        do_HEAD = do_GET

        def _answer(self) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(HOST, store.port, timeout=30)
            try:
                connection.request(self.command, self.path, headers=dict(self.headers))
                answer = connection.getresponse()
                return answer.status, dict(answer.headers), answer.read()
            finally:
                connection.close()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    state.environment = environment(server.server_port)
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
