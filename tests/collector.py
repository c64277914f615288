"""A collector of OpenTelemetry's traces: what is sent to it by OTLP over HTTP, it keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pathflip.tracing import DELAY, ENDPOINT


@dataclass(frozen=True, kw_only=True)
class Span:
    """A span that was received.

    Attributes:
        name: Its name.
        trace, id, parent: Hexadecimal ids; parent is empty for none.
        attributes: Its own.
        failed: Whether its status is an error.
        service: ``service.name`` of the process.
        begin_ns, end_ns: Its times.
    """

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    failed: bool
    service: str
    begin_ns: int
    end_ns: int


@dataclass
class Collector:
    """Spans that were received.

    Attributes:
        url: Address of the collector.
        spans: All spans.
        sent: All bodies, as they were sent.
    """

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that is to send here, soon after a span has ended."""
        return {ENDPOINT: self.url, DELAY: "50"}

    def of(self, trace: str) -> list[Span]:
        """Spans of a trace, in the order in which they began."""
        return sorted((one for one in self.spans if one.trace == trace), key=lambda s: s.begin_ns)

    def tree(self, trace: str) -> set[tuple[str, ...]]:
        """Paths of names from each span of a trace up to the first one that was received."""
        by_id = {one.id: one for one in self.of(trace)}

        def path(one: Span) -> tuple[str, ...]:
            above = by_id.get(one.parent)
            return (*(() if above is None else path(above)), one.name)

        return {path(one) for one in by_id.values()}

    def take(self, body: bytes) -> None:
        """Keep the spans of a request."""
        self.sent.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [
                    Span(
                        name=one.name, trace=one.trace_id.hex(), id=one.span_id.hex(),
                        parent=one.parent_span_id.hex(), attributes=_values(one.attributes),
                        failed=one.status.code == one.status.STATUS_CODE_ERROR,
                        service=about["service.name"], begin_ns=one.start_time_unix_nano,
                        end_ns=one.end_time_unix_nano,
                    )
                    for one in scope.spans
                ]  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        collector.url = f"http://127.0.0.1:{server.server_port}"
        yield collector
        server.shutdown()
