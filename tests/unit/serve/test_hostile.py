"""Requests of a hostile client: none reaches a file, another host, the engine or a log."""

from __future__ import annotations

import json
import socket
import sys
import threading
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathflip.errors import ArchiveError
from serve.middleware import STATUS
from tests.unit.serve.service_fixture import SECRETS, SLIDES, png, slide_id
from tests.unit.serve.test_auth import BODIES, ROUTES

opened: list[str] = []
watching = threading.Event()


def _hook(event, arguments):
    if watching.is_set() and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def watched():
    """Note every file that is opened."""
    opened.clear()
    watching.set()
    try:
        yield opened
    finally:
        watching.clear()


STEPS = ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "..\\", "....//", "..%252f", "..%c0%af")
TARGETS = ("etc/passwd", "etc%2fpasswd", "proc/self/environ", "tokens", "archive/slides.lance")
PATHS = [step * depth + target for step in STEPS for depth in (1, 4) for target in TARGETS] + [
    "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "file:///etc/passwd", "C:\\Windows\\win.ini",
    "slide001%00.jpg", "slide001%00", "slide001/", "slide001%2f..%2fslide002",
    "~root", "$HOME", "`id`", "slide001;id", "slide*", "%", "slide001' OR '1'='1", "*",
    "\u2024\u2024/",
    "%ff%fe", "%ed%a0%80", "DOE%5EJANE", "19561224", "/data/DOE%5EJANE/19561224.svs", "broken",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", "/thumbnail"])
def test_ids_are_no_paths(ask, suffix):
    import httpx

    with watched() as files:
        for path in PATHS:
            try:
                answer = ask("GET", f"/v1/slides/{path}{suffix}")
            except httpx.InvalidURL:
                continue
            assert answer.status_code in (404, 405), (path, answer.status_code)
            assert "passwd" not in answer.text
    assert not [name for name in files if "passwd" in name or "environ" in name]


def test_ids_in_bodies_are_no_paths(ask):
    with watched() as files:
        for path in [*PATHS[:50], "/etc/passwd", "slide001\0", "19561224", "19561224.svs"]:
            for route, body in (
                ("/v1/search", {"slide_id": path}),
                ("/v1/search", {"region_id": path}),
                ("/v1/search", {"region_id": f"{path}/0_0"}),
                ("/v1/ground", {"slide_id": path, "text": "a"}),
                ("/v1/classify", BODIES["/v1/classify"] | {"slide_ids": ["slide001", path]}),
            ):
                answer = ask("POST", route, json=body)
                assert (answer.status_code, answer.json()["code"]) == (404, "unknown_slide")
    assert not [name for name in files if "passwd" in name or "environ" in name]


ADDRESSES = [
    "http://127.0.0.1:{port}/a.png", "http://169.254.169.254/latest/meta-data", "HTTP://[::1]:{port}",
    "http://2130706433:{port}/", "http://ok\\@127.0.0.1:{port}/", "file:///etc/passwd",
    "http://localhost:{port}", "data:image/png;base64,AAAA", "//127.0.0.1:{port}/",
]  # fmt: skip


def test_no_address_is_fetched(ask):
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.2)
        port = canary.getsockname()[1]
        for text in ADDRESSES:
            url = text.format(port=port)
            part = {"type": "image_url", "image_url": {"url": url}}
            for route, body in (
                ("/v1/search", {"image": {"data": url, "mpp": 0.5}}),
                ("/v1/search", {"image": {"url": url, "mpp": 0.5}}),
                ("/v1/search", {"image": url}),
                ("/v1/embeddings", {"image": {"data": url, "mpp": 0.5}}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}),
                ("/v1/ground", {"slide_id": url, "text": "a"}),
            ):
                body = BODIES[route] | body if route == "/v1/chat/completions" else body
                assert ask("POST", route, json=body).status_code in (404, 422)
        with pytest.raises(TimeoutError):
            canary.accept()


# What is not in the allow-list is refused, whatever it is; what is, is bounded.
ABUSE = [
    {"max_tokens": 10**9}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1e9},
    {"max_completion_tokens": 10**30}, {"n": 10_000}, {"n": 0}, {"best_of": 100},
    {"stop": ["x"] * 9_000}, {"stop": [""]}, {"stop": "x" * 1000}, {"stop": [1]},
    {"guided_regex": "(a+)+$"}, {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "(a+)+$"}}, {"guided_grammar": "root ::= root"},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"enable_thinking": True}}, {"prompt_embeds": "AAAA"},
    {"logit_bias": {"1": 100}}, {"logprobs": True}, {"top_logprobs": 20}, {"prompt_logprobs": 5},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]},
    {"tool_choice": "auto"}, {"functions": []}, {"mm_processor_kwargs": {}}, {"lora_request": "x"},
    {"min_tokens": 10**6}, {"repetition_penalty": -1}, {"ignore_eos": True}, {"priority": -1},
    {"vllm_xargs": {}}, {"kv_transfer_params": {}}, {"cache_salt": "x"}, {"echo": True},
    {"stream_options": {"include_usage": True, "x": 1}}, {"temperature": -1}, {"temperature": 99},
    {"temperature": "hot"}, {"temperature": True}, {"top_p": 0}, {"top_p": 2}, {"seed": 2**70},
    {"seed": -1}, {"region": {"x0": -1, "y0": 0, "size0": 1}},
    {"region": {"x0": 10**30, "y0": 0, "size0": 1}}, {"region": {"x0": 0, "y0": 0, "size0": 0}},
    {"region": {"x0": 0.5, "y0": 0, "size0": 1}}, {"region": [0, 0, 1]}, {"slide_id": ""},
    {"slide_id": ["slide001"]}, {"slide_id": None}, {"slide_id": "x" * 10_000}, {"messages": []},
    {"messages": "hello"}, {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x" * 100_000}]},
    {"messages": [{"role": "user", "content": "x"}] * 1000},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x", "name": "y"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AA"}]}]},
    {"audio": {}}, {"modalities": ["audio"]}, {"documents": []}, {"user": "x" * 10_000},
]  # fmt: skip


@pytest.mark.parametrize("more", ABUSE, ids=lambda more: str(more)[:40])
def test_the_engine_is_not_asked_for_it(ask, more):
    answer = ask("POST", "/v1/chat/completions", json=BODIES["/v1/chat/completions"] | more)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert len(answer.content) < 10_000


def test_a_prompt_of_ten_megabytes_is_refused(ask):
    message = {"role": "user", "content": "x" * (10 << 20)}
    body = BODIES["/v1/chat/completions"] | {"messages": [message]}
    assert ask("POST", "/v1/chat/completions", json=body).status_code == 413


@pytest.mark.parametrize(
    "path",
    ["/pause", "/v1/load_lora_adapter", "/tokenize", "/invocations", "/v1/completions", "/score",
     "/v1/audio/transcriptions", "/sleep", "/v1/responses", "/collective_rpc", "/docs", "/redoc",
     "/metrics/", "/.env", "/v1/slides/slide001/label",
     "/v1/slides/slide001/macro"],
)  # fmt: skip
def test_there_are_no_other_routes(ask, path):
    assert ask("GET", path).status_code == 404
    assert ask("POST", path, json={}).status_code == 404


FILTERS = [
    {"field": "slide_id", "op": "=", "value": "x' OR '1'='1"},
    {"field": "slide_id", "op": "=", "value": "x\" OR \"1\"=\"1"},
    {"field": "vendor", "op": "=", "value": "aperio'; DROP TABLE slides; --"},
]  # fmt: skip


@pytest.mark.parametrize("condition", FILTERS)
def test_a_filter_is_a_value(ask, condition):
    answer = ask("POST", "/v1/search", json={"text": "a", "filters": [condition]})
    assert (answer.status_code, answer.json()["results"]) == (200, [])


WRONG_FILTERS = [
    {"field": "uri", "value": "x"}, {"field": "1=1 OR slide_id", "value": "x"}, "1=1",
    {"field": "slide_id", "op": "LIKE", "value": "%"},
    {"field": "slide_id", "op": "<", "value": "a"},
    {"field": "mpp", "op": "=", "value": "0.5"}, {"field": "x0", "op": "=", "value": 0.5},
    {"field": "x0", "op": "=", "value": 10**40}, {"field": "size0", "op": "=", "value": 2**62},
    {"field": "x0", "op": "=", "value": True}, {"field": "slide_id", "value": "x" * 10_000},
    {"field": "slide_id", "value": "\0"}, {"field": "patient_id", "value": SECRETS[2]},
    {"field": "labels", "value": "x"}, {"field": "slide_id", "value": ["a"]},
    {"field": "label.", "value": "x"}, {"field": "label.grade", "op": "<", "value": "2"},
    {"field": "label.grade", "value": 2}, {"field": "label.a=b", "value": "x"},
    {"field": "label." + "x" * 300, "value": "x"},
]  # fmt: skip


@pytest.mark.parametrize("condition", WRONG_FILTERS, ids=lambda one: str(one)[:50])
def test_other_filters_are_refused(ask, condition):
    answer = ask("POST", "/v1/search", json={"text": "a", "filters": [condition]})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_filters_only_narrow(ask):
    mine = {"field": "split", "op": "=", "value": "test"}
    for other in FILTERS:
        rows = ask("POST", "/v1/search", json={"text": "a", "filters": [mine, other]}).json()
        assert rows["results"] == []
    rows = ask("POST", "/v1/search", json={"text": "a", "k": 50, "filters": [mine]}).json()
    assert {row["slide_id"] for row in rows["results"]} == {"slide001", "slide003"}


ground_bodies = st.fixed_dictionaries(
    {"slide_id": st.sampled_from(["slide001", "../x", ""]), "text": st.text(max_size=50)},
    optional={
        "sigma": st.one_of(st.floats(), st.integers(), st.text(max_size=3)),
        "min_patches": st.one_of(st.integers(), st.just(10**12), st.floats()),
        "variant": st.sampled_from(["attn", "cosine", "product", "region_only", "../", "x"]),
        "contrast": st.one_of(st.none(), st.text(max_size=10)),
        "format": st.sampled_from(["json", "geojson", "png", "../", "PNG", "svg"]),
        "patches": st.one_of(st.booleans(), st.integers()),
    },
)


@given(ground_bodies)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_parameters_of_ground_are_answered_or_refused(ask, body):
    content = json.dumps(body).encode()  # NaN and lone surrogates as well
    answer = ask(
        "POST", "/v1/ground", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404, 422)


@given(st.integers() | st.text(max_size=8) | st.floats(), st.text(max_size=30))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_page_is_answered_or_refused(ask, limit, after):
    after = after.encode("utf-8", "replace").decode()
    limit = str(limit).encode("utf-8", "replace").decode()
    answer = ask("GET", "/v1/slides", params={"limit": limit, "after": after})
    assert answer.status_code in (200, 422)


@pytest.mark.parametrize("who", ["all", None])
def test_nobody_is_named(ask, caplog, who):
    """No path, patient, label or caption is in any answer, header, metric or log."""
    caplog.set_level(0)
    answers = []
    for method, path in ROUTES:
        options = {"json": BODIES[path]} if path in BODIES else {}
        answers.append(ask(method, path, who=who, **options))
    for n in range(SLIDES):
        answers.append(ask("GET", f"/v1/slides/{slide_id(n)}", who=who))
        answers.append(ask("POST", "/v1/search", who=who, json={"slide_id": slide_id(n), "k": 50}))
    for body in (
        {"text": "mucin", "mode": "text", "level": "slide"}, {"text": "mucin", "mode": "hybrid"},
        {"region_id": "slide001/9_9"}, {"slide_id": "broken"}, {"slide_id": "slide001 "},
        {"image": {"data": png(__import__("numpy").zeros((9, 9, 3), "uint8")), "mpp": 1}},
    ):  # fmt: skip
        answers.append(ask("POST", "/v1/search", who=who, json=body))
    answers.append(ask("GET", "/v1/slides/broken", who=who))
    for answer in answers:
        text = answer.text + str(answer.headers)
        for secret in (*SECRETS, "/tmp/", "Traceback", "site-packages"):
            assert secret not in text, (answer.url, secret)
    for secret in SECRETS:
        assert secret not in caplog.text


def test_an_error_inside_tells_nothing(serving, parts, caplog):
    class Broken:
        async def describe(self):
            raise OSError("[Errno 5] /secret/place\nforged line")

        async def slide(self, slide_id):
            raise OSError("[Errno 5] /secret/place\nforged line")

    whole = parts.search
    object.__setattr__(parts, "search", Broken())
    try:
        ask = serving()
        answer = ask("GET", "/v1/slides/slide001")
        assert answer.status_code == 500
        assert answer.json()["code"] == "internal"
        assert "secret" not in answer.text
        assert answer.json()["request_id"] in caplog.text
        assert "\nforged line" not in caplog.text
        ready = ask("GET", "/readyz")
        assert (ready.status_code, ready.json()["parts"]["search"]) == (503, False)
    finally:
        object.__setattr__(parts, "search", whole)


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ArchiveError("/secret/place is damaged.", code="damaged"), 500, 1),
        (ArchiveError("Slide slide001 is not there.", code="unknown_slide"), 404, 0),
        (KeyError("slide001"), 500, 1),
    ],
)
def test_what_a_part_fails_with_is_answered_once(serving, parts, caplog, error, status, lines):
    """A 500 is one line of the log, with its request id; what a client got wrong is none."""

    class Broken:
        async def slide(self, slide_id):
            raise error

    whole = parts.search
    object.__setattr__(parts, "search", Broken())
    try:
        answer = serving()("GET", "/v1/slides/slide001")
    finally:
        object.__setattr__(parts, "search", whole)
    assert (answer.status_code, answer.json()["code"]) == (
        status, getattr(error, "code", "internal"),
    )  # fmt: skip
    written = [record for record in caplog.records if record.name.startswith("serve")]
    assert len(written) == lines
    for record in written:
        text = record.getMessage()
        assert answer.json()["request_id"] in text
        assert type(error).__name__ in text
        assert "\n" not in text
    assert "secret" not in answer.text


def test_answers_carry_the_headers_of_a_closed_door(ask):
    for answer in (
        ask("GET", "/v1/slides"), ask("GET", "/v1/slides", who=None), ask("GET", "/healthz"),
        ask("GET", "/v1/slides/slide001/thumbnail"), ask("POST", "/v1/search", json={"x": 1}),
    ):  # fmt: skip
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        # A browser may keep a picture that it asks for again each time.
        kept = "private, no-cache" if "image" in answer.headers["content-type"] else "no-store"
        assert answer.headers["cache-control"] == kept
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert len(answer.headers["request-id"]) == 32
        assert answer.headers["x-request-id"] == answer.headers["request-id"]


@pytest.mark.parametrize("name", ["X-Request-ID", "Request-Id", "X-Forwarded-For", "Host"])
def test_headers_of_clients_are_not_sent_back(ask, name):
    forged = "forged"
    answer = ask("GET", "/v1/slides", headers={name: forged})
    assert forged not in str(answer.headers) + answer.text


def test_every_code_has_a_status_that_openapi_names(ask):
    schema = ask("GET", "/openapi.json").json()
    named = {int(code) for code in schema["paths"]["/v1/search"]["post"]["responses"]}
    assert set(STATUS.values()) - {500} <= named
