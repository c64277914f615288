"""The command line. Every command imports what it needs when it runs: ``--help`` is instant.

Exit codes: 0 all good, 1 a fault or damage found, 2 wrong usage, 3 some slides were quarantined.
With ``--json`` a command prints one JSON document on stdout and nothing else there.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from pathflip import json_logs
from pathflip.cli import (
    annotate,
    answer,
    archive,
    datasets,
    evaluation,
    exchange,
    models,
    search,
    serve,
    train,
    trees,
)
from pathflip.cli.process import own_process
from pathflip.errors import ArchiveError, ConfigError, EncoderError, PathFLIPError

app = typer.Typer(
    name="pathflip",
    help="Whole-slide images and reports: ingest, search, train, answer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for part in (
    archive,
    exchange,
    datasets,
    models,
    annotate,
    trees,
    search,
    train,
    evaluation,
    answer,
    serve,
):
    app.add_typer(part.app)


def _print_version(asked: bool) -> None:
    if asked:
        from pathflip import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


_INTERRUPTED = 130  # what typer makes of KeyboardInterrupt, without a word
_FATAL_ARCHIVE_CODES = ("damaged", "disk_full", "io", "commit", "missing_table")


def run() -> NoReturn:
    """Run the command line as a process of its own; :func:`main` runs it within another."""
    with own_process():
        main()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        json_logs.set_up()
        app(arguments, prog_name="pathflip")
    except PathFLIPError as error:
        if "--json" in arguments:
            print(json.dumps({"error": error.as_json()}))
        _say(str(error), level=logging.ERROR, code=error.code)
        usage = isinstance(error, ConfigError | EncoderError) or (
            isinstance(error, ArchiveError) and error.code not in _FATAL_ARCHIVE_CODES
        )
        raise SystemExit(2 if usage else 1) from None
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _say(
                "interrupted; the same command continues where it stopped.",
                level=logging.WARNING,
                code="interrupted",
            )
        raise
    raise SystemExit(0)


def _say(text: str, *, level: int, code: str) -> None:
    """Write a last word to standard error: a line for people, or one of JSON."""
    if json_logs.is_set_up():
        logging.getLogger("pathflip").log(level, "%s", text, extra={"code": code})
    else:
        print(f"pathflip: {text}", file=sys.stderr)
