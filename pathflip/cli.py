"""The command line. Every command imports what it needs when it runs: ``--help`` is instant.

Exit codes: 0 all good, 1 a fault or damage found, 2 wrong usage, 3 some slides were quarantined.
With ``--json`` a command prints one JSON document on stdout and nothing else there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Annotated, Any, Literal, NoReturn

import typer

from pathflip.errors import ArchiveError, ConfigError, EncoderError, PathFLIPError

app = typer.Typer(
    name="pathflip",
    help="Whole-slide images and reports: ingest, search, train, answer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
slides_app = typer.Typer(help="The slides of an archive.", no_args_is_help=True)
archive_app = typer.Typer(help="Look after an archive.", no_args_is_help=True)
app.add_typer(slides_app, name="slides")
app.add_typer(archive_app, name="archive")

_FATAL_ARCHIVE_CODES = ("damaged", "disk_full", "io", "commit", "missing_table")

ArchiveOption = Annotated[
    str, typer.Option("--archive", help="Archive: a folder, or s3://, gs://, az://.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="YAML file of settings.", metavar="FILE")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("-o", "--set", help="One setting, e.g. -o tiling.mpp=0.25.", metavar="KEY=VALUE"),
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster, e.g. auto or ray://head:10001; default: this machine."),
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(arguments, prog_name="pathflip")
    except PathFLIPError as error:
        if "--json" in arguments:
            shown = {"code": error.code, "message": error.message, "hint": error.hint}
            print(json.dumps({"error": shown}))
        print(f"pathflip: {error}", file=sys.stderr)
        usage = isinstance(error, ConfigError | EncoderError) or (
            isinstance(error, ArchiveError) and error.code not in _FATAL_ARCHIVE_CODES
        )
        raise SystemExit(2 if usage else 1) from None
    except KeyboardInterrupt:
        print(
            "pathflip: interrupted; the same command continues where it stopped.", file=sys.stderr
        )
        raise SystemExit(130) from None
    raise SystemExit(0)


def _job(name: str) -> Any:
    """Import a module of jobs/, which is not part of the installed wheel."""
    import importlib

    try:
        return importlib.import_module(f"jobs.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "ray":
            hint = "Install it: pip install 'pathflip[ray]'."
        else:
            hint = "Run it from a checkout of pathflip or from its image."
        raise ConfigError(
            f"This command needs {missing}, which is not installed here.", hint=hint
        ) from error


def _print_json(document: Any) -> None:
    print(json.dumps(document, default=str, allow_nan=False))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
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
    return escape(str(value))


# -- making archives ------------------------------------------------------------------------------


@app.command()
def ingest(
    sources: Annotated[list[str], typer.Argument(help="Slide files and folders.", metavar="SRC…")],
    archive: ArchiveOption,
    encoder: Annotated[
        str | None, typer.Option(help="Patch encoder, or several with commas (docs/encoders.md).")
    ] = None,
    mpp_csv: Annotated[
        str | None, typer.Option(help="CSV slide,mpp where metadata is missing or wrong.")
    ] = None,
    patients: Annotated[
        str | None, typer.Option(help="CSV slide,patient_id[,split][,labels…].")
    ] = None,
    tissue: Annotated[
        str | None, typer.Option(help="Folder of your own <slide>.geojson tissue outlines.")
    ] = None,
    add_encoder: Annotated[
        bool, typer.Option("--add-encoder", help="Embed with a further encoder beside the first.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try quarantined slides again.")] = False,
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and estimate; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tile, embed and archive slides; the same command again does only what is missing."""
    jobs_ingest = _job("ingest")
    settings = _ingest_settings(
        jobs_ingest, encoder=encoder, mpp_csv=mpp_csv, patients=patients, tissue=tissue,
        add_encoder=add_encoder, retry=retry, config=config, overrides=overrides,
    )  # fmt: skip
    # Ray tells of lost nodes and the like on stdout, which belongs to the document.
    with redirect_stdout(sys.stderr), _job("progress").show_progress() as progress:
        if dry_run:
            plan = jobs_ingest.dry_run(
                sources, archive, settings, address=address, progress=progress
            )
        else:
            result = jobs_ingest.ingest(
                sources, archive, settings, address=address, progress=progress
            )
    if dry_run:
        document = plan.as_json()
        if as_json:
            _print_json(document)
        else:
            _table("dry run: nothing was written", ("what", "value"), list(_flat(document)))
        return
    document = result.as_json()
    if as_json:
        _print_json(document)
    else:
        _table(f"ingested into {archive}", ("what", "value"), list(_flat(document)))
        if result.slides["quarantined"]:
            print(f"Reasons: pathflip slides list --archive {archive} --status quarantined")
    raise typer.Exit(result.exit_code)


def _ingest_settings(
    jobs_ingest: Any,
    *,
    encoder: str | None,
    mpp_csv: str | None,
    patients: str | None,
    tissue: str | None,
    add_encoder: bool,
    retry: bool,
    config: str | None,
    overrides: list[str] | None,
) -> Any:
    from pathflip.config import load_config

    flags = {
        "encoder": encoder,
        "mpp_csv": mpp_csv,
        "patients": patients,
        "tissue_dir": tissue,
        "add_encoder": add_encoder or None,
        "retry": retry or None,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    return load_config(
        jobs_ingest.IngestConfig, given=given, file=config, overrides=overrides or ()
    )


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


@app.command()
def demo(
    directory: Annotated[str, typer.Argument(help="Where the demo writes.")] = "demo",
    slides: Annotated[
        str | None, typer.Option(help="Folder of your own slides; default: slides it makes.")
    ] = None,
) -> None:
    """Walk the whole path on generated slides or your own, and write a report."""
    arguments = ["--out", directory, *(["--slides", slides] if slides else [])]
    raise typer.Exit(_job("demo").main(arguments))


@app.command()
def synth(
    directory: Annotated[str, typer.Argument(help="Where the cohort is written.")],
    slides: Annotated[int, typer.Option(help="How many slides.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    processes: Annotated[int | None, typer.Option(help="Default: one per CPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a cohort of synthetic slides with planted truth: captions, labels, lesion outlines."""
    from dataclasses import asdict, is_dataclass

    from pathflip.synth import make_cohort

    if dry_run:
        plan = {"directory": directory, "slides": slides, "seed": seed, "written": 0}
        _print_json(plan) if as_json else _table("dry run", ("what", "value"), list(_flat(plan)))
        return
    summary = make_cohort(directory, slides=slides, seed=seed, processes=processes)
    document = asdict(summary) if is_dataclass(summary) else dict(summary)
    if as_json:
        _print_json(document)
    else:
        _table(f"cohort in {directory}", ("what", "value"), list(_flat(document)))


# -- slides ---------------------------------------------------------------------------------------

SLIDE_COLUMNS = (
    "slide_id", "uri", "status", "reason", "message", "mpp", "mpp_source", "width", "height",
    "n_regions", "n_patches", "tiles_bad", "sha256",
)  # fmt: skip


@slides_app.command("list")
def slides_list(
    archive: ArchiveOption,
    status: Annotated[
        Literal["ready", "empty", "quarantined"] | None, typer.Option(help="Only these.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List slides with their status and, where quarantined, why."""
    from pathflip import Archive

    rows = Archive(archive).slides(status=status, columns=SLIDE_COLUMNS).to_pylist()
    if as_json:
        _print_json(rows)
        return
    shown = ("slide_id", "status", "reason", "mpp", "n_regions", "n_patches", "tiles_bad")
    _table("", shown, [[row[key] for key in shown] for row in rows])
    for row in rows:
        if row["status"] == "quarantined":
            print(f"{row['slide_id']}: {row['message']}")


@slides_app.command("show")
def slides_show(
    slide: Annotated[str, typer.Argument(help="Slide id, or its file name where unique.")],
    archive: ArchiveOption,
    as_json: JsonOption = False,
) -> None:
    """Everything the archive knows about one slide."""
    from pathflip import Archive

    row = Archive(archive).slide(slide)
    for image in ("tissue_png", "thumbnail"):
        row[image] = None if row[image] is None else f"{len(row[image])} bytes"
    if as_json:
        _print_json(row)
    else:
        _table("", ("what", "value"), list(row.items()))


@slides_app.command("retry")
def slides_retry(
    archive: ArchiveOption,
    names: Annotated[
        list[str] | None, typer.Argument(help="Slides; default: all quarantined ones.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Only those with this reason.")] = None,
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ingest quarantined slides again, as the archive was made."""
    import os

    from pathflip import Archive
    from pathflip.config import load_config

    jobs_ingest = _job("ingest")
    opened = Archive(archive)
    rows = opened.slides(status="quarantined").to_pylist()
    wanted = {opened.resolve(name) for name in names or ()}
    chosen = [
        row
        for row in rows
        if (not wanted or row["slide_id"] in wanted) and reason in (None, row["reason"])
    ]
    gone = [row["uri"] for row in chosen if not os.path.lexists(row["uri"])]
    sources = [row["uri"] for row in chosen if row["uri"] not in gone]
    for uri in gone:
        print(f"{uri} is no longer there; its row stays.", file=sys.stderr)
    made = [f"encoder={','.join(opened.encoders())}"]
    made += [f"tiling.{key}={value}" for key, value in opened.tiling().items()]
    settings = load_config(
        jobs_ingest.IngestConfig,
        given={"retry": True},
        file=config,
        overrides=[*made, *(overrides or ())],
    )
    if not sources:
        document: dict[str, Any] = {"slides": {"ready": 0, "quarantined": 0}, "retried": 0}
        _print_json(document) if as_json else print("Nothing to retry.")
        return
    # Ray tells of lost nodes and the like on stdout, which belongs to the document.
    with redirect_stdout(sys.stderr), _job("progress").show_progress() as progress:
        result = jobs_ingest.ingest(sources, archive, settings, address=address, progress=progress)
    document = result.as_json() | {"retried": len(sources)}
    if as_json:
        _print_json(document)
    else:
        _table("", ("what", "value"), list(_flat(document)))
    raise typer.Exit(result.exit_code)


# -- the archive ----------------------------------------------------------------------------------


@archive_app.command("stats")
def archive_stats(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Count what the archive holds."""
    from pathflip import Archive

    document = Archive(archive).stats()
    if as_json:
        _print_json(document)
    else:
        _table("", ("what", "value"), list(_flat(document)))


@archive_app.command("verify")
def archive_verify(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Check every file and every row; exit 1 and name what is damaged."""
    from dataclasses import asdict

    from pathflip.archive.health import verify

    report = verify(archive)
    if as_json:
        _print_json(asdict(report) | {"ok": not report.damaged})
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
def archive_repair(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Restore damaged tables and clear damaged slides so that ingest makes them again."""
    from dataclasses import asdict

    from pathflip.archive.health import repair

    document = asdict(repair(archive))
    if as_json:
        _print_json(document)
    else:
        _table("repaired", ("what", "value"), list(_flat(document)))


@archive_app.command("maintain")
def archive_maintain(archive: ArchiveOption, as_json: JsonOption = False) -> None:
    """Merge small files, refresh indexes, remove versions older than a day."""
    from pathflip.archive.health import maintain

    document = maintain(archive)
    if as_json:
        _print_json(document)
    else:
        _table("maintained", ("what", "value"), list(_flat(document)))


@archive_app.command("export")
def archive_export(
    archive: ArchiveOption,
    out: Annotated[str, typer.Option(help="Folder to write into.")],
    qupath: Annotated[
        bool, typer.Option("--qupath", help="QuPath GeoJSON: tissue and regions, a file a slide.")
    ] = False,
    slide: Annotated[list[str] | None, typer.Option(help="Only these slides (QuPath).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export to Parquet, or to QuPath GeoJSON with --qupath."""
    from pathflip import Archive
    from pathflip.archive.export import export_parquet
    from pathflip.interop.qupath import export_archive

    opened = Archive(archive)
    if dry_run:
        names = [opened.resolve(name) for name in slide or ()] or sorted(opened.ready_ids())
        plan = {"out": out, "slides": len(names), "tables": [] if qupath else opened.tables()}
        _print_json(plan) if as_json else _table("dry run", ("what", "value"), list(_flat(plan)))
        return
    if qupath:
        paths = export_archive(opened, out, slides=slide)
        document: dict[str, Any] = {"out": out, "files": [str(path) for path in paths]}
    else:
        document = {"out": out, "rows": export_parquet(opened, out)}
    if as_json:
        _print_json(document)
    else:
        _table("exported", ("what", "value"), list(_flat(document)))


# -- search ---------------------------------------------------------------------------------------


@app.command()
def search(
    archive: ArchiveOption,
    image: Annotated[
        str | None,
        typer.Option(help="Slide or picture, or a box of it.", metavar="FILE[#x,y,w,h]"),
    ] = None,
    slide: Annotated[str | None, typer.Option(help="A slide of the archive.")] = None,
    region: Annotated[str | None, typer.Option(help="A region of the archive.")] = None,
    level: Annotated[Literal["region", "slide"], typer.Option(help="What to find.")] = "region",
    k: Annotated[int, typer.Option("-k", help="How many.", min=1, max=10_000)] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Filter, e.g. patient_id=P1 or tissue_fraction>0.5.", metavar="EXPR"),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Which encoder's features; as for ingest where weights are local."),
    ] = None,
    exclude_same_slide: Annotated[
        bool, typer.Option("--exclude-same-slide", help="Leave the query's own slide out.")
    ] = False,
    exclude_same_patient: Annotated[
        bool, typer.Option("--exclude-same-patient", help="Leave the query's own patient out.")
    ] = False,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of --image where the file does not say.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="HTML page with pictures.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find what looks alike: by a picture, a slide or a region."""
    if sum(value is not None for value in (image, slide, region)) != 1:
        raise ConfigError("Say what to look for.", hint="Give one of --image, --slide, --region.")
    if image is not None and (exclude_same_slide or exclude_same_patient):
        raise ConfigError(
            "A picture has no slide or patient of the archive to leave out.",
            hint="Use --slide or --region with the --exclude-same flags.",
        )
    from pathflip import Archive
    from pathflip.archive.search import Filter, stored_vector
    from pathflip.archive.search import search as search_archive
    from pathflip.encoders import load_encoder
    from pathflip.geometry import Tiling
    from pathflip.query import ImageQuery, embed_image, query_picture

    filters = [Filter.parse(text) for text in where or ()]
    opened = Archive(archive)
    name, spec = _archive_encoder(opened, encoder)
    own_slide = own_patient = None
    if image is not None:
        loaded = load_encoder(spec)
        _check_same_weights(opened, name, loaded.revision)
        vector = embed_image(
            ImageQuery.parse(image),
            encoder=loaded,
            tiling=Tiling(**opened.tiling()),
            mpp=mpp,
        )
    else:
        key = opened.resolve(slide) if slide is not None else str(region)
        vector = stored_vector(opened, key, encoder=name)
        own_slide = key.rpartition("/")[0] or key
        own_patient = opened.slide(own_slide)["patient_id"]
    if exclude_same_patient and own_patient is None:
        raise ConfigError(
            f"The archive knows no patient of {own_slide}.",
            hint="Give them when ingesting (--patients CSV), or use --exclude-same-slide.",
        )
    results = search_archive(
        opened,
        vector,
        encoder=name,
        level=level,
        k=k,
        filters=filters,
        exclude_slide=own_slide if exclude_same_slide else None,
        exclude_patient=own_patient if exclude_same_patient else None,
    )
    if out is not None:
        from pathflip.report import write_results

        picture = None
        if image is not None:
            picture = query_picture(
                ImageQuery.parse(image), tiling=Tiling(**opened.tiling()), mpp=mpp
            )
        write_results(
            opened,
            results,
            out,
            query_picture=picture,
            title=f"Like {image or slide or region}",
        )
    rows = results.to_pylist()
    if as_json:
        _print_json(rows)
        return
    columns = ("rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp")
    _table("", columns, [[row[key] for key in columns] for row in rows])
    if out is not None:
        print(f"Pictures: {out}")


def _archive_encoder(opened: Any, encoder: str | None) -> tuple[str, str]:
    """The archive's name of an encoder, and how to load it."""
    from pathflip.encoders import encoder_info

    if encoder is None or encoder in opened.encoders():
        name = opened.encoder(encoder)[0]
        return name, encoder or name
    info = encoder_info(encoder)
    name, _ = opened.encoder(info.name)
    _check_same_weights(opened, name, info.revision)
    return name, encoder


def _check_same_weights(opened: Any, name: str, revision: str) -> None:
    made_with = opened.encoder(name)[1]["revision"]
    if revision != made_with:
        raise ConfigError(
            f"The archive holds features of {name} revision {made_with}; this is {revision}.",
            hint="Search with the weights the archive was made with.",
            code="other_encoder",
        )


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
        _print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [[check.name, check.status.upper(), check.detail, check.fix] for check in checks]
        _table("", ("check", "status", "found", "what to do"), rows)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    main()
