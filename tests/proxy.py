"""A proxy between a client and a store that counts what passes, and harms it when it is told to."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.s3 import HOST

DROP, STALL, BUSY, FORBIDDEN, DEAF, CUT = "drop", "stall", "busy", "forbidden", "deaf", "cut"
"""Faults: the connection is closed; nothing is answered; 503 or 403 is; the request arrives and its
answer is lost; half of the answer arrives."""
_HEAD = re.compile(rb"^(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_REFUSALS = {BUSY: b"503 Slow Down", FORBIDDEN: b"403 Forbidden"}
_NOTHING = b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
Faults = Callable[[str, str], "str | None"]


def no_fault(method: str, path: str) -> None:
    """Let every request pass."""


@dataclass
class Traffic:
    """Traffic through the proxy.

    Attributes:
        requests: Method and path of every request, in order.
        sent: Bytes from clients.
        received: Bytes to clients.
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    received: int = 0


class Proxy:
    """A proxy in threads of this process.

    Attributes:
        port: Port it listens on.
        traffic: Requests and bytes since this was last set.
        fault: ``fault(method, path)`` names the fault of a request, None if it may pass.
    """

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listening = socket.create_server((HOST, 0), backlog=100)
        self.port = self._listening.getsockname()[1]
        self.traffic = Traffic()
        self.fault: Faults = no_fault
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        fault: list[str | None] = [None]
        store = socket.create_connection((HOST, self._behind))
        for end in (client, store):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answers() -> None:
            with suppress(OSError):
                while data := store.recv(1 << 16):
                    if fault[0] in (DEAF, CUT):
                        if fault[0] == CUT:
                            client.sendall(data[: len(data) // 2])
                        break
                    self.traffic.received += len(data)
                    client.sendall(data)
            _shut(client, store)

        threading.Thread(target=answers, daemon=True).start()
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if head := _HEAD.match(data):
                    method, path = (part.decode() for part in head.groups())
                    self.traffic.requests.append((method, path))
                    fault[0] = self.fault(method, path)
                self.traffic.sent += len(data)
                if fault[0] == STALL:
                    continue
                if refusal := _REFUSALS.get(fault[0] or ""):
                    client.sendall(b"HTTP/1.1 " + refusal + _NOTHING)
                if refusal or fault[0] == DROP:
                    break
                store.sendall(data)
        _shut(client, store)


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def between(port: int) -> Iterator[Proxy]:
    """Run a proxy before a port of this machine."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
