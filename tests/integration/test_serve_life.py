"""Ends of ``pathflip serve``: whatever ends it, and whenever, nothing of it is left.

What is struck is a start, at the moment when a certain process of it has appeared: most have done
little by then, and one that is ready is held together by the same means. The end of a service that
is ready is in test_serve.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pathflip.files import PRIVATE
from tests.faults import alive, command_line, descendants, private_folder, until
from tests.serving import free_port
from tests.unit.serve.service_fixture import World, make_world

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(400)]

SESSION, CONTROLLER, HAPROXY = "-m serve.session", "ray::ServeController", "bin/haproxy -db"
GCS, RAYLET = "gcs/gcs_server", "raylet/raylet"
MOMENTS = (
    SESSION, GCS, RAYLET, "ray::RuntimeEnvAgent", CONTROLLER, "ray::ProxyActor",
    "ray::HAProxyManager", HAPROXY, "ServeReplica:pathflip:search", "ServeReplica:pathflip:ingress",
)  # fmt: skip
"""Processes of a start, in the order in which they appear."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("served"))


@dataclass(kw_only=True)
class Start:
    """A service that starts.

    Attributes:
        process: The command.
        port: Its port.
        errors: Its standard error.
        seen: Every process of it that was seen.
    """

    process: subprocess.Popen[str]
    port: int
    errors: Path
    seen: set[int]

    def find(self, words: str) -> int | None:
        """The process whose command line holds the words, if it has appeared."""
        own = descendants(self.process.pid)
        self.seen.update(own)
        return next((pid for pid in own if words in command_line(pid)), None)

    def wait_for(self, words: str) -> int:
        """Wait until a process has appeared."""

        def appeared() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            return self.find(words) is not None

        until(appeared, seconds=200, what=words)
        found = self.find(words)
        assert found is not None
        return found

    def private(self) -> Path:
        """The private folder of the service."""
        self.wait_for(SESSION)
        folder = private_folder(self.process.pid)
        assert folder.name.startswith(PRIVATE)
        return folder

    def end(self) -> dict[str, Any]:
        """Wait for the end; the document that it printed, {} for none."""
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        self.process.wait(100)
        return dict(json.loads(said)) if said else {}


@pytest.fixture
def start(world: World, tmp_path: Path) -> Iterator[Start]:
    port = free_port()
    command = [
        sys.executable, "-m", "pathflip.cli", "serve", "--archive", world.archive,
        "--run", world.run, "--port", port, "--json", "-o", f"audit={tmp_path / 'audit'}",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=environment,
        )  # fmt: skip
    begun = Start(process=process, port=port, errors=errors, seen={process.pid})
    yield begun
    for pid in (*descendants(process.pid), *begun.seen):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(60)


def assert_nothing_is_left(start: Start, folder: Path) -> None:
    """No process, no folder, and the port is free."""
    until(lambda: not any(map(alive, start.seen)), seconds=30, what="every process to be gone")
    until(lambda: not folder.exists(), seconds=30, what="the private folder to be gone")
    named = [pid for pid in os.listdir("/proc") if pid.isdigit() and names(int(pid), folder)]
    assert not named
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", start.port))


def names(pid: int, folder: Path) -> bool:
    """Return whether a process names a folder in its command line or its variables."""
    variables = ""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return str(folder) in command_line(pid) + variables


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_while_it_starts(start: Start, moment: str) -> None:
    folder = start.private()
    start.wait_for(moment)
    start.process.send_signal(signal.SIGTERM)
    assert start.end() == {}
    assert start.process.returncode == 0, start.errors.read_text()
    assert_nothing_is_left(start, folder)


@pytest.mark.parametrize("struck", [SESSION, RAYLET])
def test_it_ends_when_a_process_dies_that_it_needs(start: Start, struck: str) -> None:
    folder = start.private()
    start.wait_for(CONTROLLER)
    pid = start.find(struck)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    error = start.end()["error"]
    assert start.process.returncode == 1
    assert error["code"] == "service_died"
    assert error["message"].startswith("The service has ended: ")
    assert error["message"] in start.errors.read_text()
    assert_nothing_is_left(start, folder)


def test_nothing_outlives_it_when_it_is_killed(start: Start) -> None:
    folder = start.private()
    start.wait_for(HAPROXY)
    assert folder.stat().st_mode & 0o777 == 0o700
    start.process.kill()
    start.process.wait(60)
    assert_nothing_is_left(start, folder)


def test_a_port_that_is_taken_while_it_starts_is_named(start: Start) -> None:
    folder = start.private()
    with socket.create_server(("127.0.0.1", start.port)):
        assert start.end()["error"]["code"] == "port"
        assert start.process.returncode == 2
    assert_nothing_is_left(start, folder)


def test_a_port_that_a_service_holds_is_explained(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process that listens is named as the HAProxy of a service is."""
    from pathflip.cli import main

    port = free_port()
    code = (
        "import socket, time\n"
        f"s = socket.create_server(('127.0.0.1', {port}))\nprint(1, flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", code, f"/tmp/{PRIVATE}of-another/haproxy.cfg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as orphan:
        try:
            assert orphan.stdout is not None
            orphan.stdout.readline()
            words = ["serve", "--archive", world.archive, "--run", world.run, "--port", port]
            with pytest.raises(SystemExit) as ended:
                main([*map(str, words), "--json"])
        finally:
            orphan.kill()
    error = json.loads(capfd.readouterr().out)["error"]
    assert (ended.value.code, error["code"]) == (2, "port")
    assert f"kill {orphan.pid}" in error["hint"]
