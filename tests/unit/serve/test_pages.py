"""The page of the viewer: served from memory without a token, under a policy of its own."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from serve import pages
from serve.limits import Limits

SCRIPT = "export const names = [" + ",".join(f'"name{n}"' for n in range(400)) + "];\n"
FILES = {
    "index.html": '<!doctype html><script type="module" src="/assets/app-1a2b3c4d.js"></script>',
    "assets/app-1a2b3c4d.js": SCRIPT,
    "assets/app-1a2b3c4d.js.map": "{}",
    "assets/style-5e6f.css": "body { margin: 0 }",
    "assets/icons/mark-77.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
    "notes.txt": "beside the page",
}


@pytest.fixture
def dist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built viewer, which a service made now serves."""
    folder = tmp_path / "viewer" / "dist"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "viewer" / "secret.js").write_text("not for anybody")
    monkeypatch.setattr(pages, "DIST", folder)
    return folder


@pytest.mark.parametrize("tokens", [True, False])
def test_the_page_needs_no_token_and_has_its_policy(serving, dist, tokens):
    ask = serving(tokens=tokens)
    answer = ask("GET", "/", who=None)
    assert (answer.status_code, answer.text) == (200, FILES["index.html"])
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers.get_list("content-security-policy") == [
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"] == "no-cache"
    assert ask("HEAD", "/", who=None).status_code == 200
    # What has data keeps the policy under which nothing runs.
    other = ask("GET", "/v1/slides")
    assert other.headers["content-security-policy"].endswith("sandbox")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("app-1a2b3c4d.js", "text/javascript; charset=utf-8"),
        ("style-5e6f.css", "text/css; charset=utf-8"),
        ("icons/mark-77.svg", "image/svg+xml"),
    ],
)
def test_files_are_kept_for_ever_and_known_again(serving, dist, name, kind):
    ask = serving()
    for coding in ("gzip", "identity"):
        sent = {"Accept-Encoding": coding}
        answer = ask("GET", f"/assets/{name}", who=None, headers=sent)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.text == FILES[f"assets/{name}"]
        again = ask(
            "GET", f"/assets/{name}", who=None,
            headers=sent | {"If-None-Match": answer.headers["etag"]},
        )  # fmt: skip
        assert (again.status_code, again.content) == (304, b"")
        other = ask("GET", f"/assets/{name}", who=None, headers=sent | {"If-None-Match": '"other"'})
        assert other.status_code == 200


def test_scripts_are_sent_compressed(serving, dist):
    answer = serving()(
        "GET", "/assets/app-1a2b3c4d.js", who=None, headers={"Accept-Encoding": "br, gzip"}
    )
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["vary"] == "accept-encoding"
    assert int(answer.headers["content-length"]) == len(gzip.compress(SCRIPT.encode(), 9, mtime=0))


@pytest.mark.parametrize(
    "path",
    [
        "/assets/", "/assets/none.js", "/assets/../index.html", "/assets/..%2f..%2fsecret.js",
        "/assets/%2e%2e/%2e%2e/secret.js", "/assets//etc/passwd", "/assets/..\\secret.js",
        "/assets/app-1a2b3c4d.js.map", "/assets/app-1a2b3c4d.js/", "/assets/%00",
    ],
)  # fmt: skip
def test_only_the_files_there_are(serving, dist, path):
    answer = serving()("GET", path)
    assert answer.status_code == 404
    assert "not for anybody" not in answer.text


def test_nothing_is_read_of_whoever_writes(serving, dist):
    ask = serving()
    for path in ("/", "/assets/app-1a2b3c4d.js"):
        for method in ("POST", "PUT", "DELETE"):
            assert ask(method, path, who=None).status_code == 401
            assert ask(method, path, json={}).status_code in (404, 405)


def test_a_page_that_is_not_built_says_how(serving, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "DIST", tmp_path / "dist")
    ask = serving()
    answer = ask("GET", "/", who=None)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "make viewer" in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src")
    assert ask("GET", "/assets/a.js", who=None).status_code == 404
    # Built while the service runs: it is there.
    (tmp_path / "dist" / "assets").mkdir(parents=True)
    (tmp_path / "dist" / "index.html").write_text("one")
    assert ask("GET", "/", who=None).text == "one"
    (tmp_path / "dist" / "assets" / "b-2.js").write_text("2")
    (tmp_path / "dist" / "index.html").write_text("two")
    os.utime(tmp_path / "dist" / "index.html", ns=(1, 1))
    assert ask("GET", "/", who=None).text == "two"
    assert ask("GET", "/assets/b-2.js", who=None).text == "2"


@pytest.mark.usefixtures("dist")
def test_readers_of_the_page_take_no_place_of_a_client(serving):
    ask = serving(limits=Limits(concurrent=0))
    assert ask("GET", "/v1/slides").status_code == 429
    assert ask("GET", "/", who=None).status_code == 200
    assert ask("GET", "/assets/app-1a2b3c4d.js", who=None).status_code == 200
    assert ask.app.running == 0
