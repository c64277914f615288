"""Searching an archive."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from pathflip.cli.options import (
    ArchiveOption,
    JsonOption,
    print_json,
    show_table,
)
from pathflip.errors import ConfigError

app = typer.Typer()

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
        print_json(rows)
        return
    columns = ("rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp")
    show_table("", columns, [[row[key] for key in columns] for row in rows])
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
