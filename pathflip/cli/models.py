"""Commands for weights: which are here, fetch them with their licences, verify a copy."""

from __future__ import annotations

from typing import Annotated

import typer

from pathflip.cli.options import JsonOption, print_json, show_table, working

app = typer.Typer()
models_app = typer.Typer(
    help="Weights of encoders, text towers and language models: list, pull, verify.",
    no_args_is_help=True,
)
app.add_typer(models_app, name="models")

FolderOption = Annotated[
    str | None,
    typer.Option(
        "--folder",
        help="Folder of weights; default: HF_HUB_CACHE, or the hub's own.",
        metavar="DIR",
    ),
]


@models_app.command("list")
def models_list(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """List the models that are known by name, and whatever weights are in the folder."""
    from pathflip import hub_cache, packaged
    from pathflip.encoders.zoo import CARDS

    where = hub_cache.folder_of(folder)
    there = hub_cache.held(where)
    names = {one.name for one in there}
    known = [
        {"name": card.name, "hub": card.hub, "licence": card.licence, "gated": card.gated,
         "here": card.name in names}
        for card in CARDS
    ]  # fmt: skip
    texts = [
        {"name": name, "title": one.title, "licence": one.licence, "package": one.package,
         "here": one.folder() is not None}
        for name, one in packaged.TEXT_MODELS.items()
    ]  # fmt: skip
    if as_json:
        held = hub_cache.as_json(there)
        print_json({"folder": str(where), "held": held, "encoders": known, "text_models": texts})
        return
    show_table(
        f"in {where}",
        ("name", "revision", "GB", "licence"),
        [[one.name, one.revision[:12], round(one.bytes / 1e9, 2), one.licence] for one in there],
    )
    show_table(
        "encoders by name",
        ("name", "hub", "licence", "gated", "here"),
        [
            [row["name"], row["hub"], row["licence"]]
            + ["yes" if row[key] else "" for key in ("gated", "here")]
            for row in known
        ],
    )
    show_table(
        "text models by name, from packages",
        ("name", "model", "licence", "package", "here"),
        [
            [
                row["name"],
                row["title"],
                row["licence"],
                row["package"],
                "yes" if row["here"] else "",
            ]
            for row in texts
        ],
    )


@models_app.command("pull")
def models_pull(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Encoders by name, or owner/name of the hub; @revision pins one.",
            metavar="NAME...",
        ),
    ],
    folder: FolderOption = None,
    accept_licences: Annotated[
        bool,
        typer.Option("--accept-licences", help="Accept their terms, which are shown without it."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look up sizes and licences; fetch nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch weights into one folder, which clusters without the hub can share or copy."""
    from pathflip import hub_cache

    where = hub_cache.folder_of(folder)
    wanted = [hub_cache.parse(name) for name in names]
    with working() as report:
        made = hub_cache.pull(wanted, where, accept=accept_licences, dry_run=dry_run, report=report)
    if as_json:
        print_json({"folder": str(where), "models": made} | ({"dry_run": True} if dry_run else {}))
        return
    show_table(
        f"{'would be ' if dry_run else ''}in {where}",
        ("name", "revision", "licence", "files", "GB", "GB to fetch" if dry_run else "GB fetched"),
        [
            [one["name"], one["revision"][:12], one["licence"], one["files"],
             round(one["bytes"] / 1e9, 2), round(one["fetched"] / 1e9, 2)]
            for one in made
        ],
    )  # fmt: skip
    if not dry_run:
        print(f"Use them without the hub: export HF_HUB_CACHE={where} HF_HUB_OFFLINE=1")


@models_app.command("verify")
def models_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models; default: all of the folder.", metavar="NAME..."),
    ] = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash every file of a copy against the digest the hub gave it; exit 1 if one is wrong."""
    from pathflip import hub_cache

    where = hub_cache.folder_of(folder)
    with working() as report:
        faults = hub_cache.verify(
            where, [hub_cache.parse(name) for name in names or ()], report=report
        )
    if as_json:
        print_json({"folder": str(where), "faults": hub_cache.as_json(faults)})
    else:
        for fault in faults:
            print(f"{fault.hub}: {fault.file} is {fault.code}")
        print(f"{len(faults)} files are wrong: pull again" if faults else "whole")
    raise typer.Exit(1 if faults else 0)
