"""Making a small language model where none can be had."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pathflip.cli.options import (
    ArchiveOption,
    ConfigOption,
    JsonOption,
    OverrideOption,
    job,
    show_document,
)

app = typer.Typer()


@app.command("make-llm")
def make_llm(
    out: Annotated[str, typer.Argument(help="Folder to write the model to.", metavar="OUT")],
    archive: ArchiveOption,
    run: Annotated[
        str | None, typer.Option("--run", help="Run of pathflip pretrain it is going to read.")
    ] = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count texts and questions; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small Qwen3 from scratch on the training slides' captions and questions."""
    from dataclasses import asdict

    from pathflip.archive import Archive
    from pathflip.checkpoints import load_run
    from pathflip.config import load_config
    from pathflip.models import small_llm

    settings = load_config(small_llm.SmallLLMConfig, file=config, overrides=overrides or ())
    texts, asked = small_llm.gather(Archive(archive))
    vision = None if run is None else load_run(run).model
    document: dict[str, Any] = {"out": out}
    if dry_run:
        document |= {"texts": len(texts), "questions": sum(map(len, asked))}
        document |= {"settings": asdict(settings)}
    else:
        with job("progress").show_progress() as progress:
            document |= small_llm.make(
                texts, out, settings, questions=asked, vision=vision, progress=progress
            )
        if not document["made"]:
            print(f"{out} is made of these already: nothing to do.", file=sys.stderr)
    show_document(document, f"made {out}", as_json=as_json, dry_run=dry_run)
