"""Commands for annotations: what people drew on the slides of an archive."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathflip.cli.options import (
    ArchiveOption,
    JsonOption,
    print_json,
    show_document,
    show_table,
)
from pathflip.cli.process import open_archive
from pathflip.errors import ConfigError
from pathflip.interop.annotations import FILE_ENDINGS

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.interop.annotations import Annotation

app = typer.Typer()
annotations_app = typer.Typer(help="What people drew on slides.", no_args_is_help=True)
app.add_typer(annotations_app, name="annotations")

_AUTHOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as a token's name

SlideOption = Annotated[list[str] | None, typer.Option("--slide", help="Only of these slides.")]
AuthorOption = Annotated[str | None, typer.Option("--author", help="Only of this author.")]


@annotations_app.command("list")
def annotations_list(
    archive: ArchiveOption,
    slide: SlideOption = None,
    author: AuthorOption = None,
    as_json: JsonOption = False,
) -> None:
    """List annotations, those of slides that are gone or have other pixels now as well."""
    opened = open_archive(archive)
    rows = [
        {
            "id": one.annotation_id,
            "slide": one.slide_id,
            "state": state,
            "author": one.author,
            "name": one.name,
            "class": one.classification,
            "type": one.shape.geometry["type"],
            **{name: getattr(one.shape, name) for name in ("x0", "y0", "x1", "y1")},
            "revision": one.revision,
            "updated": None if one.updated is None else one.updated.isoformat(),
        }
        for one, state in _chosen(opened, slide, author)
    ]
    if as_json:
        print_json({"annotations": rows})
        return
    shown = ("id", "slide", "state", "author", "name", "class", "type", "revision", "updated")
    show_table("", shown, [[row[key] for key in shown] for row in rows])


@annotations_app.command("export")
def annotations_export(
    archive: ArchiveOption,
    out: Annotated[str, typer.Option(help="Folder to write into, a file a slide.")],
    slide: SlideOption = None,
    author: AuthorOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write annotations as QuPath GeoJSON: OUT/SLIDE.geojson."""
    from pathflip.archive.annotations import Ground
    from pathflip.interop.qupath import write_annotations

    opened = open_archive(archive)
    found = _chosen(opened, slide, author)
    by_slide: dict[str, list[Annotation]] = {}
    for one, state in found:
        if state == "ok":
            by_slide.setdefault(one.slide_id, []).append(one)
    files = []
    for slide_id, drawn in sorted(by_slide.items()):
        path = Path(out).expanduser() / f"{slide_id}.geojson"
        if not dry_run:
            x0, y0 = Ground.all(opened)[slide_id].offset
            write_annotations(path, drawn, bounds_x0=x0, bounds_y0=y0)
        files.append(str(path))
    states = Counter(state for _, state in found)
    document: dict[str, Any] = {
        "out": out,
        "files": files,
        "annotations": states["ok"],
        "outdated": states["outdated"],
        "without_slide": states["no slide"],
    } | ({"dry_run": True} if dry_run else {})
    show_document(document, "exported", as_json=as_json, dry_run=dry_run)


@annotations_app.command("import")
def annotations_import(
    archive: ArchiveOption,
    files: Annotated[
        list[str],
        typer.Argument(
            help="Files of QuPath, ASAP, Aperio ImageScope or HALO, GeoParquet, DICOM ANN or SR, "
            "named after their slides."
        ),
    ],
    author: Annotated[str, typer.Option(help="Their author: the name of a token.")],
    slide: Annotated[
        str | None, typer.Option(help="Their slide, where the file is not named after it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add annotations that other tools wrote; a second time changes nothing."""
    from pathflip.archive.annotations import AnnotationStore, Ground
    from pathflip.interop.annotation_dicom import SlideFile
    from pathflip.interop.annotation_files import read_annotations

    if not _AUTHOR.fullmatch(author):
        raise ConfigError(
            f"{author!r} is no name of an author.",
            hint="It has letters, digits, . _ and -, as names of tokens have.",
        )
    if slide is not None and len(files) > 1:
        raise ConfigError("--slide is of one file.", hint="Give the files one by one.")
    opened, store = open_archive(archive), AnnotationStore(archive)
    read, left_out = [], Counter[str]()
    uris = dict(zip(*opened.slides(columns=["slide_id", "uri"]).to_pydict().values(), strict=True))
    for file in files:  # all are read before anything is written
        if not Path(file).is_file():
            is_folder = Path(file).is_dir()
            raise ConfigError(
                f"{file} is a folder." if is_folder else f"There is no file {file}.",
                hint=f"Name its files: {file.rstrip('/')}/*" if is_folder else "Check its name.",
            )
        slide_id = opened.resolve(slide or _stem(file))
        ground = Ground.all(opened)[slide_id]
        x0, y0 = ground.offset
        drawn, passed = read_annotations(
            file, slide_id=slide_id, author=author, width=ground.width, height=ground.height,
            bounds_x0=x0, bounds_y0=y0,
            slide=SlideFile.of(uris[slide_id], ground.width, ground.height),
        )  # fmt: skip
        read.append((ground, drawn))
        left_out += passed
    counts: Counter[str] = Counter(new=0, changed=0, unchanged=0)
    for ground, drawn in read:
        saved = store.put_all(drawn, ground=ground, by=author, dry_run=dry_run)
        for name in counts:
            counts[name] += len(getattr(saved, name))
    if not dry_run:
        store.tidy()
    document: dict[str, Any] = {"files": len(files), **counts, "left_out": dict(left_out)}
    document |= {"dry_run": True} if dry_run else {}
    show_document(document, "imported", as_json=as_json, dry_run=dry_run)


@annotations_app.command("regions")
def annotations_regions(
    archive: ArchiveOption,
    out: Annotated[str, typer.Option(help="Table to write, CSV.")],
    of_class: Annotated[
        list[str] | None, typer.Option("--class", help="Only of this class; may be repeated.")
    ] = None,
    min_share: Annotated[
        float, typer.Option(help="Share of a region's area from which on it has the label.")
    ] = 0.5,
    slide: SlideOption = None,
    author: AuthorOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Label regions by what was drawn on them: the share of their area under each class."""
    from pathflip.annotated_regions import label_regions, write_labels

    opened = open_archive(archive)
    drawn = [one for one, state in _chosen(opened, slide, author) if state == "ok"]
    labels = label_regions(opened, drawn, classes=of_class or (), min_share=min_share)
    if not dry_run:
        write_labels(out, labels)
    document: dict[str, Any] = {
        "out": out,
        "slides": len({one.slide_id for one in labels}),
        "regions": len(labels),
        "min_share": min_share,
        "labels": dict(sorted(Counter(one.label for one in labels if one.label).items())),
        "without_label": sum(not one.label for one in labels),
    } | ({"dry_run": True} if dry_run else {})
    show_document(document, "labelled", as_json=as_json, dry_run=dry_run)


@annotations_app.command("remove")
def annotations_remove(
    archive: ArchiveOption,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of annotations.")] = None,
    slide: SlideOption = None,
    author: AuthorOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove annotations: those named, or all of a slide, of an author, or of both."""
    from pathflip.archive.annotations import AnnotationStore

    if not (ids or slide or author):
        raise ConfigError(
            "Nothing says which annotations to remove.", hint="Give ids, --slide or --author."
        )
    opened = open_archive(archive)
    chosen = {one.annotation_id for one, _ in _chosen(opened, slide, author)}
    if ids:
        chosen &= {name.lower() for name in ids}
    removed = len(chosen) if dry_run else AnnotationStore(archive).remove(chosen)
    document: dict[str, Any] = {"removed": removed} | ({"dry_run": True} if dry_run else {})
    show_document(document, "removed", as_json=as_json, dry_run=dry_run)


def _chosen(
    archive: Archive, slides: list[str] | None, author: str | None
) -> list[tuple[Annotation, str]]:
    """Return annotations with their state: ``ok``, ``outdated`` or ``no slide``.

    Those whose slide is there under another id now are of that slide.
    """
    from dataclasses import replace

    from pathflip.archive.annotations import AnnotationStore, Ground

    grounds = Ground.all(archive)
    by_digest = {ground.sha256: slide for slide, ground in grounds.items() if ground.sha256}
    wanted = None if slides is None else {_slide_id(archive, name) for name in slides}
    found = []
    for one in AnnotationStore(archive.uri).all(author=author):
        state = "ok"
        ground = grounds.get(one.slide_id)
        if ground is None or not ground.bears(one):
            heir = by_digest.get(one.sha256) if one.sha256 else None
            if heir is not None:
                one = replace(one, slide_id=heir)
            else:
                state = "no slide" if ground is None else "outdated"
        if wanted is None or one.slide_id in wanted:
            found.append((one, state))
    return found


def _slide_id(archive: Archive, name: str) -> str:
    """Return the slide of a name; one that is gone goes by the id it had."""
    from pathflip.archive.annotations import AnnotationStore

    if name in archive.ledger():
        return name
    if any(one.slide_id == name for one in AnnotationStore(archive.uri).all()):
        return name
    return archive.resolve(name)


def _stem(file: str) -> str:
    """Return the name of the slide that a file is named after."""
    name = Path(file).name
    for ending in (".zip", *FILE_ENDINGS):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name
