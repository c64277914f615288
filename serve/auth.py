"""Authentication by a file of tokens, each with a name and scopes.

A line of the file is ``NAME SCOPES TOKEN``; SCOPES are separated by commas, TOKEN is the token
itself or ``sha256:`` and the hex digest of it. ``#`` begins a comment line::

    viewer   read,search        sha256:9f86d081…
    lab      read,search,chat   pf-3fd1…

===========  ======================================================
scope        for
===========  ======================================================
``read``     slides, their pictures and annotations
``search``   search, classify, ground, embeddings
``chat``     answers about slides
``annotate`` drawing, changing and removing annotations of one's own
``admin``    metrics; everybody's annotations
===========  ======================================================

Without a file there are no tokens and only this machine is answered: peer and Host header must be
loopback, so that neither another machine nor a web page that renamed itself (DNS rebinding) gets
through.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pathflip.errors import ConfigError

SCOPES = ("read", "search", "chat", "annotate", "admin")
MIN_TOKEN = 24
"""Characters of a token: they are compared by one fast hash, so they must not be guessable."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:@\[\]]+))(:[0-9]{0,5})?")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Client:
    """An authenticated client.

    Attributes:
        name: Name of its token; ``local`` where there are no tokens.
        scopes: Routes it may use, see :data:`SCOPES`.
    """

    name: str
    scopes: frozenset[str]


LOCAL = Client(name="local", scopes=frozenset(SCOPES))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """SHA-256 digests of all tokens, each with its client."""

    digests: tuple[tuple[bytes, Client], ...]

    def client(self, authorization: str | None) -> Client | None:
        """Client of the token in a header ``Authorization: Bearer TOKEN``; None if there is none.

        Every digest is compared, in constant time, whichever matches.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogatepass")).digest()
        found = None
        for digest, client in self.digests:
            if hmac.compare_digest(given, digest):
                found = client
        return found


def read_tokens(path: str | Path) -> Tokens:
    """Read a file of tokens.

    Raises:
        ConfigError: If it cannot be read (``token_file``), others may read it (``token_mode``), or
            a line of it is wrong; the message names the line, never the token.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            f"The token file {path} cannot be read: {reason}.",
            hint="Give an existing file; docs/howto/serve.md shows one.",
            code="token_file",
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"The token file {path} may be read by others (mode {stat.S_IMODE(mode):o}).",
            hint=f"Run: chmod 600 {path}",
            code="token_mode",
        )
    entries: dict[bytes, Client] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        digest, client = _entry(line.split(), f"{path}, line {number}")
        if digest in entries or client.name in {one.name for one in entries.values()}:
            raise ConfigError(
                f"{path}, line {number}: the name or the token appears twice.",
                hint="Give every client its own name and token.",
                code="token_file",
            )
        entries[digest] = client
    if not entries:
        raise ConfigError(
            f"The token file {path} holds no token.",
            hint="Write a line NAME SCOPES TOKEN.",
            code="token_file",
        )
    return Tokens(digests=tuple(entries.items()))


def _entry(words: list[str], where: str) -> tuple[bytes, Client]:
    def wrong(message: str, hint: str) -> ConfigError:
        return ConfigError(f"{where}: {message}.", hint=hint, code="token_file")

    if len(words) != 3:
        raise wrong("this is not NAME SCOPES TOKEN", "Scopes have commas and no spaces.")
    name, scopes, token = words
    if not _NAME.fullmatch(name):
        raise wrong("the name is not letters, digits, . _ -", "It is what the audit log shows.")
    asked = frozenset(scopes.split(","))
    if not asked <= set(SCOPES):
        raise wrong("a scope is unknown", f"Scopes: {', '.join(SCOPES)}.")
    if match := _DIGEST.fullmatch(token):
        return bytes.fromhex(match[1]), Client(name=name, scopes=asked)
    if token.startswith("sha256:"):
        raise wrong("the digest is not 64 hex digits", "Make it: printf %s TOKEN | sha256sum")
    if len(token) < MIN_TOKEN or not _TOKEN.fullmatch(token):
        raise wrong(
            f"the token is shorter than {MIN_TOKEN} characters or not plain ASCII",
            "Make one: openssl rand -hex 32",
        )
    return hashlib.sha256(token.encode()).digest(), Client(name=name, scopes=asked)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address, with or without a port, is this machine's loopback."""
    bare = host.strip()
    if found := _HOST.fullmatch(bare):
        bare = found["six"] or found["name"]
    if bare.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def is_local(peer: str | None, headers: Mapping[str, str]) -> bool:
    """Return whether a request without a token comes from this machine and is addressed to it."""
    return peer is not None and is_loopback(peer) and is_loopback(headers.get("host", ""))
