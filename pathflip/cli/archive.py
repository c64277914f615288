"""Commands that make an archive and look after it: ingest, synth, demo, slides, archive."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

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
    show_table,
    were_set,
    working,
)
from pathflip.cli.process import open_archive

app = typer.Typer()
CHECK_TIMEOUT_S = 300.0
"""Deadline for opening one slide."""

slides_app = typer.Typer(help="The slides of an archive.", no_args_is_help=True)
archive_app = typer.Typer(help="Look after an archive.", no_args_is_help=True)
app.add_typer(slides_app, name="slides")
app.add_typer(archive_app, name="archive")

# -- making archives ------------------------------------------------------------------------------


@app.command()
def ingest(
    sources: Annotated[
        list[str], typer.Argument(help="Slide files, folders, s3://… prefixes.", metavar="SRC…")
    ],
    archive: ArchiveOption,
    encoder: Annotated[
        str | None,
        typer.Option(help="Patch encoder, or several with commas (docs/reference/encoders.md)."),
    ] = None,
    mpp_csv: Annotated[
        str | None, typer.Option(help="CSV slide,mpp where metadata is missing or wrong.")
    ] = None,
    patients: Annotated[
        str | None, typer.Option(help="CSV slide,patient_id[,split][,labels…].")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Reports: CSV slide,caption, or SlideInstruction JSON.")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Questions about slides: CSV or JSON (docs/reference/data-model.md)."),
    ] = None,
    tissue: Annotated[
        str | None,
        typer.Option(help="Folder of your own tissue outlines, <slide>.geojson or .xml."),
    ] = None,
    add_encoder: Annotated[
        bool | None,
        typer.Option(
            "--add-encoder/--no-add-encoder", help="Embed with a further encoder beside the first."
        ),
    ] = None,
    retry: Annotated[
        bool | None, typer.Option("--retry/--no-retry", help="Try quarantined slides again.")
    ] = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and estimate; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tile, embed and archive slides; the same command again does only what is missing."""
    from pathflip.config import load_config

    jobs_ingest = job("ingest")
    settings = load_config(
        jobs_ingest.IngestConfig,
        file=config,
        overrides=overrides or (),
        given=were_set(
            encoder=encoder, mpp_csv=mpp_csv, patients=patients, captions=captions,
            questions=questions, tissue_dir=tissue, add_encoder=add_encoder, retry=retry,
        ),
    )  # fmt: skip
    run = jobs_ingest.dry_run if dry_run else jobs_ingest.ingest
    with working() as progress:
        result = run(sources, archive, settings, address=engine(address, local), progress=progress)
    title = f"ingested into {archive}"
    show_document(result.as_json(), title, as_json=as_json, dry_run=dry_run)
    if dry_run:
        return
    if result.slides["quarantined"] and not as_json:
        print(f"Reasons: pathflip slides list --archive {archive} --status quarantined")
    raise typer.Exit(result.exit_code)


@app.command()
def demo(
    directory: Annotated[str, typer.Argument(help="Where the demo writes.")] = "demo",
    slides: Annotated[
        str | None, typer.Option(help="Folder of your own slides; default: slides it makes.")
    ] = None,
) -> None:
    """Run everything from ingest to answers on generated slides or your own; write a report."""
    arguments = ["--out", directory, *(["--slides", slides] if slides else [])]
    raise typer.Exit(job("demo").main(arguments))


@app.command()
def synth(
    directory: Annotated[str, typer.Argument(help="Where the cohort is written.")],
    slides: Annotated[int, typer.Option(help="How many slides.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    kind: Annotated[
        Literal["reports", "trees"],
        typer.Option(help="Slides with reports, or slides for patch trees with node captions."),
    ] = "reports",
    mention: Annotated[
        float | None,
        typer.Option(
            help="With trees: share of captions that name what is seen; default 0.2.",
            min=0,
            max=1,
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Default: one per CPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a cohort of synthetic slides with planted truth: captions, labels, lesion outlines."""
    from dataclasses import asdict

    from pathflip.errors import ConfigError
    from pathflip.synth import make_cohort, make_tree_cohort

    if mention is not None and kind != "trees":
        raise ConfigError("--mention is of captions of patch trees.", hint="Add --kind trees.")
    if dry_run:
        plan = {"directory": directory, "kind": kind, "slides": slides, "seed": seed, "written": 0}
        show_document(plan, as_json=as_json, dry_run=True)
        return
    if kind == "trees":
        document = asdict(
            make_tree_cohort(
                directory,
                slides=slides,
                seed=seed,
                processes=processes,
                **were_set(mention=mention),
            )
        )
    else:
        document = asdict(make_cohort(directory, slides=slides, seed=seed, processes=processes))
    show_document(document, f"cohort in {directory}", as_json=as_json)


# -- slides ---------------------------------------------------------------------------------------

SLIDE_COLUMNS = (
    "slide_id", "uri", "status", "reason", "message", "mpp", "mpp_source", "width", "height",
    "n_regions", "n_patches", "tiles_bad", "sha256",
)  # fmt: skip


@slides_app.command("list")
def slides_list(
    archive: ArchiveOption,
    status: Annotated[
        Literal["ready", "empty", "quarantined"] | None,
        typer.Option(help="Only slides of this status."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List slides with their status and, where quarantined, why."""
    rows = open_archive(archive).slides(status=status, columns=SLIDE_COLUMNS).to_pylist()
    if as_json:
        print_json(rows)
        return
    shown = ("slide_id", "status", "reason", "mpp", "n_regions", "n_patches", "tiles_bad")
    show_table("", shown, [[row[key] for key in shown] for row in rows])
    for row in rows:
        if row["status"] == "quarantined":
            print(f"{row['slide_id']}: {row['message']}")


@slides_app.command("check")
def slides_check(
    sources: Annotated[
        list[str], typer.Argument(help="Slide files, folders, s3://… prefixes.", metavar="SRC…")
    ],
    mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, where the files are wrong.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open slides and say whether their structure can be trusted; exit 3 if one cannot.

    Each is opened in a process of its own, as ingest does it; no tissue is looked for.
    """
    from pathflip.errors import SlideError
    from pathflip.slides.reader import SlideReader
    from pathflip.slides.sources import discover
    from pathflip.slides.staging import Stage

    stage = Stage()
    rows: list[dict[str, Any]] = []
    with SlideReader(patches=1, px=16) as reader:
        for source in discover(sources):
            try:
                with stage.open(source) as staged:
                    about = reader.check(str(staged.path), mpp=mpp, timeout_s=CHECK_TIMEOUT_S)
                rows.append({"slide": source.uri, "reason": None, **about})
            except SlideError as error:
                rows.append({"slide": source.uri, "reason": error.code, "message": str(error)})
    if as_json:
        print_json(rows)
    else:
        shown = ("slide", "reason", "vendor", "width", "height", "levels", "mpp", "reader")
        show_table("", shown, [[row.get(key) for key in shown] for row in rows])
        for row in rows:
            if said := row.get("message") or row["reader_note"]:
                print(f"{row['slide']}: {said}")
    raise typer.Exit(3 if any(row["reason"] for row in rows) else 0)


@slides_app.command("split")
def slides_split(
    path: Annotated[str, typer.Argument(help="TIFF file that holds several images.")],
    out: Annotated[str, typer.Option(help="Folder to write into.")],
    image: Annotated[
        list[int] | None, typer.Option(help="Numbers of images, from 0; default: all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write each image of a file (scenes, planes) to a file of its own; pixels are copied."""
    from dataclasses import asdict

    from pathflip.slides.split import list_images, split_images

    if dry_run:
        wanted = [one for one in list_images(path) if not image or one.number in image]
        written: list[tuple[Any, Any]] = [(one, None) for one in wanted]
    else:
        written = [*split_images(path, out, images=image or ())]
    rows = [
        {"image": one.number, **asdict(one), "file": file and str(file)} for one, file in written
    ]
    if as_json:
        print_json(rows)
        return
    shown = ("image", "width", "height", "levels", "mpp", "file")
    title = "dry run: nothing was written" if dry_run else ""
    show_table(title, shown, [[row[key] for key in shown] for row in rows])


@slides_app.command("show")
def slides_show(
    slide: Annotated[str, typer.Argument(help="Slide id, or its file name where unique.")],
    archive: ArchiveOption,
    as_json: JsonOption = False,
) -> None:
    """Show everything the archive knows about one slide."""
    row = open_archive(archive).slide(slide)
    for image in ("tissue_png", "thumbnail"):
        row[image] = None if row[image] is None else f"{len(row[image])} bytes"
    if as_json:
        print_json(row)
    else:
        show_table("", ("what", "value"), list(row.items()))


@slides_app.command("retry")
def slides_retry(
    archive: ArchiveOption,
    names: Annotated[
        list[str] | None, typer.Argument(help="Slides; default: all quarantined ones.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Only those with this reason.")] = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and estimate; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ingest quarantined slides again, as the archive was made."""
    from pathflip import Archive
    from pathflip.config import load_config
    from pathflip.geometry import Tiling
    from pathflip.slides.sources import is_there

    jobs_ingest = job("ingest")
    opened = Archive(archive)
    rows = opened.slides(status="quarantined").to_pylist()
    wanted = {opened.resolve(name) for name in names or ()}
    chosen = [
        row
        for row in rows
        if (not wanted or row["slide_id"] in wanted) and reason in (None, row["reason"])
    ]
    gone = [row["uri"] for row in chosen if not is_there(row["uri"])]
    sources = [row["uri"] for row in chosen if row["uri"] not in gone]
    for uri in gone:
        print(f"{uri} is no longer there; its row stays.", file=sys.stderr)
    settings = load_config(
        jobs_ingest.IngestConfig,
        base=jobs_ingest.IngestConfig(
            encoder=",".join(opened.encoders()), tiling=Tiling(**opened.tiling())
        ),
        given={"retry": True},
        file=config,
        overrides=overrides or (),
    )
    if not sources:
        document: dict[str, Any] = {"slides": {"ready": 0, "quarantined": 0}, "retried": 0}
        print_json(document) if as_json else print("Nothing to retry.")
        return
    run = jobs_ingest.dry_run if dry_run else jobs_ingest.ingest
    with working() as progress:
        result = run(sources, archive, settings, address=engine(address, local), progress=progress)
    document = result.as_json() | {"retried": len(sources)}
    show_document(document, as_json=as_json, dry_run=dry_run)
    if not dry_run:
        raise typer.Exit(result.exit_code)


# -- the archive ----------------------------------------------------------------------------------


@archive_app.command("stats")
def archive_stats(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Count what the archive holds."""
    document = open_archive(archive).stats()
    show_document(document, as_json=as_json)


@archive_app.command("verify")
def archive_verify(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Check every file and every row; exit 1 and name what is damaged."""
    from dataclasses import asdict

    from pathflip.archive.verify import verify

    report = verify(archive)
    if as_json:
        print_json(asdict(report) | {"ok": not report.damaged})
    else:
        for damage in report.damaged:
            print(f"{damage.table} {damage.kind} {damage.id}: {damage.detail}")
        print(
            f"{len(report.damaged)} damaged of {report.rows:,} rows in {report.files:,} files "
            f"({report.bytes / 2**20:,.1f} MiB, {report.seconds:.1f} s)."
        )
        if report.damaged:
            print(f"Mend it: pathflip archive repair --archive {archive}")
    raise typer.Exit(1 if report.damaged else 0)


@archive_app.command("repair")
def archive_repair(
    archive: ArchiveOption,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is damaged; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Restore damaged tables and clear damaged slides so that ingest makes them again."""
    from dataclasses import asdict

    from pathflip.archive.repair import repair
    from pathflip.archive.verify import verify

    if dry_run:
        report = verify(archive)
        show_document(
            {
                "damaged": [f"{one.table} {one.kind} {one.id}" for one in report.damaged],
                "redo": report.slides,
                "reindex": report.reindex,
                "dry_run": True,
            },
            as_json=as_json,
            dry_run=True,
        )
        return
    document = asdict(repair(archive))
    show_document(document, "repaired", as_json=as_json)


@archive_app.command("maintain")
def archive_maintain(
    archive: ArchiveOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge small files, refresh indexes, remove versions older than a day."""
    from pathflip.archive.maintain import maintain, plan_maintenance

    document = plan_maintenance(archive) | {"dry_run": True} if dry_run else maintain(archive)
    show_document(document, "maintained", as_json=as_json, dry_run=dry_run)


@app.command()
def doctor(
    archive: Annotated[str | None, typer.Option(help="Look at this archive too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that this machine can run pathflip, and say how to mend what cannot."""
    from dataclasses import asdict

    from pathflip.doctor import examine

    checks = examine(archive)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [[check.name, check.status.upper(), check.detail, check.fix] for check in checks]
        show_table("", ("check", "status", "found", "what to do"), rows)
    raise typer.Exit(1 if failed else 0)
