"""Training a model on an archive."""

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
def pretrain(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option("--run", help="Run folder: checkpoints, metrics, model.")],
    preset: Annotated[
        str | None,
        typer.Option(help="What to start from, e.g. pathflip/mini (docs/howto/pretrain.md)."),
    ] = None,
    min_workers: Annotated[
        int | None, typer.Option(help="Go on with as few workers as this.", min=1)
    ] = None,
    max_workers: Annotated[
        int | None, typer.Option(help="Workers; default: one a GPU, or one.", min=1)
    ] = None,
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and count; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on slides and captions; the same command again goes on where it stopped."""
    jobs_pretrain = job("pretrain")
    workers = {"min_workers": min_workers, "max_workers": max_workers}
    settings = jobs_pretrain.resolve(
        preset,
        file=config,
        overrides=overrides or (),
        given={key: value for key, value in workers.items() if value is not None},
    )
    if dry_run:
        document = jobs_pretrain.plan(archive, run, settings)
        show_document(document, as_json=as_json, dry_run=True)
        return
    # Ray tells of lost nodes and the like on stdout, which belongs to the document.
    with redirect_stdout(sys.stderr), job("progress").show_progress() as progress:
        document = jobs_pretrain.pretrain(
            archive, run, settings, address=address, progress=progress
        )
    if not document["trained"]:
        print(f"{document['run']} is finished: nothing to do.", file=sys.stderr)
    show_document(document, f"trained in {run}", as_json=as_json)
