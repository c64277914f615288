"""Commands that make models, and index an archive with one: pretrain, tune, make-llm, index."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pathflip.cli.options import (
    AddressOption,
    ArchiveOption,
    ConfigOption,
    JsonOption,
    LocalOption,
    OverrideOption,
    engine,
    job,
    show_document,
    show_result,
    were_set,
    working,
)
from pathflip.progress import Report, show_progress

app = typer.Typer()

MinWorkersOption = Annotated[
    int | None, typer.Option(help="Fewest workers to go on with when some are lost.", min=1)
]
MaxWorkersOption = Annotated[
    int | None, typer.Option(help="Most workers; default: one per GPU, or one.", min=1)
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan and count; write nothing.")]


@app.command()
def pretrain(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option("--run", help="Run folder: checkpoints, metrics, model.")],
    preset: Annotated[
        str | None,
        typer.Option(help="What to start from: pathflip/… for slides, mrplip/… for patch trees."),
    ] = None,
    min_workers: MinWorkersOption = None,
    max_workers: MaxWorkersOption = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train on slides, or patch trees, and captions; the same command again continues."""
    module = job("pretrain")
    settings = module.resolve(
        preset,
        file=config,
        overrides=overrides or (),
        given=were_set(min_workers=min_workers, max_workers=max_workers),
    )
    if dry_run:
        show_document(module.plan(archive, run, settings), as_json=as_json, dry_run=True)
        return
    _train(
        lambda progress: module.pretrain(
            archive, run, settings, address=engine(address, local), progress=progress
        ),
        f"trained in {run}",
        as_json=as_json,
    )


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
    min_workers: MinWorkersOption = None,
    max_workers: MaxWorkersOption = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune a language model to caption slides and answer; the same command again continues."""
    module = job("tune")
    settings = module.resolve(
        preset,
        file=config,
        overrides=overrides or (),
        given=were_set(run=run, llm=llm, min_workers=min_workers, max_workers=max_workers),
    )
    if dry_run:
        show_document(module.plan(archive, out, settings), as_json=as_json, dry_run=True)
        return
    _train(
        lambda progress: module.tune(
            archive, out, settings, address=engine(address, local), progress=progress
        ),
        f"tuned in {out}",
        as_json=as_json,
    )


def _train(train: Callable[[Report], dict[str, Any]], title: str, *, as_json: bool) -> None:
    with working() as progress:
        document = train(progress)
    if not document["trained"]:
        print(f"{document['run']} is finished: nothing to do.", file=sys.stderr)
    if document.get("collapsed"):
        from pathflip.training.multiresolution import sentence

        print(sentence(document["collapsed"], document["val"]), file=sys.stderr)
    show_document(document, title, as_json=as_json)


@app.command("make-llm")
def make_llm(
    out: Annotated[str, typer.Argument(help="Folder to write the model to.", metavar="OUT")],
    archive: ArchiveOption,
    run: Annotated[
        str | None, typer.Option("--run", help="Pretrained run whose slide model it will read.")
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
    with show_progress() as progress:
        document |= small_llm.make(
            texts, out, settings, questions=asked, vision=vision, progress=progress,
            dry_run=dry_run,
        )  # fmt: skip
    if dry_run:
        document |= {"settings": asdict(settings)}
    elif not document["made"]:
        print(f"{out} is made of these already: nothing to do.", file=sys.stderr)
    show_document(document, f"made {out}", as_json=as_json, dry_run=dry_run)


@app.command()
def index(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option(help="Run of pathflip pretrain.")],
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count slides; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute a model's vectors of the slides and regions that do not have them yet."""
    from pathflip.config import load_config

    module = job("index")
    settings = load_config(module.IndexConfig, file=config, overrides=overrides or ())
    with working() as progress:
        result = module.index(
            archive,
            run,
            config=settings,
            address=engine(address, local),
            progress=progress,
            dry_run=dry_run,
        )
    show_result(result, f"indexed {archive}", as_json=as_json, dry_run=dry_run)
