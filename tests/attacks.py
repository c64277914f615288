"""Hostile clients without a token, as bare sockets: what they send and never finish."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HALF = b"GET /v1/slides HTTP/1.1\r\nHost: localhost\r\nX-Held: "
"""Beginning of a head."""


def head(method: str, path: str, length: int, *fields: str) -> bytes:
    """Head of a request with a body of so many bytes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def held(
    port: int, sent: bytes, count: int, *, then: bytes = b"", address: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """Hold so many connections that have sent something and wait.

    Args:
        port: Port of the service.
        sent: Bytes sent by each.
        count: Connections.
        then: Bytes each sends afterwards, as far as they are taken without waiting.
        address: Address of this machine.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    every: list[socket.socket] = []
    try:
        for _ in range(count):
            own = socket.socket()
            every.append(own)
            own.settimeout(30)
            with suppress(ConnectionError):
                own.connect((address, port))
                own.sendall(sent)
            own.setblocking(False)
        waiting = dict.fromkeys(every, then) if then else {}
        for _ in range(50):
            for own, rest in list(waiting.items()):
                try:
                    waiting[own] = rest[own.send(rest) :]
                except BlockingIOError:
                    continue
                except OSError:  # it was refused, and closed
                    del waiting[own]
        yield every
    finally:
        for own in every:
            own.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ended(every: list[socket.socket]) -> int:
    """Connections that the service has ended, whatever it sent before."""
    count = 0
    for own in every:
        try:
            while own.recv(65536):
                pass
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count
