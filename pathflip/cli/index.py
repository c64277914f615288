"""The vectors of a trained model, so that text finds slides and regions."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from pathflip.cli.options import (
    AddressOption,
    ArchiveOption,
    ConfigOption,
    JsonOption,
    OverrideOption,
    job,
    show_document,
)

app = typer.Typer()


@app.command()
def index(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option(help="Run of pathflip pretrain.")],
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count; write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute a model's vectors of all slides and regions; again, only what is missing."""
    from pathflip.config import load_config

    jobs_index = job("index")
    settings = load_config(jobs_index.IndexConfig, file=config, overrides=overrides or ())
    # Ray tells of lost nodes and the like on stdout, which belongs to the document.
    with redirect_stdout(sys.stderr), job("progress").show_progress() as progress:
        result = jobs_index.index(
            archive, run, config=settings, address=address, progress=progress, dry_run=dry_run
        )
    document = result.as_json() | ({"dry_run": True} if dry_run else {})
    show_document(document, f"indexed {archive}", as_json=as_json, dry_run=dry_run)
