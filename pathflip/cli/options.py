"""Options that commands share, how they print, and how they reach jobs/ and serve/."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, Literal

import typer

from pathflip.cli.process import absent
from pathflip.errors import ConfigError
from pathflip.progress import Report, show_progress
from pathflip.splits import requested_split

_SHOWN = 5  # names of a list in a table

ArchiveOption = Annotated[
    str, typer.Option("--archive", help="Archive: a folder, or s3://, gs://, az://.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="YAML file of settings.", metavar="FILE")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--set",
        help="One setting, e.g. -o tiling.mpp=0.25; null undoes what a file set.",
        metavar="KEY=VALUE",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster, e.g. auto or ray://head:10001; default: this machine."),
]
LocalOption = Annotated[
    bool | None,
    typer.Option(
        "--local/--ray",
        help="Processes of this machine (default without a cluster), or a Ray of its own on it.",
    ),
]
RunOption = Annotated[str, typer.Option("--run", help="Folder that pathflip pretrain wrote.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU if there is one.")]
SplitOption = Annotated[
    str,
    typer.Option(help="Slides of this split; all for every slide.", callback=requested_split),
]
TemplatesOption = Annotated[
    str, typer.Option(help="single, ensemble, or one template with CLASSNAME.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of shuffles and resamples.")]
ResamplesOption = Annotated[int, typer.Option(help="Bootstrap resamples, over patients.", min=0)]


_NEEDED = {"serve": ("prometheus_client", "fastapi", "mcp", "ray")}
"""{extra: packages that are imported later, by other processes}."""


def job(name: str) -> Any:
    """Import a module of jobs/, whose packages may not be installed."""
    return _imported(f"jobs.{name}", extra="ray")


def service(name: str, *, extra: Literal["viewer", "mcp", "serve"]) -> Any:
    """Import a module of serve/, whose packages may not be installed.

    Args:
        name: The module.
        extra: Packages of pathflip that the command as a whole needs.
    """
    return _imported(f"serve.{name}", extra=extra)


def _imported(module: str, *, extra: str) -> Any:
    import importlib
    from importlib.util import find_spec

    try:
        for package in _NEEDED.get(extra, ()):
            if find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        hint = f"Install it: pip install 'pathflip[{extra}]'."
        raise ConfigError(
            f"This command needs {missing}, which is not installed here.", hint=hint
        ) from error


def torch_device(device: str | None) -> str:
    """Return a ``--device`` as torch names it; None means auto.

    Raises:
        EncoderError: There is no such device (``no_gpu``).
    """
    from pathflip.encoders.neural import pick_device

    return str(pick_device(device or "auto"))


def open_run(run: str, *, device: str | None) -> Any:
    """Open a run, its model on a device; see :func:`pathflip.checkpoints.load_run`."""
    from pathflip.checkpoints import load_run

    return load_run(run, device=torch_device(device))


def open_patch_reader(
    run: str, *, device: str | None, pixels: bool = True, encoder: str | None = None
) -> Any:
    """Open a run of MR-PLIP; see :func:`pathflip.evaluation.patch_text.patch_reader`."""
    from pathflip.checkpoints import load_run
    from pathflip.evaluation.patch_text import patch_reader

    found = load_run(run, device=torch_device(device), family="mrplip")
    return patch_reader(found, pixels=pixels, encoder=encoder)


def open_slide_qa(run: str, *, llm: str | None, device: str | None) -> Any:
    """Open a tuned run; see :meth:`pathflip.slide_qa.SlideQA.from_run`."""
    from pathflip.slide_qa import SlideQA

    where = torch_device(device)
    gpu_only = ("triton",) if where == "cpu" else ()
    with absent("sklearn", "scipy", "boto3", *gpu_only):
        return SlideQA.from_run(run, llm=llm, device=where)


def engine(address: str | None, local: bool | None) -> str | None:
    """Return where a job runs, as ``jobs.cluster.connect`` takes it.

    Raises:
        ConfigError: A cluster is named, and ``--local``.
    """
    if local is None or (address and not local):
        return address
    if address:
        raise ConfigError(
            f"--local is this machine, and --address {address} is a cluster.",
            hint="Leave one of them out.",
        )
    if local:
        return "local"
    return None if os.environ.get("RAY_ADDRESS") else "ray"


@contextmanager
def working() -> Iterator[Report]:
    """Yield the callback for progress; stdout belongs to the document until the work is done.

    Ray tells of lost nodes and the like on stdout: that goes to stderr meanwhile.
    """
    with redirect_stdout(sys.stderr), show_progress() as progress:
        yield progress


def show_result(result: Any, title: str, *, as_json: bool, dry_run: bool) -> None:
    """Print the result of a job that says in its document whether it was a dry run."""
    document = result.as_json() | ({"dry_run": True} if dry_run else {})
    show_document(document, title, as_json=as_json, dry_run=dry_run)


def were_set(**flags: Any) -> dict[str, Any]:
    """Return the flags that were given; the others leave a setting to files and defaults."""
    return {name: value for name, value in flags.items() if value is not None}


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    print(json.dumps(document, default=str, allow_nan=False))


def show_document(
    document: dict[str, Any], title: str = "", *, as_json: bool, dry_run: bool = False
) -> None:
    """Print a document as JSON, or as a table of its names and values for people.

    Args:
        document: Result of a command.
        title: Title of the table.
        as_json: Print JSON.
        dry_run: Say in the title that nothing was written.
    """
    if as_json:
        print_json(document)
        return
    title = "dry run: nothing was written" if dry_run else title
    show_table(title, ("what", "value"), list(flat(document)))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for column in columns:
        numeric = bool(rows) and all(
            isinstance(row[columns.index(column)], int | float | None) for row in rows
        )
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):  # of names: --json has all of them
        shown = ", ".join(map(str, value[:_SHOWN]))
        value = shown if len(value) <= _SHOWN else f"{len(value):,}: {shown} …"
    return escape(str(value))


def flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return a nested document as (dotted name, value) rows."""
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
