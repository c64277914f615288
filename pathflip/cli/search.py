"""Searching an archive."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from pathflip.cli.options import (
    ArchiveOption,
    JsonOption,
    print_json,
    show_table,
)
from pathflip.cli.process import open_archive
from pathflip.errors import ConfigError

app = typer.Typer()


@app.command()
def search(
    archive: ArchiveOption,
    text: Annotated[
        str | None,
        typer.Argument(
            help="What to find, in words; needs --run, --encoder mrplip:RUN, or --mode text."
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Slide or picture, or a box of it.", metavar="FILE[#x,y,w,h]"),
    ] = None,
    slide: Annotated[str | None, typer.Option(help="A slide of the archive.")] = None,
    region: Annotated[str | None, typer.Option(help="A region of the archive.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Run of pathflip pretrain, indexed: search by its model.")
    ] = None,
    mode: Annotated[
        Literal["vector", "text", "hybrid"],
        typer.Option(help="By meaning, by the words of captions, or both."),
    ] = "vector",
    level: Annotated[
        Literal["region", "slide", "patch"], typer.Option(help="What to find.")
    ] = "region",
    k: Annotated[int, typer.Option("-k", help="How many.", min=1, max=10_000)] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Filter, e.g. patient_id=P1, label.grade=2, n_patches>9.", metavar="EXPR"
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Which encoder's features, or slide encoder's vectors; as for ingest where "
            "weights are local."
        ),
    ] = None,
    exclude_same_slide: Annotated[
        bool, typer.Option("--exclude-same-slide", help="Leave the query's own slide out.")
    ] = False,
    exclude_same_patient: Annotated[
        bool, typer.Option("--exclude-same-patient", help="Leave the query's own patient out.")
    ] = False,
    exclude_patient: Annotated[
        str | None, typer.Option(help="Leave this patient out.", metavar="PATIENT")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of --image where the file does not say.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="HTML page with pictures.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find slides, regions or patches by words, or by a picture, slide or region like them."""
    if encoder is not None and run is None and (image is not None or text is not None):
        _refuse_imported(open_archive(archive), encoder, what="a picture" if image else "words")
    _check_usage(
        {"text": text, "image": image, "slide": slide, "region": region},
        mode=mode,
        level=level,
        exclude_same=exclude_same_slide or exclude_same_patient,
        exclude_same_patient=exclude_same_patient,
        exclude_patient=exclude_patient is not None,
        has_model=run is not None or _is_patch_model(encoder),
        by_slide_model=run is not None,
    )
    from pathflip.archive.filters import Filter
    from pathflip.search import Query, run_query

    filters = [Filter.parse(one) for one in where or ()]
    opened = open_archive(archive)
    embeds = image is not None or (text is not None and mode != "text")
    loaded = None if run is None else _indexed_run(opened, run, level=level, embeds=embeds)
    vector: Any = None
    space: dict[str, str] = {}
    if loaded is not None:
        space = {"model": loaded.name, "fingerprint": loaded.fingerprint}
    if text is None:
        name, spec = _encoder(opened, encoder, loaded)
        space = space or {"encoder": name}
        if image is not None:
            vector = _image_vector(opened, image, spec=spec, loaded=loaded, mpp=mpp)
    elif mode != "text":
        if loaded is None:
            loaded, space["encoder"] = _patch_model(opened, encoder)
        vector = _text_vector(text, loaded)
    query = Query(
        text=text, vector=vector, slide=slide, region=region, mode=mode, level=level, k=k,
        filters=filters, exclude_same_slide=exclude_same_slide,
        exclude_same_patient=exclude_same_patient, exclude_patient=exclude_patient, **space,
    )  # fmt: skip
    results = run_query(opened, query)
    if out is not None:
        _write_page(opened, results, out, image=image, mpp=mpp, title=text or slide or region)
    rows = results.to_pylist()
    if (results.schema.metadata or {}).get(b"exhaustive") == b"false":
        print("Only patches of the best regions were compared.", file=sys.stderr)
    if as_json:
        print_json(rows)
        return
    columns = ("rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp")
    show_table("", columns, [[row[key] for key in columns] for row in rows])
    if out is not None:
        print(f"Pictures: {out}")


def _check_usage(given: dict[str, str | None], **parts: Any) -> None:
    """Refuse flags that do not go together.

    Args:
        given: The values of text, --image, --slide, --region.
        parts: See :func:`pathflip.search.query_faults`.
    """
    from pathflip.search import query_faults

    sought = [name for name, value in given.items() if value is not None]
    found = query_faults(sought, **parts)
    for fault, (message, hint) in _FAULTS.items():
        if fault in found:
            raise ConfigError(message.format(mode=parts["mode"]), hint=hint)


_FAULTS = {
    "not_one": ("Say what to look for.", "Give one of a text, --image, --slide, --region."),
    "nothing_stored": (
        "A text or a picture has no slide or patient of the archive to leave out.",
        "Use --slide or --region with the --exclude-same flags, or --exclude-patient.",
    ),
    "two_patients": ("Give --exclude-patient or --exclude-same-patient, not both.", ""),
    "needs_text": ("--mode {mode} searches for a text.", "Give one."),
    "needs_model": (
        "Searching for a text by its meaning needs a trained model.",
        "Add --run DIR, --encoder mrplip:RUN where the archive has such features, or search the "
        "words of captions with --mode text --level slide.",
    ),
    "needs_slides": (
        "Captions are of slides, not of regions.",
        "Add --level slide, or use --mode hybrid.",
    ),
    "only_features": (
        "Patches are found by the vector of a text or a picture, in the space of an encoder.",
        "Give a text with --encoder mrplip:RUN or an --image; leave out --run and --mode.",
    ),
}
"""Message and hint for each fault of a query, in the order they are told."""


def _indexed_run(opened: Any, run: str, *, level: str, embeds: bool) -> Any:
    """Open a run, and refuse one whose vectors are not in the archive or not of this level.

    Its model is loaded only where it embeds the query: a slide or a region has its vector already.
    """
    from pathflip.checkpoints import describe_run, load_run
    from pathflip.compat import check_indexed

    loaded = load_run(run) if embeds else describe_run(run)
    check_indexed(opened, loaded, folder=run)
    if level == "region" and not loaded.has_regions:
        raise ConfigError(f"Model {loaded.name} has no regions.", hint="Add --level slide.")
    return loaded


def _encoder(opened: Any, encoder: str | None, loaded: Any) -> tuple[str, str]:
    """Find the patch encoder of a query, as (name in the archive, spec to load it by)."""
    from pathflip.compat import resolve_encoder

    return resolve_encoder(opened, encoder or (loaded.encoder["name"] if loaded else None))


def _refuse_imported(opened: Any, encoder: str, *, what: str) -> None:
    """Refuse to embed a query by a slide encoder of which there are only vectors."""
    if encoder in opened.slide_encoders():
        raise ConfigError(
            f"The vectors of {encoder} were imported, and nothing here embeds {what} by it.",
            hint="Search by a slide: --slide SLIDE --level slide.",
            code="no_model",
        )


def _is_patch_model(encoder: str | None) -> bool:
    from pathflip.encoders.mrplip import SCHEME

    return encoder is not None and encoder.startswith(f"{SCHEME}:")


def _patch_model(opened: Any, encoder: str | None) -> tuple[Any, str]:
    """Load the run of a patch model, and its encoder's name in the archive."""
    from pathflip.compat import check_weights
    from pathflip.encoders import patch_model

    assert encoder is not None
    model = patch_model(encoder, patch_um=float(opened.tiling()["patch_um"]))
    check_weights(opened, model.info.name, encoder=model.info)
    return model.run, model.info.name


def _text_vector(text: str, loaded: Any) -> Any:
    from pathflip.search import embed_texts

    if not text.strip():
        raise ConfigError("The text to search for is empty.")
    return embed_texts(loaded, [text])[0]


def _image_vector(opened: Any, image: str, *, spec: str, loaded: Any, mpp: float | None) -> Any:
    from pathflip.compat import check_weights
    from pathflip.encoders import load_encoder
    from pathflip.geometry import Tiling
    from pathflip.image_query import ImageQuery, embed_image, image_regions
    from pathflip.search import embed_regions

    encoder = load_encoder(spec, patch_um=float(opened.tiling()["patch_um"]))
    name = encoder.name if loaded is None else loaded.encoder["name"]
    check_weights(opened, name, encoder=encoder)
    query, tiling = ImageQuery.parse(image), Tiling(**opened.tiling())
    if loaded is None:
        return embed_image(query, encoder=encoder, tiling=tiling, mpp=mpp)
    regions = image_regions(query, encoder=encoder, tiling=tiling, mpp=mpp)
    return embed_regions(loaded, regions, slots=tiling.slots)


def _write_page(
    opened: Any, results: Any, out: str, *, image: str | None, mpp: float | None, title: str | None
) -> None:
    from pathflip.geometry import Tiling
    from pathflip.image_query import ImageQuery, query_picture
    from pathflip.report import write_results

    picture = None
    if image is not None:
        picture = query_picture(ImageQuery.parse(image), tiling=Tiling(**opened.tiling()), mpp=mpp)
    write_results(opened, results, out, query_picture=picture, title=f"Like {image or title}")
