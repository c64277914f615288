"""Commands of evaluate that need no archive's texts: pictures, neighbours, compare."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from pathflip.cli.options import (
    ArchiveOption,
    DeviceOption,
    JsonOption,
    ResamplesOption,
    RunOption,
    SeedOption,
    open_run,
    print_json,
    show_table,
    working,
)
from pathflip.cli.patches import tell_refused

app = typer.Typer()


@app.command("pictures")
def evaluate_pictures(
    pairs: Annotated[str, typer.Argument(help="CSV image,caption[,split][,patient][,mpp].")],
    run: RunOption,
    split: Annotated[str, typer.Option(help="Pictures of this split; all for every one.")] = "all",
    mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel; without it, a picture is one patch.", min=0.05, max=10),
    ] = None,
    protocol: Annotated[
        Literal["batch64", "full"],
        typer.Option(help="Galleries of 64 as in the paper, or one of all pictures."),
    ] = "batch64",
    encoder: Annotated[
        str | None,
        typer.Option(help="Patch encoder, where its weights are not where its name says."),
    ] = None,
    shuffles: Annotated[int, typer.Option(help="Random batch orders.", min=0)] = 20,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure recall between pictures and captions, a picture taken as a slide of its own.

    Pictures that cannot be read are left out and listed (exit code 3).
    """
    from pathflip.encoders import load_encoder
    from pathflip.evaluation.pictures import evaluate_pictures as measure
    from pathflip.evaluation.pictures import read_pairs

    listed = read_pairs(pairs, split=split)
    with working() as progress:
        loaded = open_run(run, device=device)
        document = measure(
            listed, loaded,
            load_encoder(
                encoder or str(loaded.encoder["name"]), device=device,
                patch_um=float(loaded.tiling["patch_um"]),
            ),
            mpp=mpp, protocol=protocol, shuffles=shuffles, resamples=resamples, seed=seed,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
    else:
        show_recall(document, "pictures")
    tell_refused(document["refused"], "picture", as_json=as_json)


@app.command("neighbours")
def evaluate_neighbours(
    archive: ArchiveOption,
    label: Annotated[str, typer.Option(help="Label that near slides should share.")],
    space: Annotated[
        list[str] | None,
        typer.Option(help="Encoder, model or slide encoder; repeat to compare. Default: all."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only slides of this split.")] = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare vectors of slides: whether the nearest of other patients have the same label."""
    from pathflip.cli.process import open_archive
    from pathflip.evaluation.neighbours import neighbours

    document = neighbours(
        open_archive(archive), label, space or (), split=split, resamples=resamples, seed=seed
    )
    if as_json:
        print_json(document)
        return
    rows = [
        [name, key, share, *(found["ci"][key] or (None, None)), document["chance"]]
        for name, found in document["spaces"].items()
        for key, share in found.items()
        if key != "ci"
    ]
    title = f"{label}: {document['n']} slides, {document['alone']} without another of their label"
    show_table(title, ("vectors", "k", "same label", "95 % from", "to", "chance"), rows)


@app.command("compare")
def evaluate_compare(
    expected: Annotated[str, typer.Argument(help="YAML of figures (docs/recipes/expected.yaml).")],
    folder: Annotated[str, typer.Argument(help="Folder of the documents that --json wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Compare measured figures with those that a paper prints."""
    from pathflip.evaluation.expected import compare, read_expected

    rows = compare(read_expected(expected), folder)
    if as_json:
        print_json({"figures": rows})
        return
    columns = ("table", "name", "expected", "measured", "difference")
    show_table("", columns, [[row[key] for key in columns] for row in rows])


def show_recall(document: dict[str, Any], what: str) -> None:
    """Print recall both ways, of so many slides or pictures."""
    rows = []
    for way in ("itr", "tir"):
        for key, value in document[way].items():
            shuffled = document.get("shuffled", {}).get(way, {}).get(key, {})
            low, high = document.get("ci", {}).get(way, {}).get(key) or (None, None)
            rows.append(
                [way, key, value, low, high, shuffled.get("mean"), shuffled.get("sd"),
                 document["chance"][key]]
            )  # fmt: skip
    columns = ("", "k", "recall", "95 % from", "to", "shuffled mean", "sd", "chance")
    title = f"{document['protocol']}: {document['n']} {what}, galleries of {document['gallery']}"
    show_table(title, columns, rows)
