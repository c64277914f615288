"""Tuning a model that answers about slides."""

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
def tune(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option("--run", help="Run of pathflip pretrain: the slide model.")],
    llm: Annotated[
        str, typer.Option("--llm", help="Language model: a folder, or owner/name on the hub.")
    ],
    out: Annotated[
        str, typer.Option("--out", help="Run folder: checkpoints, metrics, model, llm.")
    ],
    preset: Annotated[
        str | None,
        typer.Option(help="What to start from, e.g. instruct/mini (docs/howto/tune.md)."),
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
    """Tune a language model to caption slides and answer; the same command again goes on."""
    jobs_tune = job("tune")
    given = {"run": run, "llm": llm, "min_workers": min_workers, "max_workers": max_workers}
    settings = jobs_tune.resolve(
        preset,
        file=config,
        overrides=overrides or (),
        given={key: value for key, value in given.items() if value is not None},
    )
    if dry_run:
        document = jobs_tune.plan(archive, out, settings)
        show_document(document, as_json=as_json, dry_run=True)
        return
    # Ray tells of lost nodes and the like on stdout, which belongs to the document.
    with redirect_stdout(sys.stderr), job("progress").show_progress() as progress:
        document = jobs_tune.tune(archive, out, settings, address=address, progress=progress)
    if not document["trained"]:
        print(f"{document['run']} is finished: nothing to do.", file=sys.stderr)
    show_document(document, f"tuned in {out}", as_json=as_json)
