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
    text: Annotated[
        str | None, typer.Argument(help="What to find, in words; needs --run, or --mode text.")
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
    exclude_patient: Annotated[
        str | None, typer.Option(help="Leave this patient out.", metavar="PATIENT")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of --image where the file does not say.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="HTML page with pictures.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find slides or regions: by words, or by what looks like a picture, a slide or a region."""
    _check_usage(
        text=text, image=image, slide=slide, region=region, run=run, mode=mode, level=level,
        own=exclude_same_slide or exclude_same_patient, patient=exclude_patient,
        same_patient=exclude_same_patient,
    )  # fmt: skip
    from pathflip import Archive
    from pathflip.archive.filters import Filter

    filters = [Filter.parse(one) for one in where or ()]
    opened = Archive(archive)
    loaded = None if run is None else _indexed_run(opened, run)
    if loaded is not None and level == "region" and loaded.model.config.region_encoder == "none":
        raise ConfigError(f"Model {loaded.name} has no regions.", hint="Add --level slide.")
    own_slide = own_patient = None
    if slide is not None or region is not None:
        key = opened.resolve(slide) if slide is not None else str(region)
        own_slide = key.rpartition("/")[0] or key
        own_patient = opened.slide(own_slide)["patient_id"]
    if exclude_same_patient and own_patient is None:
        raise ConfigError(
            f"The archive knows no patient of {own_slide}.",
            hint="Give them when ingesting (--patients CSV), or use --exclude-same-slide.",
        )
    common: dict[str, Any] = {
        "k": k,
        "filters": filters,
        "exclude_slide": own_slide if exclude_same_slide else None,
        "exclude_patient": own_patient if exclude_same_patient else exclude_patient,
    }
    if text is not None:
        results = _by_text(opened, text, loaded=loaded, mode=mode, level=level, **common)
    else:
        from pathflip.archive.search import search as search_archive
        from pathflip.archive.search import stored_vector

        space, spec = _space(opened, encoder, loaded)
        if image is not None:
            vector = _image_vector(opened, image, spec=spec, loaded=loaded, mpp=mpp)
        else:
            stored = {name: value for name, value in space.items() if name != "fingerprint"}
            vector = stored_vector(opened, key, **stored)
        results = search_archive(opened, vector, level=level, **space, **common)
    if out is not None:
        _write_page(opened, results, out, image=image, mpp=mpp, title=text or slide or region)
    rows = results.to_pylist()
    if as_json:
        print_json(rows)
        return
    columns = ("rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp")
    show_table("", columns, [[row[key] for key in columns] for row in rows])
    if out is not None:
        print(f"Pictures: {out}")


def _check_usage(
    *,
    text: str | None,
    image: str | None,
    slide: str | None,
    region: str | None,
    run: str | None,
    mode: str,
    level: str,
    own: bool,
    patient: str | None,
    same_patient: bool,
) -> None:
    if sum(value is not None for value in (text, image, slide, region)) != 1:
        raise ConfigError(
            "Say what to look for.", hint="Give one of a text, --image, --slide, --region."
        )
    if (text is not None or image is not None) and own:
        raise ConfigError(
            "A text or a picture has no slide or patient of the archive to leave out.",
            hint="Use --slide or --region with the --exclude-same flags, or --exclude-patient.",
        )
    if same_patient and patient is not None:
        raise ConfigError("Give --exclude-patient or --exclude-same-patient, not both.")
    if text is None and mode != "vector":
        raise ConfigError(f"--mode {mode} searches for a text.", hint="Give one.")
    if text is not None and run is None and mode != "text":
        raise ConfigError(
            "Searching for a text by its meaning needs a trained model.",
            hint="Add --run DIR, or search the words of captions with --mode text --level slide.",
        )
    if mode == "text" and level != "slide":
        raise ConfigError(
            "Captions are of slides, not of regions.",
            hint="Add --level slide, or use --mode hybrid.",
        )


def _indexed_run(opened: Any, run: str) -> Any:
    """Load a run, and refuse one whose vectors are not in the archive."""
    from pathflip.checkpoints import load_run
    from pathflip.compat import check_indexed

    loaded = load_run(run)
    check_indexed(opened, loaded, folder=run)
    return loaded


def _by_text(opened: Any, text: str, *, loaded: Any, mode: str, level: Any, **common: Any) -> Any:
    from pathflip.archive.search import search as search_archive
    from pathflip.archive.textsearch import search_hybrid, search_text

    if mode == "text":
        # Filters look at the rows of slides, which are the same by every encoder and model.
        name = None if loaded is None else loaded.name
        first = None if name is not None else next(iter(opened.encoders()), None)
        return search_text(opened, text, encoder=first, model=name, **common)
    if not text.strip():
        raise ConfigError("The text to search for is empty.")
    vector = loaded.model.encode_text([text])[0].float().cpu().numpy()
    space = {"model": loaded.name, "fingerprint": loaded.fingerprint}
    if mode == "hybrid":
        return search_hybrid(opened, text, vector, level=level, **space, **common)
    return search_archive(opened, vector, level=level, **space, **common)


def _space(opened: Any, encoder: str | None, loaded: Any) -> tuple[dict[str, Any], str]:
    """The arguments that name what vectors are compared, and how to load their encoder."""
    from pathflip.compat import resolve_encoder

    if loaded is None:
        name, spec = resolve_encoder(opened, encoder)
        return {"encoder": name}, spec
    _, spec = resolve_encoder(opened, encoder or loaded.encoder["name"])
    return {"model": loaded.name, "fingerprint": loaded.fingerprint}, spec


def _image_vector(opened: Any, image: str, *, spec: str, loaded: Any, mpp: float | None) -> Any:
    from pathflip.compat import check_weights
    from pathflip.encoders import load_encoder
    from pathflip.geometry import Tiling
    from pathflip.image_query import ImageQuery, embed_image, image_regions

    encoder = load_encoder(spec)
    name = encoder.name if loaded is None else loaded.encoder["name"]
    check_weights(opened, name, encoder=encoder)
    query, tiling = ImageQuery.parse(image), Tiling(**opened.tiling())
    if loaded is None:
        return embed_image(query, encoder=encoder, tiling=tiling, mpp=mpp)
    import torch

    regions = image_regions(query, encoder=encoder, tiling=tiling, mpp=mpp)
    features = torch.zeros(1, len(regions), tiling.slots, encoder.dim)
    mask = torch.zeros(1, len(regions), tiling.slots, dtype=torch.bool)
    for number, values in enumerate(regions):
        features[0, number, : len(values)] = torch.from_numpy(values)
        mask[0, number, : len(values)] = True
    return loaded.model.encode_slide(features, mask).slide[0].float().cpu().numpy()


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
