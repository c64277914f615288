"""``pathflip serve`` as a process of its own: one ready line, real HTTP, SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.checkpoints import load_run
from pathflip.evaluation.patch_text import class_weights, patch_reader
from pathflip.evaluation.segment_stored import segment_stored
from pathflip.search import Query, embed_texts, run_query
from serve.audit import verify
from serve.embedder import Embedder
from serve.limits import Limits
from serve.proxy import SECRET
from tests.attacks import HALF, head, held
from tests.faults import (
    command_line,
    descendants,
    listening,
    private_folder,
    resident_bytes,
    until,
    without_compiler,
)
from tests.serving import free_port
from tests.unit.serve.service_fixture import (
    PX,
    SECRETS,
    SIDE,
    TOKENS,
    World,
    bearer,
    make_world,
    pixels,
    png,
    rows_of,
    signed_in,
    slide_id,
)
from tests.unit.serve.test_auth import BODIES, ROUTES
from tests.unit.serve.test_patches import CLASSES, assert_near

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

# As the installed command: the working folder is not where it looks for modules.
COMMAND = (sys.executable, "-P", "-m", "pathflip.cli", "serve")


@dataclass(frozen=True, kw_only=True)
class Process:
    """The service.

    Attributes:
        process: Its own.
        port: Port it listens on.
        audit: Its log.
        errors: Its output on stderr.
        ready: Its one line.
    """

    process: subprocess.Popen[str]
    port: int
    audit: Path
    errors: Path
    ready: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("served"), patches=True)


def start(world: World, folder: Path, *, tokens: bool = True) -> Process:
    """Start the command and wait for its line; without tokens, also without a patch model."""
    port = free_port()
    assert world.patches is not None
    command = [
        *COMMAND, "--archive", world.archive, "--run", world.run, "--port", port, "--json",
        "-o", f"audit={folder / 'audit'}", "-o", "limits.body_s=10", "-o", "limits.concurrent=8",
    ]  # fmt: skip
    if tokens:
        command += ["--patches", world.patches.removeprefix("mrplip:")]
        command += ["--token-file", world.token_file]
    compilers = folder / "without-compiler"
    compilers.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= without_compiler(compilers)  # as in the image
    here = folder / "working-folder"
    here.mkdir()
    for name in ("serve", "pathflip", "queue"):  # which are not meant
        (here / f"{name}.py").write_text("raise SystemExit(__file__)")
    errors = folder / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=environment, cwd=here,
        )  # fmt: skip
    line = process.stdout.readline() if process.stdout else ""
    service = Process(
        process=process, port=port, audit=folder / "audit", errors=errors,
        ready=json.loads(line or "{}"),
    )  # fmt: skip
    if not line:
        end(service)
    assert line, errors.read_text()
    return service


def end(service: Process) -> None:
    """End the command, and what a fault left of it."""
    children = descendants(service.process.pid)
    if service.process.poll() is None:
        service.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.process.wait(60)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def started(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Process]]:
    """``started()``: the running service; another where a test has ended it."""
    every: list[Process] = []

    def running() -> Process:
        if not every or every[-1].process.poll() is not None:
            every.append(start(world, tmp_path_factory.mktemp("service")))
        return every[-1]

    yield running
    for service in every:
        end(service)


@pytest.fixture
def served(started: Callable[[], Process]) -> Process:
    return started()


@pytest.fixture
def http(served: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.ready["url"], headers=bearer("all"), timeout=60) as client:
        yield client


def test_the_ready_line(served: Process, http: httpx.Client, world: World) -> None:
    assert [served.ready["patches"]] == sorted({*Archive(world.archive).encoders()} - {"texture"})
    assert served.ready["pid"] == served.process.pid
    assert served.ready["url"] == f"http://127.0.0.1:{served.port}"
    assert http.get("/readyz").json()["status"] == "ok"


def test_every_route_over_http(served: Process, http: httpx.Client) -> None:
    page = signed_in(served.ready["url"], "all")
    for method, path in ROUTES:
        options: dict[str, Any] = {"json": BODIES[path]} if path in BODIES else {}
        answer = http.request(method, path, **options)
        # This service has no language model, no model of that name, and no files of slides.
        lacks = path in ("/v1/chat/completions", "/v1/models/m")
        done = 204 if method == "DELETE" or (method, path) == ("POST", "/v1/session") else 200
        done = 409 if "/tiles" in path or "/view" in path else done
        assert answer.status_code == (404 if lacks else done), answer.text
        for secret in (*SECRETS, TOKENS["all"][1]):
            assert secret not in answer.text + str(answer.headers)
        (own,) = answer.headers.get_list("x-request-id")
        assert answer.headers.get_list("request-id") == [own]
        bare = httpx.request(method, served.ready["url"] + path, timeout=60, **options)
        assert bare.status_code == 401
    assert page.get("/v1/slides").json() == http.get("/v1/slides").json()
    assert http.get("/v1/slides/slide009").json()["code"] == "unknown_slide"
    answer = http.post("/v1/search", json={"slide_id": "slide001", "k": 0})
    wrong = {"where": "body.k", "what": "Input should be greater than or equal to 1"}
    assert answer.json()["errors"] == [wrong]
    assert httpx.get(served.ready["url"] + "/healthz", timeout=60).status_code == 200


def test_what_clients_get_wrong_is_in_no_log(served: Process, http: httpx.Client) -> None:
    """Parts that refuse a request name the slide; Ray and Serve keep what they print in files."""
    wrong = "slide-nobody-has"
    for path, more in (
        ("/v1/ground", {"slide_id": wrong}),
        ("/v1/segment", {"slide_id": wrong}),
        ("/v1/classify", {"slide_ids": [wrong]}),
    ):
        assert http.post(path, json=BODIES[path] | more).json()["code"] == "unknown_slide"
    assert http.post("/v1/search", json={"slide_id": wrong}).json()["code"] == "unknown_slide"
    assert http.get(f"/v1/slides/{wrong}").status_code == 404
    folder = private_folder(served.process.pid)
    assert folder.stat().st_mode & 0o777 == 0o700
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any("replica_pathflip_search" in path.name for path in logs)
    for path in [*logs, served.errors]:
        assert wrong.encode() not in path.read_bytes(), path


def test_a_picture_of_the_largest_size_is_embedded(http: httpx.Client, world: World) -> None:
    """Between replicas it travels as its pixels, a dozen times what gRPC lets through by itself."""
    times = math.isqrt(Limits().image_pixels) // (SIDE * PX)
    picture = np.tile(pixels(1, 1), (times, times, 1))
    assert picture.nbytes > 12 * (4 << 20) - 1
    answer = http.post("/v1/embeddings", json={"image": {"data": png(picture), "mpp": 0.5}})
    assert answer.status_code == 200, answer.text
    own = asyncio.run(Embedder(str(world.archive), str(world.run)).image(picture, mpp=0.5))
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], own["vectors"][0], atol=1e-5)


def test_patches_are_the_librarys(http: httpx.Client, served: Process, world: World) -> None:
    archive, name = Archive(world.archive), served.ready["patches"]
    assert world.patches is not None
    run = load_run(world.patches.removeprefix("mrplip:"), family="mrplip")
    listed = {row["capability"]: row for row in http.get("/v1/models").json()["data"]}
    assert listed["patches"]["id"] == name
    assert listed["patches"]["fingerprint"] == run.fingerprint
    # By a text.
    text = "round nuclei"
    query = Query(text=text, vector=embed_texts(run, [text])[0], level="patch", k=9, encoder=name)
    found = http.post("/v1/search", json={"text": text, "level": "patch", "k": 9}).json()
    assert (found["model"], found["exhaustive"]) == (name, True)
    for ours, theirs in zip(found["results"], rows_of(run_query(archive, query)), strict=True):
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-6)
        assert ours == theirs
    # By a picture of a patch: the one of row 1 and column 0 in slide 3's region 2.
    cut = {"data": png(pixels(3, 2)[PX:, :PX]), "mpp": 0.5}
    (best,) = http.post("/v1/search", json={"image": cut, "level": "patch", "k": 1}).json()[
        "results"
    ]
    assert best["region_id"] == f"{slide_id(3)}/2_0"
    assert (best["x0"], best["y0"], best["size0"]) == (2 * SIDE * PX, PX, PX)
    # Segmentation.
    reader = patch_reader(run, pixels=False)
    expected = segment_stored(
        archive, "slide001", list(CLASSES), class_weights(reader, CLASSES), tau=reader.tau,
        encoder=name, min_patches=1,
    )  # fmt: skip
    asked = {"slide_id": "slide001", "classes": CLASSES, "min_patches": 1}
    answer = http.post("/v1/segment", json=asked).json()
    assert answer.pop("model") == name
    assert_near(answer, expected.as_json())
    outlines = http.post("/v1/segment", json=asked | {"format": "geojson"}).json()
    assert_near(outlines, expected.geojson())
    picture = http.post("/v1/segment", json=asked | {"format": "png"})
    assert picture.headers["content-type"] == "image/png"
    drawn = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(drawn[..., ::-1], expected.picture())


def test_patches_are_refused_and_audited(http: httpx.Client, served: Process, world: World) -> None:
    two = {"a": ["a"], "b": ["b"]}
    many = {f"class {n}": ["a"] for n in range(33)}
    for path, body, status, code in (
        ("/v1/segment", {"slide_id": "nobody", "classes": two}, 404, "unknown_slide"),
        ("/v1/segment", {"slide_id": slide_id(4), "classes": two, "format": "png"}, 404,
         "no_thumbnail"),
        ("/v1/segment", {"slide_id": "slide001", "classes": many}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": [two]}, 422, "invalid"),
        ("/v1/search", {"slide_id": "slide001", "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": " ", "level": "patch"}, 422, "config"),
    ):  # fmt: skip
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        lacking = http.post(path, json=body, headers=bearer("reader"))
        assert lacking.status_code in (403, 422)  # a body is read before the scope is looked at
        assert not [secret for secret in SECRETS if secret in answer.text]
    asked = {"slide_id": "slide002", "classes": {"secret words": ["a"], "b": ["b"]}}
    refused = http.post("/v1/segment", json=asked, headers=bearer("reader"))
    assert (refused.status_code, refused.json()["code"]) == (403, "scope")
    assert http.post("/v1/segment", json=asked).status_code == 200
    one = {"field": "slide_id", "op": "=", "value": "slide003"}
    body = {"text": "secret words", "level": "patch", "filters": [one]}
    assert http.post("/v1/search", json=body).status_code == 200
    verify(served.audit)
    text = "".join(path.read_text() for path in served.audit.iterdir())
    assert "secret words" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    said = [
        (line["who"], line["action"], line.get("slides"), line["outcome"])
        for line in lines if line.get("action", "").startswith("POST")
    ]  # fmt: skip
    for line in (
        ("reader", "POST /v1/segment", None, 403),
        ("all", "POST /v1/segment", ["nobody"], 404),
        ("all", "POST /v1/segment", ["slide002"], 200),
        ("all", "POST /v1/search", ["slide003"], 200),
    ):
        assert line in said


def test_it_listens_on_loopback_only(served: Process) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address would
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection((own, served.port), timeout=5).close()
    (haproxy,) = (
        pid
        for pid in descendants(served.process.pid)
        if command_line(pid).split()[0].endswith("haproxy")
    )
    assert listening([haproxy]) == {served.port}


def test_no_other_way_in(served: Process) -> None:
    """A replica's own port and Ray's fallback refuse even who has a token: they are not the way."""
    below = descendants(served.process.pid)
    (haproxy,) = (pid for pid in below if command_line(pid).split()[0].endswith("haproxy"))
    variables = dict(
        line.split("=", 1)
        for line in Path(f"/proc/{haproxy}/environ").read_text().split("\0")
        if "=" in line
    )
    fallback = int(variables["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])
    replicas = {port for port in listening(below) if 30_000 <= port < 31_000}
    assert replicas
    assert fallback in listening(below)
    for port in {fallback, *replicas}:
        for path in ("/v1/slides", "/healthz"):
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", headers=bearer("all"), timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (403, "not_proxied")
            assert variables[SECRET] not in str(answer.headers)


def raw(served: Process, *lines: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=60)
    head = ["POST /v1/search HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    head += [f"Authorization: {bearer('all')['Authorization']}", *lines]
    connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
    return connection


def test_nobody_without_a_token_is_felt(served: Process, http: httpx.Client) -> None:
    """All at once they hold heads, bodies and connections, and ask as fast as they can."""
    search = f"{served.ready['url']}/v1/search"
    over = threading.Event()
    refused: list[int] = []

    def flood() -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {'x' * 32}"}, timeout=60) as client:
            while not over.is_set():
                refused.append(client.post(search, json={"text": "x"}).status_code)

    before = resident_bytes(descendants(served.process.pid))
    with contextlib.ExitStack() as attacks:
        for sent, count, then in (
            (HALF, 4_200, b""),
            (b"", 300, b""),
            (head("GET", "/healthz", 9_900_001), 100, b"x" * 9_900_000),
            (head("POST", "/v1/search", 9_900_001), 100, b"x" * 9_900_000),
            (head("POST", "/v1/search", 1024), 300, b"x" * 1000),
        ):
            attacks.enter_context(held(served.port, sent, count, then=then))
        for _ in range(2):
            thread = threading.Thread(target=flood)
            thread.start()
            attacks.callback(thread.join)
        attacks.callback(over.set)
        for _ in range(5):
            for method, path in (("GET", "/v1/slides"), ("POST", "/v1/search")):
                options = {"json": BODIES[path]} if path in BODIES else {}
                assert http.request(method, path, **options).status_code == 200
        after = resident_bytes(descendants(served.process.pid))
    assert set(refused) == {401}
    assert after - before < 300 << 20, "what was sent is kept"


def test_two_services_side_by_side(
    served: Process, http: httpx.Client, world: World, tmp_path: Path
) -> None:
    """Each one's ingress is killed: nobody is answered by the other, who goes on."""
    other = start(world, tmp_path, tokens=False)
    told: dict[tuple[int, bool], Counter[str]] = {}

    def ask(service: Process, *, token: bool) -> str:
        headers = bearer("all") if token else {}
        try:
            answer = httpx.get(service.ready["url"] + "/v1/models", headers=headers, timeout=60)
        except httpx.TransportError:
            said = "none"
        else:
            said = str(answer.json().get("code", "answered"))
            if said == "answered":
                assert answer.status_code == 200
                capabilities = {entry["capability"] for entry in answer.json()["data"]}
                assert ("patches" in capabilities) == (service is served), "the other answered"
        told.setdefault((service.port, token), Counter())[said] += 1
        return said

    def ingresses(service: Process) -> set[int]:
        words = "ServeReplica:pathflip:ingress"
        return {p for p in descendants(service.process.pid) if words in command_line(p)}

    try:
        for struck, stands in ((served, other), (other, served)):
            told.clear()
            old = ingresses(struck)
            assert old
            for pid in old:
                os.kill(pid, signal.SIGKILL)

            def back(struck: Process = struck, stands: Process = stands) -> bool:
                said = ask(struck, token=True)
                assert ask(stands, token=stands is served) == "answered"
                assert ask(struck, token=False) != "answered" or struck is other
                return said == "answered"

            until(back, seconds=120, what="the struck one's own ingress to answer")
            assert set(told[struck.port, True]) != {"answered"}, "asked only while it was up"
            for said in told.values():
                assert set(said) <= {"answered", "unavailable", "no_token", "none"}
    finally:
        end(other)


def answered(connection: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(OSError):
        while b"\r\n\r\n" not in got and (part := connection.recv(65536)):
            got += part
    return got


def test_four_hundred_megabytes_in_chunks_are_not_kept(served: Process, http: httpx.Client) -> None:
    http.get("/v1/slides")
    before = resident_bytes(descendants(served.process.pid))
    peak, sent = before, 0
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with raw(served, "Transfer-Encoding: chunked") as connection:
        head = b""
        for _ in range(400):
            connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError, OSError):
                head += connection.recv(4096)
            if head:
                break
            connection.settimeout(60)
            try:
                connection.sendall(chunk)
            except OSError:
                break
            sent += 1
            peak = max(peak, resident_bytes(descendants(served.process.pid)))
        connection.settimeout(60)
        head = head or answered(connection)
    assert head.startswith(b"HTTP/1.1 413")
    assert sent < 400
    assert peak - before < 50 << 20
    assert http.get("/v1/slides").status_code == 200


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (("Content-Length: 419430400",), b"", b"413"),
        (("Content-Length: 99999999999999999999",), b"", b"4"),
        (("Content-Length: -5",), b"", b"400"),
        (("Content-Length: 5", "Content-Length: 6"), b"{}", b"400"),
        (("Content-Length: 5", "Transfer-Encoding: chunked"), b"0\r\n\r\n", b"4"),
        (("Content-Length: 1000",), b'{"text":', b"408"),  # and then nothing: slowloris
    ],
)
def test_lengths_that_lie(
    served: Process, lines: tuple[str, ...], body: bytes, status: bytes
) -> None:
    with raw(served, *lines) as connection:
        connection.sendall(body)
        assert answered(connection).startswith(b"HTTP/1.1 " + status)


def test_ray_answers_nobody_without_its_token(served: Process) -> None:
    """Its ports are open to the machine's network; who has no token is told nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = " ".join(
        Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        for pid in descendants(served.process.pid)
        if Path(f"/proc/{pid}/cmdline").exists()
    )
    match = re.search(r"--gcs[-_]address=\S*?:(\d+)", command)
    assert match
    port = int(match[1])
    assert port in listening(descendants(served.process.pid))
    code = (
        "import ray._raylet as r\n"
        f"print(r.GcsClient(address='127.0.0.1:{port}').internal_kv_keys(b'', None, 10))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr or "Unauthenticated" in done.stderr


def test_sigterm_lets_answers_finish_and_exits_0(served: Process, http: httpx.Client) -> None:
    for method, path in ROUTES:
        http.request(method, path, **({"json": BODIES[path]} if path in BODIES else {}))
    body = json.dumps({"slide_id": "slide001", "k": 1}).encode()
    with raw(served, f"Content-Length: {len(body)}", "Connection: close") as connection:
        connection.sendall(body[:5])
        at_work = re.compile(r"^pathflip_requests_in_flight\{.*\} 1\.0$", re.MULTILINE)
        deadline = time.monotonic() + 30
        while not at_work.search(
            httpx.get(served.ready["url"] + "/metrics", headers=bearer("all"), timeout=30).text
        ):
            assert time.monotonic() < deadline
        children = descendants(served.process.pid)
        served.process.send_signal(signal.SIGTERM)

        def stopping() -> bool:
            answer = httpx.get(
                served.ready["url"] + "/v1/slides", headers=bearer("all"), timeout=30
            )
            assert answer.is_success or answer.json()["code"] == "unavailable"
            return not answer.is_success

        until(stopping, seconds=30, what="the service to take nothing more")
        connection.sendall(body[5:])
        assert answered(connection).startswith(b"HTTP/1.1 200")
    assert served.process.wait(120) == 0, served.errors.read_text()
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""  # the ready line was all
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cwd").exists() for pid in children):
        assert time.monotonic() < deadline, "it left processes"
        time.sleep(0.2)
    # One file of each ingress there was: a test before this one kills the first.
    heads = verify(served.audit).values()
    assert sum(head.lines for head in heads) > len(ROUTES)
    assert not all(head.torn for head in heads)
    text = "".join(path.read_text() for path in served.audit.iterdir())
    written = served.errors.read_text()
    assert "did not stop in order" not in written
    assert "event loop" not in written
    assert "ServeController" not in written
    for secret in (*SECRETS, *(token for _, token in TOKENS.values())):
        assert secret not in text + written


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--host", "0.0.0.0"], "no_tokens"),
        (["--host", "::"], "no_tokens"),
        (["--token-file", "{run}/model/pathflip.json"], "token_mode"),
        (["-o", "limits.body_byte=1"], "config"),
        (["-o", "engine.engine.max_num_seq=1"], "config"),
        (["-o", "instructor.max_ongoing=0"], "config"),
        (["--llm", "{run}"], None),
        (["--patches", "{run}"], "other_kind"),
        (["--patches", "{patches}@20x"], "unknown_encoder"),
    ],
)
def test_what_is_refused_before_anything_starts(
    world: World, capfd: pytest.CaptureFixture[str], more: list[str], code: str | None
) -> None:
    from pathflip.cli import main

    port = free_port()
    places = {"{run}": str(world.run), "{patches}": str(world.patches)}
    for place, path in places.items():
        more = [word.replace(place, path) for word in more]
    command = ["serve", "--archive", world.archive, "--run", world.run, "--port", port, "--json"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in command] + more)
    out, _ = capfd.readouterr()
    assert ended.value.code in (1, 2)
    error = json.loads(out)["error"]
    assert code is None or error["code"] == code
    assert error["hint"]
