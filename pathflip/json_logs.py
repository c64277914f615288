"""Logs as lines of JSON, for whoever collects them: ``PATHFLIP_LOG_FORMAT=json``.

One variable for jobs and the service. Each line has ``time``, ``level``, ``logger`` and
``message``, those of :data:`FIELDS` that whoever logs gives as ``extra``, and ``trace_id`` where
it is a part of a trace (:mod:`pathflip.tracing`). Without the variable
people read plain lines, and nothing here changes what they see.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from pathflip import tracing
from pathflip.errors import ConfigError

FORMAT = "PATHFLIP_LOG_FORMAT"
"""Environment variable: ``json`` or ``text``."""
FIELDS = (
    "run_id", "slide_id", "request_id", "status", "reason", "code", "slides", "seconds", "fraction",
)  # fmt: skip
"""Names of what a line may have beside its message. ``run_id`` and ``slide_id`` are those of the
table ``slides``."""
LOGGERS = ("pathflip", "jobs", "serve")
"""Loggers of this project."""


class JSONFormatter(logging.Formatter):
    """Formats a record as one line of JSON, in ASCII: no text can begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in FIELDS if name in vars(record)}
        if (trace := tracing.trace_id()) is not None:
            line["trace_id"] = trace
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def is_on() -> bool:
    """Return whether logs are lines of JSON.

    Raises:
        ConfigError: The variable is neither ``json`` nor ``text``.
    """
    asked = os.environ.get(FORMAT, "text")
    if asked not in ("json", "text"):
        raise ConfigError(
            f"{FORMAT} is {asked!r}.", hint="It is json or text (the default).", code="log_format"
        )
    return asked == "json"


def set_up() -> None:
    """Send what a command logs, from INFO on, to standard error as lines of JSON.

    Does nothing where logs are for people. What packages print themselves stays as it is.

    Raises:
        ConfigError: See :func:`is_on`.
    """
    if not is_on():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for name in LOGGERS:
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False
        own.setLevel(logging.INFO)


def is_set_up() -> bool:
    """Return whether :func:`set_up` did something in this process."""
    handlers = logging.getLogger(LOGGERS[0]).handlers
    return any(isinstance(handler.formatter, JSONFormatter) for handler in handlers)
