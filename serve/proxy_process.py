"""HAProxy under supervision: the program that Ray starts in HAProxy's place.

Ray notices only after half a minute that its HAProxy has died, and cannot reload it meanwhile. This
program hardens the configuration (:mod:`serve.proxy`), starts HAProxy below itself and, when
HAProxy dies, starts it again at once. To Ray it is HAProxy: it passes on its signals, and at the
socket where Ray asks HAProxy who it is, it answers in its name.

When the actor of Ray that started it dies, it goes on, until its successor takes over the listening
sockets; when the raylet or it itself ends, HAProxy ends.

Read in this order: :func:`main`, :class:`Supervisor`.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs isolated, with -I

from serve.proxy import harden, write_private

RETRY_S = 1.0
"""Seconds between two starts of a HAProxy that dies at once."""
_PASSED = (
    signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTTOU, signal.SIGTTIN, signal.SIGUSR2
)  # fmt: skip
_ENDING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_SOCKET = re.compile(r"stats socket (\S+)")
_SERVER = re.compile(r"^\s+server ", re.MULTILINE)
_REPLY_S = 5.0  # as long as Ray waits


def main(folder: Path, arguments: list[str]) -> int:
    """Run HAProxy with a hardened configuration until it is told to end.

    Args:
        folder: Folder that :func:`serve.proxy.environment` prepared.
        arguments: HAProxy's, as Ray gives them.

    Returns:
        HAProxy's exit status.
    """
    binary = (folder / "binary").read_text()
    if "-f" not in arguments:
        os.execv(binary, [binary, *arguments])
    config = Path(arguments[arguments.index("-f") + 1])
    written = config.read_text()
    asked = _SOCKET.search(written)
    if asked is None:
        sys.exit(f"{config} names no socket for commands.")
    public = Path(asked[1])
    hardened = harden(written, folder)
    first = [word for word in ("-sf", "-x") if word not in arguments] == ["-sf", "-x"]
    before = running_pid(public) if first else None
    last = config.with_suffix(".last")
    if first and not _SERVER.search(hardened) and last.exists():
        # A new actor of Ray knows no replica for its first second; its predecessor did.
        hardened = last.read_text()
    elif _SERVER.search(hardened):
        write_private(last, hardened)
    write_private(config, hardened)
    found = _SOCKET.search(hardened)
    assert found is not None
    own = found[1]
    alone, takeover = _split(arguments)
    if before is not None:
        takeover = ["-sf", str(before), "-x", own]
    takeover = [own if word == str(public) else word for word in takeover]
    with suppress(PermissionError):  # it leads a group already
        os.setsid()  # what ends with the actor of Ray that started it are its group
    return Supervisor([binary, *alone], takeover, public=public, own=Path(own)).run()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate arguments from those by which HAProxy takes over from others, which come last."""
    places = [arguments.index(word) for word in ("-sf", "-st", "-x") if word in arguments]
    at = min(places, default=len(arguments))
    return arguments[:at], arguments[at:]


class Supervisor:
    """Process above HAProxy.

    Args:
        command: HAProxy's command.
        takeover: Further arguments of its first start.
        public: Socket where Ray gives commands.
        own: Socket where HAProxy takes them.
    """

    def __init__(self, command: list[str], takeover: list[str], *, public: Path, own: Path) -> None:
        self.command, self.public, self.own = command, public, own
        self.ending = False
        self.listener: socket.socket | None = None
        self.process = self._start(takeover)
        for number in _PASSED:
            signal.signal(number, self._pass)

    def _start(self, takeover: list[str]) -> subprocess.Popen[bytes]:
        self.started = time.monotonic()
        return subprocess.Popen([*self.command, *takeover], preexec_fn=_end_with_parent)

    def _pass(self, number: int, _: Any) -> None:
        self.ending |= number in _ENDING
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def run(self) -> int:
        """Start HAProxy again whenever it dies; return its exit status once it may end."""
        master = _master()
        while True:
            ended = os.pidfd_open(self.process.pid)
            waited = select.poll()
            for descriptor in (ended, master):
                waited.register(descriptor, select.POLLIN)
            while self.process.poll() is None:
                self._listen(waited)
                ready = [descriptor for descriptor, _ in waited.poll(1000 if self.listener else 20)]
                if master in ready:
                    self.process.kill()
                    return self.process.wait()
                if self.listener is not None and self.listener.fileno() in ready:
                    with suppress(OSError):
                        self._relay(self.listener.accept()[0])
            os.close(ended)
            if self.ending or self.process.returncode == 0 or self.listener is None:
                return self.process.returncode
            time.sleep(max(0.0, self.started + RETRY_S - time.monotonic()))
            self.process = self._start([])

    def _listen(self, waited: select.poll) -> None:
        """Take over Ray's socket once HAProxy is up."""
        if self.listener is None and running_pid(self.own) == self.process.pid:
            # Shorter than the name it gets: the path of a socket has no room for more.
            made = self.public.with_name(f".{os.getpid():x}")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(made))
            made.chmod(0o600)
            listener.listen()
            os.replace(made, self.public)
            self.listener = listener
        if self.listener is not None:
            waited.register(self.listener.fileno(), select.POLLIN)

    def _relay(self, client: socket.socket) -> None:
        """Pass one command to HAProxy, and its reply back, which names this process."""
        with client:
            client.settimeout(_REPLY_S)
            command = b""
            while not command.endswith(b"\n") and (part := client.recv(65536)):
                command += part
            own, self_ = f"Pid: {self.process.pid}\n", f"Pid: {os.getpid()}\n"
            client.sendall(ask(self.own, command).replace(own.encode(), self_.encode(), 1))


def ask(path: Path, command: bytes) -> bytes:
    """Reply of HAProxy to a command.

    Raises:
        OSError: Nobody listens at the socket, or there is no reply in time.
    """
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(_REPLY_S)
        asked.connect(str(path))
        asked.sendall(command)
        reply = b""
        while part := asked.recv(65536):
            reply += part
        return reply


def running_pid(path: Path) -> int | None:
    """Process that answers at a socket for commands; None if there is none."""
    try:
        found = re.search(rb"^Pid: (\d+)$", ask(path, b"show info\n"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _master() -> int:
    """Descriptor of the process with which this one ends: the raylet, or its parent outside Ray."""
    try:
        return os.pidfd_open(int(os.environ.get("RAY_RAYLET_PID") or os.getppid()))
    except ProcessLookupError:
        sys.exit("The raylet is gone.")


def _end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
