"""Traces and engine metrics of ``pathflip serve`` with a real engine, as collectors get them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.collector import Collector, collecting
from tests.faults import descendants, until
from tests.serving import Tuned, free_port, indexed
from tests.unit.serve.service_fixture import TOKENS, bearer, write_tokens

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

QUESTION = "Is there xylophone necrosis?"
CHAT = "POST /v1/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A service that sends traces.

    Attributes:
        http: Client of it.
        collector: Receiver of its traces.
        folder: Folder of its archive, tokens and audit log.
        run: Folder of its run.
    """

    http: httpx.Client
    collector: Collector
    folder: Path
    run: Path

    def ask(self, path: str, **body: Any) -> tuple[httpx.Response, str, str]:
        """Ask as a client that traces, too; the answer, and the ids of its trace and its span."""
        trace, span = secrets.token_hex(16), secrets.token_hex(8)
        headers = {"traceparent": f"00-{trace}-{span}-01", "tracestate": "vendor=xylophone",
                   "baggage": "patient=xylophone"}  # fmt: skip
        return self.http.post(path, json=body, headers=headers), trace, span

    def expect(self, trace: str, *paths: tuple[str, ...]) -> None:
        """Wait until a trace has these paths of names."""
        until(
            lambda: set(paths) <= self.collector.tree(trace), seconds=60,
            what=f"{paths}; there is {self.collector.tree(trace)}",
        )  # fmt: skip


@pytest.fixture(scope="module")
def traced(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    mine = indexed(tuned, folder / "archive")
    port = free_port()
    command = [
        sys.executable, "-m", "pathflip.cli", "serve", "--archive", mine.archive, "--run", mine.run,
        "--port", port, "--json", "--token-file", write_tokens(folder / "tokens"),
        "-o", f"audit={folder / 'audit'}", "-o", "engine.engine.max_num_seqs=4",
    ]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OTEL_"))}
    with collecting() as collector, (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True,
            env=kept | collector.environment,
        )  # fmt: skip
        try:
            line = process.stdout.readline() if process.stdout else ""
            assert line, (folder / "stderr").read_text()
            with httpx.Client(
                base_url=json.loads(line)["url"], headers=bearer("all"), timeout=60
            ) as http:
                yield Traced(http=http, collector=collector, folder=folder, run=mine.run)
        finally:
            children = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            for pid in (process.pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(60)


def test_a_search_is_one_trace_of_ingress_embedder_and_archive(traced: Traced) -> None:
    answer, trace, span = traced.ask("/v1/search", text=QUESTION, level="slide", k=3)
    assert answer.is_success
    top = "POST /v1/search"
    traced.expect(
        trace,
        (top, "embedder.texts", "text tower"),
        (top, "search.search", "query"),
    )  # fmt: skip
    assert traced.collector.tree(trace) == {
        (top,), (top, "embedder.texts"), (top, "embedder.texts", "text tower"),
        (top, "search.search"), (top, "search.search", "query"),
    }  # fmt: skip
    by_name = {one.name: one for one in traced.collector.of(trace)}
    first = by_name[top]
    assert first.parent == span
    assert first.attributes == {
        "http.request.method": "POST", "http.route": "/v1/search",
        "http.response.status_code": 200, "pathflip.request_id": answer.headers["request-id"],
    }  # fmt: skip
    assert by_name["query"].attributes == {"pathflip.level": "slide", "pathflip.mode": "vector"}
    assert {one.service for one in by_name.values()} == {"pathflip"}
    for one in by_name.values():  # all processes are of one machine, with one clock
        assert first.begin_ns <= one.begin_ns <= one.end_ns <= first.end_ns


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_traced_down_to_the_engine(traced: Traced, stream: bool) -> None:
    model = traced.http.get("/v1/models").json()["data"][0]["id"]
    answer, trace, _ = traced.ask(
        "/v1/chat/completions", model=model, slide_id="slide000", max_tokens=5, stream=stream,
        messages=[{"role": "user", "content": QUESTION}],
    )  # fmt: skip
    assert answer.is_success, answer.text
    part = (CHAT, "instructor.chat")
    traced.expect(trace, (*part, "prompt"), (*part, "engine", "llm_request"))
    (generated,) = (one for one in traced.collector.of(trace) if one.name == "llm_request")
    assert generated.attributes["gen_ai.usage.completion_tokens"] == 5
    assert generated.attributes["gen_ai.latency.time_to_first_token"] > 0


def test_an_option_is_traced_down_to_the_engine(traced: Traced) -> None:
    model = traced.http.get("/v1/models").json()["data"][0]["id"]
    answer, trace, _ = traced.ask(
        "/v1/chat/completions", model=model, slide_id="slide000", choices=["yes", "no"],
        messages=[{"role": "user", "content": QUESTION}],
    )  # fmt: skip
    assert answer.is_success, answer.text
    traced.expect(trace, (CHAT, "instructor.chat", "engine", "llm_request"))


def test_an_error_is_told_by_its_code(traced: Traced) -> None:
    answer, trace, _ = traced.ask("/v1/ground", slide_id="slide-xylophone", text=QUESTION)
    assert answer.status_code == 404
    part = ("POST /v1/ground", "grounding.ground")
    traced.expect(trace, part)
    first, second = traced.collector.of(trace)
    assert (first.failed, first.attributes["http.response.status_code"]) == (False, 404)
    assert (second.failed, second.attributes) == (True, {"error.type": "unknown_slide"})


def test_without_a_trace_of_the_client_one_begins_and_probes_have_none(traced: Traced) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert traced.http.get(path).is_success
    before = len(traced.collector.spans)
    answer = traced.http.get("/v1/slides/slide000", headers={"traceparent": "00-xylophone"})
    assert answer.is_success

    def mine() -> list[str]:
        request = answer.headers["request-id"]
        return [
            one.trace for one in traced.collector.spans[before:]
            if one.attributes.get("pathflip.request_id") == request and not one.parent
        ]  # fmt: skip

    until(lambda: bool(mine()), seconds=60, what="the trace of the request")
    (trace,) = mine()
    top = "GET /v1/slides/{slide_id}"
    traced.expect(trace, (top, "search.slide"))
    named = {one.name for one in traced.collector.spans}
    assert "search.describe" not in named
    assert not named & {"request", "GET /healthz", "GET /readyz", "GET /metrics", "search.counts"}


def test_a_scrape_tells_the_load_of_the_engine(traced: Traced) -> None:
    """Six answers are begun where four are decoded at once; then they are left."""

    def load() -> dict[str, float]:
        return {
            sample.labels.get("state", "kv_cache"): sample.value
            for family in text_string_to_metric_families(traced.http.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("pathflip_engine_")
        }

    assert load() == {"running": 0, "waiting": 0, "kv_cache": 0}
    model = traced.http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "slide_id": "slide000", "max_tokens": 900, "stream": True,
            "messages": [{"role": "user", "content": QUESTION}]}  # fmt: skip
    with contextlib.ExitStack() as streams, ThreadPoolExecutor(6) as threads:
        for _ in range(6):
            stream = traced.http.stream("POST", "/v1/chat/completions", json=body)
            threads.submit(streams.enter_context, stream)

        def full() -> bool:
            found = load()
            return (found["running"], found["waiting"]) == (4, 2) and 0 < found["kv_cache"] <= 1

        until(full, seconds=60, what="four answers and two that wait")
        # Those that wait begin, and are left, when the others have ended.
    until(lambda: load()["running"] == 0, seconds=60, what="the engine to rest")


def test_nothing_that_was_sent_is_about_anybody(traced: Traced) -> None:
    """No question, slide, path or token, nor what clients say of their traces."""
    _, found, _ = traced.ask("/v1/search", slide_id="slide000", level="region", k=3)
    traced.expect(found, ("POST /v1/search", "search.search", "query"))
    _, failed, _ = traced.ask("/v1/ground", slide_id="slide-xylophone", text=QUESTION)
    traced.expect(failed, ("POST /v1/ground", "grounding.ground"))
    sent = b"".join(traced.collector.sent)
    assert b"unknown_slide" in sent
    paths = (str(traced.folder), str(traced.run))
    for word in ("xylophone", "slide00", "necrosis", *paths, TOKENS["all"][1]):
        at = sent.find(word.encode())
        assert at < 0, sent[at - 100 : at + 100]
