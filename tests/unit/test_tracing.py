"""Traces: what begins one, what belongs to it, and that there is none unless it is asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pathflip import tracing
from pathflip.errors import ConfigError, PathFLIPError
from pathflip.json_logs import JSONFormatter
from pathflip.synth import make_slide
from tests.collector import Collector, collecting
from tests.faults import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""The example of W3C Trace Context."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which this process sends."""
    with collecting() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        tracing._tracer.cache_clear()
        yield collector
        tracing._tracer.cache_clear()


def received(collector: Collector, *names: str) -> None:
    """Wait until spans of these names are there, and assert that there are no others."""
    until(lambda: len(collector.spans) >= len(names), seconds=30, what=f"spans {names}")
    assert sorted(one.name for one in collector.spans) == sorted(names)


class Part:
    """A part of a service."""

    def __init__(self, items: int) -> None:
        self.items = items

    async def describe(self) -> int:
        with tracing.span("inner", items=self.items):
            return await asyncio.to_thread(lambda: self.items)

    async def broken(self) -> None:
        raise PathFLIPError("slide-xylophone is not there.", code="unknown_slide")

    async def each(self) -> AsyncGenerator[str | None, None]:
        for _ in range(self.items):
            yield tracing.trace_id()

    def plain(self) -> str:
        return "plain"


OFF = f"""
import asyncio, json, logging, sys
sys.modules["opentelemetry"] = None  # an import fails
from pathflip import tracing
from pathflip.json_logs import JSONFormatter

class Part:
    async def call(self): return tracing.traceparent()
    async def each(self):
        yield tracing.trace_id()

async def main():
    part = tracing.traced(Part, name="part")()
    found = [await part.call(traceparent="{PARENT}")]
    found += [item async for item in part.each(traceparent="{PARENT}")]
    with tracing.span("request", begins=True) as span:
        found += [span, tracing.trace_id()]
    return found

record = logging.LogRecord("pathflip", 20, "", 0, "text", (), None)
tracing.check()
print(json.dumps([
    asyncio.run(main()), tracing.job(lambda: tracing.trace_id())(),
    "trace_id" in JSONFormatter().format(record),
    any(name.startswith("opentelemetry.") for name in sys.modules),
]))
"""


def test_nothing_is_traced_or_imported_unless_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[None] * 4, None, False, False]


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"},
            "http://t/x",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)  # fmt: skip
def test_the_standards_variables_say_where_to(
    variables: dict[str, str], url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.endpoint() == url


def test_another_protocol_is_refused(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="http/protobuf") as caught:
        tracing.check()
    assert caught.value.code == "traces"


def test_a_missing_package_is_named(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError) as caught:
        tracing.check()
    assert "pathflip[traces]" in caught.value.hint


def test_a_part_belongs_to_the_span_that_called_it(collector: Collector) -> None:
    part = tracing.traced(Part, name="part")(2)
    assert part.plain() == "plain"
    assert asyncio.run(part.describe(traceparent=PARENT)) == 2
    received(collector, "part.describe", "inner")
    trace, caller = PARENT.split("-")[1:3]
    outer, inner = collector.of(trace)
    assert (outer.parent, inner.parent) == (caller, outer.id)
    assert inner.attributes == {"pathflip.items": 2}
    assert {one.service for one in collector.spans} == {"pathflip"}


def test_what_nobody_traces_begins_no_trace(collector: Collector) -> None:
    """Health checks and what a part does by itself."""
    part = tracing.traced(Part, name="part")(2)
    assert asyncio.run(part.describe()) == 2
    with tracing.span("asked", begins=True):
        pass
    received(collector, "asked")


def test_an_error_is_told_without_its_message(collector: Collector) -> None:
    part = tracing.traced(Part, name="part")(2)
    with pytest.raises(PathFLIPError, match="xylophone"):
        asyncio.run(part.broken(traceparent=PARENT))
    received(collector, "part.broken")
    (span,) = collector.spans
    assert (span.failed, span.attributes) == (True, {"error.type": "unknown_slide"})
    assert b"xylophone" not in b"".join(collector.sent)


@pytest.mark.parametrize("taken", [1, 3])
def test_a_stream_is_one_span_until_it_is_left(collector: Collector, taken: int) -> None:
    """Between its items its reader is in no span of it, whichever task reads on."""
    part = tracing.traced(Part, name="part")(3)
    trace = PARENT.split("-")[1]

    async def main() -> None:
        async with aclosing(part.each(traceparent=PARENT)) as items:
            for _ in range(taken):
                assert await asyncio.create_task(anext(items)) == trace
                assert tracing.trace_id() is None
            if taken == 3:
                with pytest.raises(StopAsyncIteration):
                    await anext(items)

    asyncio.run(main())
    received(collector, "part.each")


def test_a_line_of_the_log_names_its_trace(collector: Collector) -> None:
    record = logging.LogRecord("serve", logging.ERROR, "", 0, "broken", (), None)
    with tracing.span("request", traceparent=PARENT):
        line = json.loads(JSONFormatter().format(record))
    assert line["trace_id"] == PARENT.split("-")[1]
    assert "trace_id" not in json.loads(JSONFormatter().format(record))


def test_a_job_is_a_trace_with_its_commits(
    collector: Collector,
    job_here: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "slides").mkdir()
    slide = tmp_path / "slides" / "xylophone.svs"
    make_slide(slide, width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    monkeypatch.setenv("TRACEPARENT", PARENT)
    job_here(tmp_path / "slides", tmp_path / "archive")
    trace, workflow = PARENT.split("-")[1:3]
    until(lambda: ("job ingest", "commit") in collector.tree(trace), seconds=30, what="the trace")
    assert collector.tree(trace) == {("job ingest",), ("job ingest", "commit")}
    (first,) = (one for one in collector.spans if one.name == "job ingest")
    assert (first.parent, first.failed) == (workflow, False)
    commits = [one.attributes["pathflip.slides"] for one in collector.spans if one.name == "commit"]
    assert sum(commits) == 1
    assert b"xylophone" not in b"".join(collector.sent)


def test_a_process_that_is_killed_has_sent_what_ended_seconds_before(collector: Collector) -> None:
    program = """
import os, time
from pathflip import tracing

with tracing.span("last", begins=True):
    pass
time.sleep(4)
os._exit(1)
"""
    environment = {name: at for name, at in os.environ.items() if name != tracing.DELAY}
    ended = subprocess.run([sys.executable, "-c", program], env=environment)
    assert ended.returncode == 1
    received(collector, "last")
