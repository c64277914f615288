"""HAProxy lets the page and valid session cookies pass, judged by HAProxy itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest

from serve import proxy
from serve.auth import Client, Tokens
from serve.sign_in import COOKIE, SignIn
from tests.unit.serve.test_proxy import assert_bounded, guarded, variables

__all__ = ["variables"]  # a fixture

TOKEN = "t" * 32


def cookie_of(secret: str, *, name: str = "lab", token: str = TOKEN) -> str:
    """The cookie that an ingress with this secret gives the client of a token."""
    client = Client(name=name, scopes=frozenset({"read"}))
    tokens = Tokens(digests=((hashlib.sha256(token.encode()).digest(), client),))
    made = SignIn(tokens, key=proxy.Proofs.of(secret).sessions.encode())
    return f"{COOKIE}={made.start(client)[0]}"


def test_a_session_passes_as_its_token_does(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = variables[proxy.SECRET]
    good = cookie_of(secret)
    name, until, number, proof = good.removeprefix(f"{COOKIE}=").split(":")

    def cookie(*parts: str) -> str:
        return f"{COOKIE}={':'.join(parts)}"

    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    expired = cookie_of(secret)
    monkeypatch.undo()
    bad = {
        "nothing": "",
        "another cookie": f"other={good}",
        "empty": cookie(""),
        "name alone": cookie("lab"),
        "without a proof": cookie(name, until, number),
        "an empty proof": cookie(name, until, number, ""),
        "a longer proof": cookie(name, until, number, f"{proof}0"),
        "a shorter proof": cookie(name, until, number, proof[:-1]),
        "another time": cookie(name, str(int(until) + 1), number, proof),
        "another number": cookie(name, until, "0" * 32, proof),
        "another name": cookie("all", until, number, proof),
        "expired": expired,
        "another service's": cookie_of("another"),
        "another token's": cookie_of(secret, token="T" * 32),
        "a client of before": cookie_of(secret, name="gone"),
        "the proof of nobody": cookie_of(secret, name="gone", token=""),
    }
    with (
        guarded(variables, monkeypatch, tmp_path / "p", token=TOKEN) as (port, behind),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for what, shown in bad.items():
            for method in ("GET", "POST"):
                answer = client.request(method, "/v1/slides", headers={"Cookie": shown})
                assert (answer.status_code, answer.json()["code"]) == (401, "no_token"), what
        assert "/v1/slides" not in behind.asked
        for shown in (good, f"a=b; {good}; c=d"):
            answer = client.get("/v1/slides", headers={"Cookie": shown})
            assert answer.status_code == 200
        # On one connection, one request's session is not the next one's.
        assert client.get("/v1/slides").status_code == 401
        answer = client.get("/v1/slides", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200


def test_the_page_passes_without_a_token_and_has_a_rate(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        guarded(variables, monkeypatch, tmp_path / "p", token=TOKEN) as (port, behind),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for path in ("/", "/assets/app-1a2b.js", "/?q=1"):
            assert client.get(path).status_code == 200
            assert client.request("GET", path, content=b"{}").status_code == 413
            assert client.post(path).status_code == 401
        asked = list(behind.asked)
        assert_bounded(client, "/assets/app-1a2b.js", rate=proxy.ADDRESS_PAGE_RATE)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/healthz").status_code == 200
    assert {path for path in asked if not path.startswith("/-/")} == {
        "/", "/assets/app-1a2b.js", "/?q=1"
    }  # fmt: skip
