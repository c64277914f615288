"""Tokens: read from a file nobody else may read, compared whole, each with its scopes."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from pathflip.errors import ConfigError
from serve.auth import SCOPES, is_loopback, read_tokens
from serve.proxy import ANSWERED_BY, ASKED_BY, Proofs
from tests.unit.serve.service_fixture import TOKENS, bearer, write_tokens

ROUTES = {
    ("GET", "/readyz"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/m"): None,
    ("GET", "/metrics"): "admin",
    ("GET", "/v1/session"): None,
    ("POST", "/v1/session"): None,
    ("DELETE", "/v1/session"): None,
    ("GET", "/v1/slides"): "read",
    ("GET", "/v1/slides/slide001"): "read",
    ("GET", "/v1/slides/slide001/thumbnail"): "read",
    ("GET", "/v1/slides/slide001/annotations"): "read",
    ("PUT", f"/v1/slides/slide001/annotations/{uuid.UUID(int=7)}"): "annotate",
    ("DELETE", f"/v1/slides/slide001/annotations/{uuid.UUID(int=7)}"): "annotate",
    ("POST", "/v1/slides/slide001/annotations/import"): "annotate",
    ("GET", "/v1/slides/slide001/tiles"): "read",
    ("GET", "/v1/slides/slide001/tiles.dzi"): "read",
    ("GET", "/v1/slides/slide001/tiles/0/0_0.jpg"): "read",
    ("GET", "/v1/slides/slide001/view?x0=0&y0=0&w0=9&h0=9"): "read",
    ("GET", "/v1/slides/slide001/outlines"): "read",
    ("POST", "/v1/search"): "search",
    ("POST", "/v1/classify"): "search",
    ("POST", "/v1/ground"): "search",
    ("POST", "/v1/segment"): "search",
    ("POST", "/v1/embeddings"): "search",
    ("POST", "/v1/chat/completions"): "chat",
}
BODIES = {
    "/v1/session": {},
    "/v1/search": {"text": "a"},
    "/v1/classify": {"slide_ids": ["slide001"], "classes": {"a": ["a"], "b": ["b"]}},
    "/v1/ground": {"slide_id": "slide001", "text": "a"},
    "/v1/segment": {"slide_id": "slide001", "classes": {"a": ["a"], "b": ["b"]}},
    "/v1/embeddings": {"input": "a"},
    f"/v1/slides/slide001/annotations/{uuid.UUID(int=7)}": {
        "type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]},
    },
    "/v1/slides/slide001/annotations/import": {"type": "FeatureCollection", "features": []},
    "/v1/chat/completions": {
        "model": "m", "slide_id": "slide001", "messages": [{"role": "user", "content": "a"}],
    },
}  # fmt: skip


def test_a_token_file_is_read(tmp_path):
    tokens = read_tokens(write_tokens(tmp_path / "tokens"))
    for name, (scopes, token) in TOKENS.items():
        client = tokens.client(f"Bearer {token}")
        assert (client.name, client.scopes) == (name, frozenset(scopes.split(",")))
        assert tokens.client(f"bearer {token}") == client
        for wrong in (token[:-1], token + "x", token.upper(), token.replace("-", "_")):
            assert tokens.client(f"Bearer {wrong}") is None
        digest = hashlib.sha256(token.encode()).hexdigest()
        assert tokens.client(f"Bearer sha256:{digest}") is None  # the digest is no token
    for wrong in (None, "", "Bearer", "Bearer ", "Basic " + TOKENS["all"][1], TOKENS["all"][1]):
        assert tokens.client(wrong) is None


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "token_file", "no token"),
        ("# nobody\n", "token_file", "no token"),
        ("a read", "token_file", "line 1"),
        ("a read x y", "token_file", "line 1"),
        ("a read short", "token_file", "shorter"),
        ("a read ünicode" + "x" * 30, "token_file", "ASCII"),
        ("a write " + "x" * 30, "token_file", "scope"),
        ("a read, search " + "x" * 30, "token_file", "line 1"),
        ("a/b read " + "x" * 30, "token_file", "name"),
        ("a read sha256:12", "token_file", "64 hex"),
        ("a read " + "x" * 30 + "\nb read " + "x" * 30, "token_file", "twice"),
        ("a read " + "x" * 30 + "\na chat " + "y" * 30, "token_file", "twice"),
    ],
)
def test_a_wrong_line_is_refused_and_not_repeated(tmp_path, text, code, words):
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=words) as caught:
        read_tokens(path)
    assert caught.value.code == code
    assert "xxxxx" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_file_others_may_read_is_refused(tmp_path, mode):
    path = write_tokens(tmp_path / "tokens")
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_tokens(path)
    assert caught.value.code == "token_mode"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        read_tokens(tmp_path / "none")


@pytest.mark.parametrize(("route", "scope"), ROUTES.items(), ids=str)
def test_every_route_wants_its_scope_and_no_other(ask, route, scope):
    method, path = route
    options = {"json": BODIES[path]} if path in BODIES else {}
    for headers in ({}, {"Authorization": "Bearer " + "x" * 40}, {"Authorization": "Basic YTpi"}):
        answer = ask(method, path, who=None, headers=headers, **options)
        assert (answer.status_code, answer.json()["code"]) == (401, "no_token")
        assert answer.headers["www-authenticate"] == "Bearer"
    owners = {"read": "reader", "search": "finder", "chat": "talker", "annotate": "ann"}
    for own in SCOPES:
        who = owners.get(own, "all")
        answer = ask(method, path, who=who, **options)
        if scope is None or scope in TOKENS[who][0].split(","):
            assert answer.status_code not in (401, 403)
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "scope")


def test_unknown_paths_tell_nothing_without_a_token(ask):
    for path in (
        "/docs", "/v1/nothing", "/assets", "/index.html", "/v1/assets/x.js", "/pause",
        "/v1/slides/slide001/label",
    ):  # fmt: skip
        assert ask("GET", path, who=None).status_code == 401
        assert ask("GET", path).status_code == 404


def test_only_healthz_and_the_page_are_open(ask):
    assert ask("GET", "/healthz", who=None).status_code == 200
    for path in (
        "/healthz/", "/healthz/../v1/slides", "/HEALTHZ", "/healthz%00", "/assets", "/ASSETS/a.js",
    ):  # fmt: skip
        assert ask("GET", path, who=None).status_code == 401


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("127.0.0.1:80", True), ("localhost", True), ("LOCALHOST:8000", True),
        ("[::1]:8000", True), ("::1", True), ("127.9.9.9", True),
        ("0.0.0.0", False), ("10.0.0.1", False), ("localhost.evil.org", False), ("", False),
        ("evil.org", False), ("127.0.0.1.evil.org", False), ("2130706433", False), ("::", False),
        ("[::ffff:10.0.0.1]", False), ("127.0.0.1@evil.org", False),
        ("[::1]evil.org", False), ("[::1].evil.org:80", False), ("127.0.0.1:evil.org", False),
        ("127.0.0.1:80@evil.org", False), ("localhost:x", False), ("localhost,evil.org", False),
    ],
)  # fmt: skip
def test_what_loopback_is(host, local):
    assert is_loopback(host) is local


def test_without_tokens_only_this_machine_is_answered(serving):
    ask = serving(tokens=False)
    assert ask("GET", "/v1/slides").status_code == 200
    for options in (
        {"client": ("10.0.0.7", 1)},
        {"base": "http://evil.org"},  # a page that had its name point here
        {"headers": {"Host": "evil.org"}},
    ):
        answer = ask("GET", "/v1/slides", **options)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_local")


@pytest.mark.parametrize("tokens", [True, False])
def test_only_its_own_proxy_is_answered(serving, tokens):
    """Whoever reaches a replica's port by another way is told nothing, not even that it is up."""
    own, other = Proofs.of("its own"), Proofs.of("another service's")
    ask = serving(tokens=tokens, proofs=own)
    for shown in (None, "", other.asks, own.answers, own.asks[:-1], own.asks.upper(), "é"):
        headers = {} if shown is None else {ASKED_BY: shown.encode("latin-1")}
        for method, path in [*ROUTES, ("GET", "/healthz"), ("GET", "/nothing")]:
            answer = ask(method, path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "not_proxied")
            assert own.answers not in str(answer.headers) + answer.text
    headers = {ASKED_BY: own.asks}
    for path, status in (("/v1/slides", 200), ("/healthz", 200), ("/nothing", 404)):
        answer = ask("GET", path, headers=headers)
        assert answer.status_code == status
        assert answer.headers[ANSWERED_BY] == own.answers
    if tokens:
        answer = ask("GET", "/v1/slides", who=None, headers=headers)
        assert answer.status_code == 401
        assert answer.headers[ANSWERED_BY] == own.answers


def test_a_web_page_cannot_post(serving):
    ask = serving(tokens=False)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = ask("POST", "/v1/search", content=b'{"text":"a"}', headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["code"]) == (415, "media_type")
    answer = ask("OPTIONS", "/v1/search", headers={"Origin": "http://evil.org"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_token_is_in_no_log(ask, caplog):
    caplog.set_level(0)
    ask("GET", "/v1/slides", who="reader")
    ask("GET", "/v1/slides", who=None, headers={"Authorization": "Bearer " + "z" * 40})
    assert bearer("reader")["Authorization"][7:] not in caplog.text
    assert "z" * 40 not in caplog.text
