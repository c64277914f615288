"""Commands of patch trees: the job that makes them, their pictures, a page of one."""

from __future__ import annotations

from typing import Annotated

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
    print_json,
    show_document,
    show_result,
    were_set,
    working,
)
from pathflip.errors import ConfigError

app = typer.Typer()
trees_app = typer.Typer(help="Patch trees of MR-PLIP: make them, show them, give them texts.")
app.add_typer(trees_app, name="trees")


@trees_app.callback(invoke_without_command=True)
def trees(
    context: typer.Context,
    archive: Annotated[
        str | None, typer.Option("--archive", help="Archive: a folder, or s3://, gs://, az://.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Patch encoder, or several with commas (docs/reference/encoders.md)."),
    ] = None,
    retry: Annotated[
        bool | None, typer.Option("--retry/--no-retry", help="Try quarantined trees again.")
    ] = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read, with bytes and hours.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make patch trees (5x, 10x, 20x, 40x); the same command again does only what is missing."""
    if context.invoked_subcommand is not None:
        if archive is not None:
            raise ConfigError(
                "--archive stands before a subcommand of trees.", hint="Put it behind."
            )
        return
    if archive is None:
        raise ConfigError("No archive was named.", hint="Give --archive.")
    from pathflip.config import load_config

    module = job("trees")
    settings = load_config(
        module.TreesConfig,
        file=config,
        overrides=overrides or (),
        given=were_set(encoder=encoder, retry=retry),
    )
    with working() as progress:
        result = module.trees(
            archive, settings, address=engine(address, local), progress=progress, dry_run=dry_run
        )
    show_result(result, f"trees in {archive}", as_json=as_json, dry_run=dry_run)
    if not dry_run:
        raise typer.Exit(result.exit_code)


@trees_app.command()
def export(
    directory: Annotated[str, typer.Argument(help="Folder for the pictures.")],
    archive: ArchiveOption,
    slide: Annotated[
        list[str] | None, typer.Option(help="Only trees of this slide; may be given again.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write every node as a PNG, named so that captions of any program find their way back."""
    from pathflip import Archive
    from pathflip.interop.tree_images import export_tree_images

    with working() as progress:
        result = export_tree_images(
            Archive(archive), directory, slides=slide or (), progress=progress
        )
    show_document(result.as_json(), f"pictures in {directory}", as_json=as_json)
    raise typer.Exit(result.exit_code)


@trees_app.command()
def show(
    archive: ArchiveOption,
    out: Annotated[str, typer.Option("--out", help="HTML page to write.", metavar="FILE")],
    tree: Annotated[
        str | None, typer.Argument(help="SLIDE_ID/TX_TY; default: the first one with texts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a page with the pyramid of one tree and its texts."""
    from pathflip import Archive
    from pathflip.report.trees import write_tree_page

    shown = write_tree_page(Archive(archive), out, tree_id=tree)
    if as_json:
        print_json({"tree": shown, "page": out})
    else:
        print(f"{shown}: {out}")


@trees_app.command()
def keywords(
    archive: ArchiveOption,
    terms: Annotated[
        str | None, typer.Option(help="Text file of your own terms; default: those of before.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Only captions of this source; default: all.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cut keywords from the stored captions again, as after a change of terms or rules."""
    from dataclasses import asdict

    from pathflip import Archive
    from pathflip.archive.commit import Committer
    from pathflip.archive.tree_texts import chosen_sources, planned_tree_texts, redo_keywords
    from pathflip.keywords import load_lexicon

    lexicon = None if terms is None else load_lexicon(terms)
    if dry_run:
        opened = Archive(archive)
        counts = {
            name: planned_tree_texts(opened, {}, source=name, lexicon=lexicon)
            for name in chosen_sources(opened, source)
        }
    else:
        with Committer(archive) as committer:
            counts = redo_keywords(committer, source=source, lexicon=lexicon)
    document = {name: asdict(one) for name, one in counts.items()}
    if as_json and dry_run:
        print_json({"sources": document, "dry_run": True})
        return
    shown = {"sources": document} if as_json else document
    show_document(shown, f"keywords in {archive}", as_json=as_json, dry_run=dry_run)


@trees_app.command()
def caption(
    archive: ArchiveOption,
    vlm: Annotated[
        str, typer.Option(help="Vision-language model (LLaVA, BLIP-2): a folder, or owner/name.")
    ],
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; default: auto.", show_default=False)
    ] = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count nodes and estimate hours; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Caption all nodes of trees with vLLM; the same command again does only what is missing."""
    from pathflip.config import load_config

    module = job("describe")
    settings = load_config(
        module.DescribeConfig,
        file=config,
        overrides=overrides or (),
        given=were_set(engine=None if device is None else {"device": device}),
    )
    with working() as progress:
        result = module.describe(
            archive,
            vlm,
            config=settings,
            address=engine(address, local),
            progress=progress,
            dry_run=dry_run,
        )
    show_result(result, f"captions in {archive}", as_json=as_json, dry_run=dry_run)
    if not dry_run:
        raise typer.Exit(result.exit_code)
