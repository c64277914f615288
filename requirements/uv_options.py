"""Prints pip's settings on where packages come from as options of uv, one on a line.

    python -m pip config list | python requirements/uv_options.py     (requirements/install.sh)

Several indexes mean to uv that the first which has a package wins, to pip the best version of all:
uv is told to do as pip. Exit status 3: a setting has no equal in uv, so pip itself must install.
"""

# ruff: noqa: INP001
from __future__ import annotations

import ast
import sys
from collections.abc import Iterable

OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
}
PIP_ONLY = {"client-cert", "keyring-provider", "proxy", "trusted-host"}
_LATER_WINS = ("global", "install", ":env:")


def uv_options(lines: Iterable[str]) -> list[str] | None:
    """Translate the lines of ``pip config list``; None where uv has no equal for one of them."""
    found: dict[str, tuple[int, str]] = {}
    for line in lines:
        key, _, value = line.strip().partition("=")
        section, _, name = key.rpartition(".")
        if section in _LATER_WINS:
            rank = _LATER_WINS.index(section)
            found[name] = max(found.get(name, (-1, "")), (rank, ast.literal_eval(value)))
    settings = {name: value for name, (_, value) in found.items()}
    if PIP_ONLY & {name for name, value in settings.items() if value}:
        return None
    options = [
        f"{option}={place}"
        for name, option in OPTIONS.items()
        for place in settings.get(name, "").split()
    ]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return [*options, "--index-strategy=unsafe-best-match"] if options else []


if __name__ == "__main__":
    translated = uv_options(sys.stdin)
    if translated is None:
        sys.exit(3)
    print("\n".join(translated))
