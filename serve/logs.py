"""The log of a service: one file in its private folder, shown on standard error.

Replicas are processes whose own output Ray keeps in files below that folder. What an operator has
to hear of is a line here instead, written by each process that calls :func:`set_up`. On a cluster,
where there is no such folder, it goes to standard error, which Ray keeps.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from pathflip import json_logs

FILE = "PATHFLIP_LOG"
"""Environment variable with the file of one service."""
_MAX_BYTES = 16 << 20
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up() -> None:
    """Send warnings and errors of pathflip in this process to the log."""
    file = os.environ.get(FILE)
    # Opened for every process to append: lines of several do not mix.
    handler = logging.FileHandler(file) if file else logging.StreamHandler()
    as_json = json_logs.is_on()
    handler.setFormatter(json_logs.JSONFormatter() if as_json else logging.Formatter(_FORMAT))
    handler.setLevel(logging.WARNING)
    for name in ("pathflip", "serve"):
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False


def pass_on(file: Path, begin: int) -> int:
    """Write what the log has from a place on to standard error; return where it ends."""
    try:
        with file.open("r+b") as handle:
            handle.seek(begin)
            if text := handle.read():
                with suppress(OSError):  # nobody reads it any more
                    sys.stderr.write(text.decode(errors="replace"))
                    sys.stderr.flush()
            end = handle.tell()
            if end > _MAX_BYTES:
                handle.truncate(0)  # whoever writes appends
                return 0
            return end
    except FileNotFoundError:
        return 0
