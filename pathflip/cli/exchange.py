"""Commands that bring an archive what other tools made, and give them what it holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pathflip.cli.archive import archive_app
from pathflip.cli.options import (
    ArchiveOption,
    JsonOption,
    flat,
    print_json,
    show_document,
    show_table,
    were_set,
    working,
)

app = typer.Typer()  # its commands stand beside those of archive


@archive_app.command("import")
def archive_import(
    archive: ArchiveOption,
    captions: Annotated[
        str | None,
        typer.Option(help="CSV slide,caption; SlideInstruction JSON; SlideBench; PathText."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="CSV slide,question,choices,answer; SlideBench; WSI-Bench; WSI-VQA."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="CSV or TSV of labels by slide or case.")
    ] = None,
    manifest: Annotated[str | None, typer.Option(help="GDC manifest: TCGA patients.")] = None,
    tree_captions: Annotated[
        str | None,
        typer.Option(help="Captions of patch trees' nodes: JSON lines, or a folder of them."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Folder of patch features: TRIDENT, CLAM, LazySlide, … (docs/howto/interop.md)."
        ),
    ] = None,
    slide_features: Annotated[
        str | None,
        typer.Option(help="Vectors of slides: file or folder of TITAN, PRISM, … of the archive."),
    ] = None,
    features_format: Annotated[
        str, typer.Option("--format", help="Format of --features; auto tells it by its files.")
    ] = "auto",
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder of (slide) features, where there are several or none."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of the encoder, where files do not say it.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the encoder, where files do not say it.")
    ] = None,
    slides: Annotated[
        list[str] | None, typer.Option(help="Slide files and folders that --features are of.")
    ] = None,
    mpp_csv: Annotated[
        str | None, typer.Option(help="CSV slide,mpp for --features without slides.")
    ] = None,
    patch_um: Annotated[
        float | None, typer.Option(help="Side of a patch, µm, in a new archive of --features.")
    ] = None,
    pack_consecutive: Annotated[
        int | None,
        typer.Option(help="Patches without coordinates: fill regions in order, 256 a region."),
    ] = None,
    terms: Annotated[
        str | None, typer.Option(help="Text file of your own terms; default: those of before.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Name of the texts' source; default: the file's.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Remove captions the file no longer has; replace vectors of slides that differ.",
        ),
    ] = False,
    slide_col: Annotated[str | None, typer.Option(help="Column of the slide in --labels.")] = None,
    case_col: Annotated[str | None, typer.Option(help="Column of the case in --labels.")] = None,
    label_col: Annotated[
        list[str] | None, typer.Option(help="Columns to take as labels; default: all others.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add features, captions, questions, labels; names may carry folders, endings, UUIDs."""
    from pathflip import Archive
    from pathflip.errors import ConfigError
    from pathflip.interop.captions import import_captions, read_captions, source_name
    from pathflip.interop.labels import import_labels, read_labels, read_manifest
    from pathflip.interop.questions import import_questions, read_questions
    from pathflip.interop.tree_captions import import_tree_captions, read_tree_captions
    from pathflip.keywords import load_lexicon

    files = (captions, questions, labels, manifest, tree_captions, features, slide_features)
    if all(file is None for file in files):
        raise ConfigError(
            "There is nothing to import.",
            hint="Give --features, --slide-features, --captions, --questions, --labels, "
            "--manifest or --tree-captions.",
        )
    about_features = were_set(
        encoder=encoder, revision=revision, licence=licence, slides=slides, mpp_csv=mpp_csv,
        patch_um=patch_um, pack_consecutive=pack_consecutive,
    )  # fmt: skip
    if features is not None and slide_features is not None:
        raise ConfigError(
            "--features and --slide-features are of two encoders.",
            hint="Import one, then the other.",
        )
    of_both = {"encoder", "revision", "licence"} if slide_features is not None else set()
    if features is None and (only := [name for name in about_features if name not in of_both]):
        flag = only[0].replace("_", "-")
        raise ConfigError(f"--{flag} is of features.", hint="Give --features as well.")
    if replace and captions is None and slide_features is None:
        raise ConfigError(
            "--replace is of captions and of vectors of slides.",
            hint="Give --captions or --slide-features as well.",
        )
    columns = {"slide_col": slide_col, "case_col": case_col, "label_cols": label_col or ()}
    # All files are read before anything is written.
    tables = {}
    if manifest is not None:
        tables["manifest"] = (manifest, read_manifest(manifest))
    if labels is not None:
        tables["labels"] = (labels, read_labels(labels, **columns))  # type: ignore[arg-type]
    if captions is not None:
        read_captions(captions)
    if questions is not None:
        read_questions(questions)
    lexicon = None if terms is None else load_lexicon(terms)
    imported = None
    if features is not None:
        from pathflip.interop.features.importing import FeatureImport, import_features

        settings = FeatureImport(format=features_format, **about_features)
        with working() as progress:
            imported = import_features(
                archive, features, settings, dry_run=dry_run, progress=progress
            )
    of_slides = None
    if slide_features is not None:
        from pathflip.interop.features.slide_importing import (
            SlideFeatureImport,
            import_slide_features,
        )

        wanted = SlideFeatureImport(
            encoder=encoder, revision=revision, licence=licence, replace=replace
        )
        with working() as progress:
            of_slides = import_slide_features(
                archive, slide_features, wanted, dry_run=dry_run, progress=progress
            )
    nodes = None
    if tree_captions is not None:
        nodes = read_tree_captions(Archive(archive), tree_captions)
    document: dict[str, Any] = {} if imported is None else {"features": imported.as_json()}
    if of_slides is not None:
        document["slide_features"] = of_slides.as_json()
    document |= {
        what: import_labels(archive, file, rows, dry_run=dry_run)
        for what, (file, rows) in tables.items()
    }
    if captions is not None:
        document["captions"] = import_captions(
            archive, captions, source=source, replace_source=replace, dry_run=dry_run
        )
    if questions is not None:
        document["questions"] = import_questions(archive, questions, source=source, dry_run=dry_run)
    if nodes is not None and tree_captions is not None:
        name = source or source_name(tree_captions)
        document["tree_captions"] = import_tree_captions(
            archive, nodes, source=name, lexicon=lexicon, dry_run=dry_run
        )
    if as_json:
        print_json(document | ({"dry_run": True} if dry_run else {}))
    else:
        shown = [(key, _few(value)) for key, value in flat(document)]
        title = "dry run: nothing was written" if dry_run else f"imported into {archive}"
        show_table(title, ("what", "value"), shown)
    for made in (imported, of_slides):
        if made is not None and made.exit_code:
            raise typer.Exit(made.exit_code)


def _few(value: Any) -> Any:
    """Return a list of names as their number and the first few."""
    if not isinstance(value, list):
        return value
    more = ", …" if len(value) > 5 else ""
    return f"{len(value)}: {', '.join(value[:5])}{more}" if value else 0


@archive_app.command("remove-captions")
def archive_remove_captions(
    archive: ArchiveOption,
    source: Annotated[str, typer.Option(help="Name of the captions' source.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the captions of one source; questions of the same source stay."""
    from pathflip.interop.captions import remove_source

    document = remove_source(archive, source, dry_run=dry_run)
    shown = document if as_json else {key: _few(value) for key, value in document.items()}
    show_document(shown, "removed", as_json=as_json, dry_run=dry_run)


@archive_app.command("export")
def archive_export(
    archive: ArchiveOption,
    out: Annotated[str, typer.Option(help="Folder to write into.")],
    to: Annotated[
        str,
        typer.Option(
            help="parquet (all tables), qupath (tissue, regions), or features for trident, clam, "
            "stamp, slidechat, h5ad, spatialdata."
        ),
    ] = "parquet",
    slide: Annotated[
        list[str] | None, typer.Option(help="Only these slides (not of parquet).")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of the features, where there are several.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export tables to Parquet, outlines to QuPath, or patch features to other tools' files."""
    from pathflip import Archive
    from pathflip.archive.export import export_parquet, exported_tables
    from pathflip.errors import ConfigError
    from pathflip.interop.features.exporting import WRITERS, export_features
    from pathflip.interop.qupath import export_archive

    if to not in ("parquet", "qupath", *WRITERS):
        raise ConfigError(
            f"There is no format {to!r}.", hint=f"Known: parquet, qupath, {', '.join(WRITERS)}."
        )
    opened = Archive(archive)
    if dry_run and to not in WRITERS:
        names = [opened.resolve(name) for name in slide or ()] or sorted(opened.ready_ids())
        tables = exported_tables(opened) if to == "parquet" else []
        plan = {"out": out, "format": to, "slides": len(names), "tables": tables}
        show_document(plan, as_json=as_json, dry_run=True)
        return
    if to in WRITERS:
        with working() as progress:
            document = export_features(
                opened, to, out, slides=slide, encoder=encoder, dry_run=dry_run, progress=progress
            ) | ({"dry_run": True} if dry_run else {})
    elif to == "qupath":
        paths = export_archive(opened, out, slides=slide)
        document = {"out": out, "files": [str(path) for path in paths]}
    else:
        document = {"out": out, "rows": export_parquet(opened, out)}
    show_document(document, "exported", as_json=as_json, dry_run=dry_run)
