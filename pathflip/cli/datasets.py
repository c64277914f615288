"""Commands for public data sets: their cards, checks of a copy, and files for the importers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pathflip.cli.options import JsonOption, print_json, show_document, show_table, working

app = typer.Typer()
datasets_app = typer.Typer(
    help="Public data sets: where they are, whether a copy is whole, what they measure.",
    no_args_is_help=True,
)
app.add_typer(datasets_app, name="datasets")

NameArgument = Annotated[str, typer.Argument(help="Name of a card; see pathflip datasets list.")]
FolderArgument = Annotated[str, typer.Argument(help="Folder of the copy.", metavar="DIR")]


@datasets_app.command("list")
def datasets_list(as_json: JsonOption = False) -> None:
    """List the data sets that pathflip has a card of."""
    from pathflip.datasets.cards import cards

    rows = [
        {
            "name": card.name,
            "title": card.title,
            "about": card.about,
            "access": sorted({place.access for place in card.get}),
            "licence": card.licence,
        }
        for card in cards()
    ]
    if as_json:
        print_json({"datasets": rows})
        return
    shown = ("name", "title", "access", "about")
    show_table("", shown, [[row[key] for key in shown] for row in rows])


@datasets_app.command("show")
def datasets_show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show a card: places, licence, files, the steps into an archive, what it measures."""
    from pathflip.datasets.cards import read_card

    card = read_card(name)
    if as_json:
        print_json(card.as_json())
        return
    print(f"{card.title}\n{card.about}\n\nLicence: {card.licence}")
    if card.papers:
        print(f"Papers: {', '.join(card.papers)}")
    show_table("from", ("what", "where", "access"), [[p.what, p.where, p.access] for p in card.get])
    show_table(
        "files",
        ("path", "holds", "files", "rows", "needed", "known from"),
        [
            [
                f.path,
                f.holds,
                f.files,
                f.rows or f.stated_rows,
                "" if f.optional else "yes",
                f.source,
            ]
            for f in card.files
        ],
    )
    for title, commands in (("into an archive", card.steps), ("measures", card.measures)):
        if commands:
            print(f"\n{title}:")
        for command in commands:
            print(f"  # {command.what}\n  {command.run}")
    if card.unknown:
        print("\nnot verified:")
    for fact in card.unknown:
        print(f"  - {fact}")


@datasets_app.command("check")
def datasets_check(
    name: NameArgument,
    folder: FolderArgument,
    checksums: Annotated[
        str | None,
        typer.Option(
            help="Published digests: a GDC manifest, or lines of md5sum or sha256sum.",
            metavar="FILE",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a copy is whole; exit 1 if files, rows, columns or digests are wrong."""
    from pathflip.datasets.cards import read_card
    from pathflip.datasets.check import check

    document = check(read_card(name), folder, checksums=checksums)
    if as_json:
        print_json(document)
    else:
        rows = [
            [state["path"], state["files"], state["rows"], _verdict(state)]
            for state in document["files"]
        ]
        show_table(f"{name} in {document['folder']}", ("path", "files", "rows", ""), rows)
        for state in document["files"]:
            for problem in state["problems"]:
                print(f"{problem['code']}: {problem['message']}")
            for note in state["notes"]:
                print(f"note: {note}")
        print("whole" if document["whole"] else f"{document['problems']} problems")
    raise typer.Exit(0 if document["whole"] else 1)


def _verdict(state: dict[str, Any]) -> str:
    if state["problems"]:
        return ", ".join(sorted({problem["code"] for problem in state["problems"]}))
    return "ok"


@datasets_app.command("prepare")
def datasets_prepare(
    name: NameArgument,
    folder: FolderArgument,
    out: Annotated[str, typer.Option(help="Folder to write into.")],
    mpp: Annotated[
        float | None,
        typer.Option(
            help="Write its pictures as slides of this scale, µm per pixel.", min=0.05, max=10
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split of the set.")] = None,
    fold: Annotated[int, typer.Option(help="Fold whose parts are the splits.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make tables, tasks, outlines and slides for the importers of a set's own files."""
    from pathflip.datasets.cards import read_card
    from pathflip.datasets.prepare import prepare
    from pathflip.datasets.prepared import Options

    card = read_card(name)
    with working() as progress:
        document = prepare(
            card, folder, out, options=Options(mpp=mpp, split=split, fold=fold),
            dry_run=dry_run, progress=progress,
        )  # fmt: skip
    document |= {"dry_run": True} if dry_run else {}
    show_document(document, f"prepared in {out}", as_json=as_json, dry_run=dry_run)
