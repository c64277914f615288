"""An S3-compatible object store on this machine: moto's server, in a process of its own.

moto checks the condition of a write (``If-None-Match``, ``If-Match``) and then writes, in threads:
two of 16 writers at once both believed they had made the same object. Lance commits by that
condition, as S3 keeps it, so every request waits here for the one before, once its body is there.
"""

from __future__ import annotations

import http.client
import io
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
_SIGNED = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)
"""Nobody checks it, but without one a caller is a stranger, who may write new objects only."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """A running store.

    Attributes:
        port: Its port on the loopback interface.
    """

    port: int
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Lance and Arrow find it, in this process and its children."""
        return environment(self.port)

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one request; return status and body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": _SIGNED, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def new_bucket(self) -> str:
        """Make an empty bucket and return its URI, ``s3://<name>``.

        Every call returns another name: Lance keeps one client for each bucket it has seen.
        """
        name = f"bucket-{os.getpid()}-{next(self._numbers)}"
        status, answer = self.request("PUT", f"/{name}")
        assert status == 200, answer
        return f"s3://{name}"


def environment(port: int) -> dict[str, str]:
    """Return the variables for a store on a port; the keys may be anything, nobody checks them."""
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def running() -> Iterator[Store]:
    """Run a store; it ends with the block, or with this process."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    ) as process:
        assert process.stdout is not None
        try:
            yield Store(port=int(process.stdout.readline()))
        finally:
            process.kill()


def _main() -> None:
    from moto.server import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    application = create_backend_app("s3")
    turn = threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        length = environ.get("CONTENT_LENGTH")
        chunked = environ.get("wsgi.input_terminated")
        body = environ["wsgi.input"].read(-1 if chunked else int(length or 0))
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        with turn:
            return list(application(environ, start_response))

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: Any) -> None:
            pass

    server = make_server(HOST, 0, one_at_a_time, threaded=True, request_handler=Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # ends with the process that started this one


if __name__ == "__main__":
    _main()
