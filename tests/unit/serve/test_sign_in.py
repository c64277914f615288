"""Sessions: a token is exchanged for a cookie that dies with its token, its time and its owner."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from serve import sign_in
from serve.audit import AuditLog
from serve.auth import Client, Tokens, read_tokens
from serve.limits import RequestError
from serve.proxy import ASKED_BY, Proofs
from serve.sign_in import COOKIE, SESSION_S, SignIn, warn_of_nodes
from tests.unit.serve.service_fixture import TOKENS, bearer

SAME = {"Sec-Fetch-Site": "same-origin"}
SEARCH = {"slide_id": "slide001", "level": "slide", "k": 1}


@pytest.fixture
def ask(serving, tmp_path):
    audit = AuditLog(tmp_path / "audit")
    yield serving(audit=audit)
    audit.close()


def signed_in(ask: Any, who: str = "all", **headers: str) -> str:
    """Sign in; return the cookie."""
    answer = ask("POST", "/v1/session", who=who, json={}, headers=headers)
    assert answer.status_code == 204
    return answer.headers["set-cookie"].partition(";")[0]


def by(cookie: str, **headers: str) -> dict[str, Any]:
    """Options of a request as the page makes it."""
    return {"who": None, "headers": {"Cookie": cookie} | SAME | headers}


def test_a_token_is_exchanged_for_a_cookie(ask):
    answer = ask("POST", "/v1/session", json={})
    assert (answer.status_code, answer.content) == (204, b"")
    value, *attributes = answer.headers["set-cookie"].split("; ")
    assert set(attributes) == {"Path=/", f"Max-Age={SESSION_S}", "HttpOnly", "SameSite=Strict"}
    assert TOKENS["all"][1] not in value
    assert hashlib.sha256(TOKENS["all"][1].encode()).hexdigest() not in value
    told = ask("GET", "/v1/session", **by(value)).json()
    assert told["name"] == "all"
    assert told["scopes"] == sorted(TOKENS["all"][0].split(","))
    assert told["tokens"] is True
    left = datetime.fromisoformat(told["expires"]).timestamp() - time.time()
    assert SESSION_S - 60 < left <= SESSION_S
    assert told["can"] == {
        "search": True, "ground": True, "chat": None, "annotate": True, "patients": False,
    }  # fmt: skip
    assert ask("GET", "/v1/slides", **by(value)).status_code == 200
    assert ask("POST", "/v1/search", json=SEARCH, **by(value)).status_code == 200
    assert ask("GET", "/v1/session").json()["expires"] is None  # by token


def test_over_tls_the_cookie_stays_there(ask):
    for how in ({"base": "https://127.0.0.1"}, {"headers": {"Origin": "https://slides.clinic"}}):
        answer = ask("POST", "/v1/session", json={}, **how)
        assert answer.headers["set-cookie"].endswith("; Secure")


@pytest.mark.parametrize("who", TOKENS)
def test_a_session_has_the_scopes_of_its_token(ask, who):
    cookie = signed_in(ask, who)
    told = ask("GET", "/v1/session", **by(cookie)).json()
    assert (told["name"], told["scopes"]) == (who, sorted(TOKENS[who][0].split(",")))
    may = {
        "read": ask("GET", "/v1/slides", **by(cookie)).status_code == 200,
        "search": ask("POST", "/v1/search", json=SEARCH, **by(cookie)).status_code == 200,
        "admin": ask("GET", "/metrics", **by(cookie)).status_code == 200,
    }
    assert {scope for scope, allowed in may.items() if allowed} == set(may) & set(told["scopes"])
    assert told["can"]["search"] == told["can"]["ground"] == ("search" in told["scopes"])


def test_without_tokens_there_is_nothing_to_sign_in_to(serving):
    ask = serving(tokens=False)
    told = ask("GET", "/v1/session").json()
    assert (told["name"], told["tokens"], told["expires"]) == ("local", False, None)
    answer = ask("POST", "/v1/session", json={})
    assert (answer.status_code, answer.json()["code"]) == (404, "no_tokens")
    assert "set-cookie" not in answer.headers
    assert ask("DELETE", "/v1/session").status_code == 204


# -- what is no session ---------------------------------------------------------------------------


def parts_of(cookie: str) -> list[str]:
    return cookie.removeprefix(f"{COOKIE}=").split(":")


def test_a_forged_cookie_is_none(ask):
    cookie = signed_in(ask, "reader")
    name, until, number, proof = parts_of(cookie)
    digest = hashlib.sha256(TOKENS["reader"][1].encode()).hexdigest()
    guessed = hmac.new(
        digest.encode(), f"session:{name}:{until}:{number}:{digest}".encode(), hashlib.sha256
    ).hexdigest()
    forged = [
        ("all", until, number, proof),
        (name, str(int(until) + 1), number, proof),
        (name, until, "0" * 32, proof),
        (name, until, number, "0" * 64),
        (name, until, number, proof[:-1] + ("0" if proof[-1] != "0" else "1")),
        (name, until, number, proof.upper()),
        (name, until, number, ""),
        (name, until, number, proof + "00"),
        (name, until, number, guessed),
        (name, "9" * 12, number, proof),
        ("nobody", until, number, proof),
        ("", until, number, proof),
        (f"{name}:{until}:{until}", number, proof),
        (f" {name}", until, number, proof),
    ]
    for parts in forged:
        answer = ask("GET", "/v1/slides", **by(f"{COOKIE}={':'.join(parts)}"))
        assert (answer.status_code, answer.json()["code"]) == (401, "no_token"), parts
    for raw in ("", COOKIE, f"{COOKIE}=", f"{COOKIE}=;", f"other={':'.join(parts_of(cookie))}",
                f"{COOKIE}={'x' * 5000}", f'{COOKIE}="{":".join(parts_of(cookie))}"'):  # fmt: skip
        assert ask("GET", "/v1/slides", **by(raw)).status_code == 401
    # A second cookie of the name may be another page's: neither counts.
    assert ask("GET", "/v1/slides", **by(f"{cookie}; {COOKIE}=x")).status_code == 401
    assert ask("GET", "/v1/slides", **by(f"a=b; {cookie}; c=d")).status_code == 200


def test_a_wrong_token_is_not_mended_by_a_cookie(ask):
    cookie = signed_in(ask)
    asked = by(cookie, Authorization="Bearer " + "x" * 40)
    assert ask("GET", "/v1/slides", **asked).status_code == 401


def test_an_expired_session_is_none(ask, monkeypatch):
    cookie = signed_in(ask)
    now = time.time()
    monkeypatch.setattr(sign_in.time, "time", lambda: now + SESSION_S - 2)
    assert ask("GET", "/v1/slides", **by(cookie)).status_code == 200
    monkeypatch.setattr(sign_in.time, "time", lambda: now + SESSION_S + 1)
    assert ask("GET", "/v1/slides", **by(cookie)).status_code == 401


def test_replicas_of_a_service_share_sessions_and_services_do_not(serving):
    own, other = Proofs.of("one service"), Proofs.of("another")
    first, second, strange = serving(proofs=own), serving(proofs=own), serving(proofs=other)
    cookie = signed_in(first, **{ASKED_BY: own.asks})
    assert second("GET", "/v1/slides", **by(cookie, **{ASKED_BY: own.asks})).status_code == 200
    answer = strange("GET", "/v1/slides", **by(cookie, **{ASKED_BY: other.asks}))
    assert answer.status_code == 401
    alone = serving()
    assert alone("GET", "/v1/slides", **by(cookie)).status_code == 401


def known(**tokens: str) -> Tokens:
    return Tokens(
        digests=tuple(
            (hashlib.sha256(token.encode()).digest(), Client(name=name, scopes=frozenset({"read"})))
            for name, token in tokens.items()
        )
    )


def test_a_session_dies_with_its_token():
    """The key may outlive the service, as on a cluster whose nodes keep its file."""
    key = b"k" * 32
    before = SignIn(known(lab="old-token", other="x"), key=key)
    value, session = before.start(Client(name="lab", scopes=frozenset({"read"})))
    cookie = [f"{COOKIE}={value}"]
    assert before.find(cookie) == session
    assert SignIn(known(lab="old-token"), key=key).find(cookie) == session
    assert SignIn(known(other="x"), key=key).find(cookie) is None  # removed
    assert SignIn(known(lab="new-token"), key=key).find(cookie) is None  # replaced
    assert SignIn(known(other="old-token"), key=key).find(cookie) is None  # another's now
    assert SignIn(known(lab="old-token"), key=b"K" * 32).find(cookie) is None


def test_a_session_that_was_ended_is_not_taken_again(ask, serving, tmp_path):
    audit = AuditLog(tmp_path / "audit")
    proofs = Proofs.of("s")
    first, second = (serving(audit=audit, proofs=proofs) for _ in range(2))
    own = {ASKED_BY: proofs.asks}
    cookie, other = signed_in(first, **own), signed_in(first, **own)
    answer = first("DELETE", "/v1/session", **by(cookie, **own))
    assert answer.status_code == 204
    assert answer.headers["set-cookie"].startswith(f"{COOKIE}=; Path=/; Max-Age=0;")
    for replica in (first, second):
        assert replica("GET", "/v1/slides", **by(cookie, **own)).status_code == 401
        assert replica("GET", "/v1/slides", **by(other, **own)).status_code == 200
    audit.close()


def test_what_was_ended_is_forgotten_once_it_has_expired(tmp_path, monkeypatch):
    folder = tmp_path / "ended"
    made = SignIn(known(lab="t"), key=b"k", ended=folder)
    client = Client(name="lab", scopes=frozenset({"read"}))
    old, new = made.start(client)[1], made.start(client)[1]
    made.end(old)
    assert [file.name for file in folder.iterdir()] == [f"lab:{old.id}"]
    now = time.time()
    monkeypatch.setattr(sign_in.time, "time", lambda: now + SESSION_S + 5)
    made.end(new)
    assert [file.name for file in folder.iterdir()] == [f"lab:{new.id}"]


@pytest.mark.parametrize("shared", [True, False])
def test_who_signs_out_all_the_time_keeps_nobody_else_from_it(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(sign_in, "MAX_ENDED", 3)
    made = SignIn(known(lab="t", lab2="u"), key=b"k", ended=tmp_path / "e" if shared else None)
    lab, other = (Client(name=name, scopes=frozenset({"read"})) for name in ("lab", "lab2"))
    for _ in range(3):
        made.end(made.start(lab)[1])
    with pytest.raises(RequestError) as error:
        made.end(made.start(lab)[1])
    assert error.value.code == "busy"
    value, session = made.start(other)
    cookies = [f"{COOKIE}={value}"]
    assert made.find(cookies) == session
    made.end(session)
    assert made.find(cookies) is None


# -- pages of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),  # this host, another port
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1"}, False),
        ({"Origin": "http://127.0.0.1"}, True),
        ({"Origin": "http://127.0.0.1:3000"}, False),
        ({"Origin": "http://evil.org"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://[::"}, False),
        ({"Origin": "http://127.0.0.1.evil.org"}, False),
        ({"Origin": "http://evil.org/127.0.0.1"}, False),
        ({"Origin": "http://127.0.0.1@evil.org"}, False),
        ({}, False),
    ],
)
def test_another_page_cannot_use_a_session(ask, headers, fine):
    cookie = signed_in(ask)
    asked = {"who": None, "headers": {"Cookie": cookie} | headers}
    answer = ask("POST", "/v1/search", json=SEARCH, **asked)
    if fine:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")
    assert (ask("DELETE", "/v1/session", **asked).status_code == 204) is fine


def test_reading_by_address_is_fine_and_from_another_page_is_not(ask):
    cookie = signed_in(ask)
    for site, status in (("none", 200), ("same-origin", 200), ("same-site", 403),
                         ("cross-site", 403)):  # fmt: skip
        asked = {"who": None, "headers": {"Cookie": cookie, "Sec-Fetch-Site": site}}
        assert ask("GET", "/v1/slides/slide001/thumbnail", **asked).status_code == status
    assert ask("GET", "/v1/slides", who=None, headers={"Cookie": cookie}).status_code == 200


def test_without_tokens_other_pages_are_refused_as_well(serving):
    ask = serving(tokens=False)
    for site, status in (
        ("same-origin", 200),
        ("none", 200),
        ("same-site", 403),
        ("cross-site", 403),
    ):
        asked = {"Sec-Fetch-Site": site}
        assert ask("GET", "/v1/slides", headers=asked).status_code == status
        assert ask("GET", "/", headers=asked).status_code != 403
    assert ask("GET", "/v1/slides", headers={"Origin": "http://evil.org"}).status_code == 403
    assert ask("GET", "/v1/slides").status_code == 200


def test_a_form_cannot_use_a_session(ask):
    cookie = signed_in(ask)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        asked = by(cookie, **{"Content-Type": kind})
        answer = ask("POST", "/v1/search", content=json.dumps(SEARCH).encode(), **asked)
        assert (answer.status_code, answer.json()["code"]) == (415, "media_type")


def test_signing_in_and_out_is_in_the_audit_log(ask, tmp_path):
    cookie = signed_in(ask, "reader")
    ask("GET", "/v1/slides/slide001", **by(cookie))
    ask("DELETE", "/v1/session", **by(cookie))
    ask("GET", "/v1/slides", **by(cookie))  # nobody any more
    (log,) = Path(tmp_path / "audit").glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    assert [(line["who"], line["action"], line["outcome"]) for line in lines] == [
        ("reader", "POST /v1/session", 204),
        ("reader", "GET /v1/slides/{slide_id}", 200),
        ("reader", "DELETE /v1/session", 204),
    ]
    assert {line["session"] for line in lines} == {parts_of(cookie)[2]}
    assert parts_of(cookie)[3] not in log.read_text()


def test_the_fixture_tokens_are_those_of_the_service(world):
    """Cookies above are of real tokens, by digest too."""
    tokens = read_tokens(world.token_file)
    assert {client.name for _, client in tokens.digests} == set(TOKENS)
    assert tokens.client(bearer("reader")["Authorization"]) is not None


def test_a_cluster_is_told_that_its_nodes_must_share_who_signed_out(tmp_path, caplog):
    warn_of_nodes(tmp_path / "ended-sessions", nodes=1)
    assert caplog.text == ""
    warn_of_nodes(tmp_path / "ended-sessions", nodes=3)
    (record,) = caplog.records
    for word in ("3 nodes", str(tmp_path / "ended-sessions"), "audit=DIR", "12 hours"):
        assert word in record.getMessage()
