"""Commands that measure a model of patches and texts: tiles, probe, pairs, trees, wsi, segment."""

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
    SplitOption,
    TemplatesOption,
    open_patch_reader,
    print_json,
    show_table,
    working,
)
from pathflip.errors import ConfigError

app = typer.Typer()

SetArgument = Annotated[
    str, typer.Argument(help="Folder of the set, a folder per class, or a CSV of image, label.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(help="Classes and layout: a name such as nct-crc, or a YAML file."),
]
ClassesOption = Annotated[
    str | None, typer.Option(help="Classes as for classify: names with commas, or a file.")
]
MppOption = Annotated[
    float | None, typer.Option(help="µm per pixel of the pictures.", min=0.05, max=10)
]
TileSplitOption = Annotated[str, typer.Option(help="Tiles of this split; all for every tile.")]
EncoderOption = Annotated[
    str | None,
    typer.Option(help="Base encoder, where its weights are not where its name says."),
]
SourceOption = Annotated[
    str | None, typer.Option(help="Source of the captions, where there are several.")
]
_COLUMNS = ("", "n", "weighted f1", "95 % from", "to", "balanced accuracy", "95 % from ", "to ")


@app.command("tiles")
def evaluate_tiles(
    tiles: SetArgument,
    run: RunOption,
    task: TaskOption = None,
    classes: ClassesOption = None,
    mpp: MppOption = None,
    split: TileSplitOption = "all",
    out: Annotated[
        str | None, typer.Option(help="Picture (.png) of the tiles each class's words fit best.")
    ] = None,
    encoder: EncoderOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure zero-shot classification of tiles, by one prompt a class and by the ensemble.

    Pictures that cannot be read are left out and listed (exit code 3).
    """
    from pathflip.evaluation.tiles import encode_tiles, list_tiles, write_sheet, zero_shot

    _check_picture(out)
    chosen = _tile_task(task, classes, mpp)
    listed = list_tiles(tiles, chosen, split=split)
    with working() as progress:
        reader = open_patch_reader(run, device=device, encoder=encoder)
        encoded = encode_tiles(listed, reader, chosen, progress=progress)
        document = zero_shot(encoded, reader, chosen, resamples=resamples, seed=seed)
        if out is not None:
            write_sheet(out, encoded, reader, chosen)
    if as_json:
        print_json(document)
    else:
        rows = [_row(kind, document[kind]) for kind in ("npe", "pe")]
        for level, found in document["levels"].items():
            rows += [_row(f"{kind} at {level}", found[kind]) for kind in ("npe", "pe")]
        rows += [_row(name, document[name]) for name in ("majority", "chance")]
        show_table(f"{document['model']}: {document['n']} tiles", _COLUMNS, rows)
        _show_confusion(document["pe"], list(chosen.classes))
        if out is not None:
            print(f"Written: {out}")
    tell_refused(document["refused"], "tile", as_json=as_json)


@app.command("probe")
def evaluate_probe(
    tiles: SetArgument,
    run: RunOption,
    task: TaskOption = None,
    classes: ClassesOption = None,
    mpp: MppOption = None,
    shots: Annotated[str, typer.Option(help="Tiles a class of the few-shot probes.")] = (
        "1,2,4,8,16,32"
    ),
    seeds: Annotated[int, typer.Option(help="Draws of each.", min=1)] = 10,
    bank: Annotated[
        str | None,
        typer.Option(help="Archive the model was trained on: probe text-guided vectors, too."),
    ] = None,
    source: SourceOption = None,
    encoder: EncoderOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure linear probes of tiles: trained on split train, measured on test, and few-shot.

    A set without these splits has 30 % of its patients or tiles drawn for the test.
    """
    from pathflip import Archive
    from pathflip.evaluation.probe import probe
    from pathflip.evaluation.tiles import encode_tiles, list_tiles
    from pathflip.evaluation.tree_vectors import keyword_bank

    chosen, few = _tile_task(task, classes, mpp), _numbers(shots)
    listed, names = list_tiles(tiles, chosen), list(chosen.classes)
    options: dict[str, Any] = {
        "shots": few, "seeds": seeds, "resamples": resamples, "seed": seed,
    }  # fmt: skip
    with working() as progress:
        reader = open_patch_reader(run, device=device, encoder=encoder)
        words = [] if bank is None else keyword_bank(Archive(bank), reader, source=source)
        encoded = encode_tiles(listed, reader, chosen, progress=progress)
        document = {"model": reader.name, "task": chosen.name} | probe(encoded, names, **options)
        if words:
            guided = reader.guided(encoded.found.whole(), words)
            document["guided"] = probe(encoded, names, vectors=guided, **options)
            document["guided"]["keywords"] = len(words)
    if as_json:
        print_json(document)
    else:
        _show_probe(document, document["model"], seeds)
        if words:
            _show_probe(document["guided"], f"text-guided by {len(words)} keywords", seeds)
    tell_refused(document["refused"], "tile", as_json=as_json)


@app.command("pairs")
def evaluate_pairs(
    archive: ArchiveOption,
    run: RunOption,
    split: SplitOption = "test",
    source: SourceOption = None,
    protocol: Annotated[
        Literal["batch64", "full"], typer.Option(help="Galleries of 64, or one of all.")
    ] = "batch64",
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure recall at 1, 5, 10 from patch to caption and back, by level and together."""
    from pathflip import Archive
    from pathflip.evaluation.pairs import evaluate_pairs as measure

    with working() as progress:
        document = measure(
            Archive(archive), open_patch_reader(run, device=device, pixels=False), split=split,
            source=source, protocol=protocol, resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    rows = []
    for level, found in [*document["levels"].items(), ("all", document["all"])]:
        for way, title in (("itr", "to caption"), ("tir", "to patch")):
            for key, value in found[way].items():
                low, high = found.get("ci", {}).get(way, {}).get(key) or (None, None)
                rows.append([level, title, key, found["n"], value, low, high, found["chance"][key]])
    columns = ("level", "", "k", "n", "recall", "95 % from", "to", "chance")
    show_table(f"{document['model']} on {split}: {document['trees']} trees", columns, rows)


@app.command("trees")
def evaluate_trees(
    archive: ArchiveOption,
    run: RunOption,
    truth: Annotated[
        str | None,
        typer.Option(help="trees.csv of the cohort; default: that beside the slides' folder."),
    ] = None,
    templates: TemplatesOption = "CLASSNAME",
    split: SplitOption = "test",
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Fit linear probes of v and z, too.")
    ] = True,
    source: SourceOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure patch trees of pathflip synth --kind trees: each cue by level and pooled."""
    from pathflip import Archive
    from pathflip.evaluation.prompts import templates_of
    from pathflip.evaluation.trees import evaluate_trees as measure

    with working() as progress:
        document = measure(
            Archive(archive), open_patch_reader(run, device=device, pixels=False), truth=truth,
            templates=templates_of(templates), split=split, probes=probes, source=source,
            resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    rows = []
    for task in ("joint", "architecture", "nuclei"):
        found = document[task]
        for level, one in [*found["levels"].items(), ("pooled", found["pooled"])]:
            low, high = one.get("ci") or (None, None)
            rows.append([task, level, found["n"], one["accuracy"], low, high, found["chance"]])
        gain = found["pooled_minus_best"]
        low, high = gain.get("ci") or (None, None)
        what = f"pooled - {found['best_level']}"
        rows.append([task, what, found["n"], gain["difference"], low, high, None])
    columns = ("task", "level", "n", "accuracy", "95 % from", "to", "chance")
    show_table(f"{document['model']} on {split}: {document['trees']} trees", columns, rows)
    levels = list(document["joint"]["levels"])
    all_nodes: dict[str, Any] = document.get("probe", {})
    few: dict[str, Any] = all_nodes.get("few") or {}
    probed = [
        [vector, nodes, cue, *(found[cue].get(level) for level in levels), document[cue]["chance"]]
        for nodes, group in (("all", all_nodes), (f"{few.get('shots')} a class", few))
        for vector in ("v", "z")
        if (found := group.get(vector)) is not None
        for cue in ("architecture", "nuclei")
    ]
    if probed:
        columns = ("vector", "training nodes", "cue", *levels, "chance")
        show_table("linear probes of nodes, accuracy", columns, probed)


@app.command("wsi")
def evaluate_wsi(
    archive: Annotated[
        list[str],
        typer.Option("--archive", help="Archive; several of the same slides for several levels."),
    ],
    run: RunOption,
    classes: Annotated[
        str, typer.Option(help="Classes by label value: names with commas, or a file.")
    ],
    label: Annotated[str, typer.Option(help="Label of the slides.")],
    trees: Annotated[
        bool, typer.Option("--trees", help="Patches are the nodes of the patch trees.")
    ] = False,
    split: SplitOption = "test",
    templates: TemplatesOption = "ensemble",
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure zero-shot classification of slides by their best patches, K chosen on split val."""
    from pathflip import Archive
    from pathflip.evaluation.prompts import read_classes, templates_of
    from pathflip.evaluation.wsi import evaluate_wsi as measure

    named = read_classes(classes)
    with working() as progress:
        document = measure(
            [Archive(one) for one in archive],
            open_patch_reader(run, device=device, pixels=False), named, label=label, trees=trees,
            split=split, templates=templates_of(templates), resamples=resamples, seed=seed,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    rows = [
        _row(f"K {k}{' (chosen on val)' if k == str(document['k']) else ''}", found)
        for k, found in document["topk"].items()
    ]
    rows += [_row(f"{level} alone", found) for level, found in document["levels"].items()]
    rows += [_row(name, document[name]) for name in ("majority", "chance")]
    show_table(f"{document['model']} on {split}: {document['n']} slides", _COLUMNS, rows)
    if document["k"] is None:
        print("There are no slides of split val to choose K on: no K is the headline.")
    else:
        _show_confusion(document["chosen"], list(named))


@app.command("segment")
def evaluate_segment(
    archive: ArchiveOption,
    run: RunOption,
    classes: Annotated[
        str, typer.Option(help="Classes as the outlines name them: with commas, or a file.")
    ],
    truth: Annotated[
        str | None,
        typer.Option(help="Folder of <slide>.geojson; default: lesions/ beside the slides."),
    ] = None,
    rest: Annotated[
        str | None, typer.Option(help="Class of tissue without an outline; default: left out.")
    ] = None,
    split: SplitOption = "test",
    slide: Annotated[list[str] | None, typer.Option(help="Only these slides.")] = None,
    steps: Annotated[
        int, typer.Option(help="Steps a window's side is made of: 4, 2, or 1 for no overlap.")
    ] = 4,
    out: Annotated[str | None, typer.Option(help="Folder for a picture of each slide.")] = None,
    encoder: EncoderOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Segment slides by the words of classes, and measure it against outlines.

    Slides that cannot be read are left out and listed (exit code 3).
    """
    from pathflip import Archive
    from pathflip.evaluation.prompts import read_classes
    from pathflip.evaluation.segment import evaluate_segment as measure

    named = read_classes(classes)
    with working() as progress:
        document = measure(
            Archive(archive), open_patch_reader(run, device=device, encoder=encoder), named,
            truth=truth, rest=rest, split=split, slides=slide or (), steps=steps, out=out,
            resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
    else:
        keys = ("dice", "iou", "precision", "recall")
        rows = []
        for name, found in document["classes"].items():
            low, high = found.get("ci", {}).get("dice") or (None, None)
            values = [found[key] for key in keys]
            rows.append([name, found["cells"], values[0], low, high, *values[1:]])
        for name, found in [("mean", document), *document["levels"].items()]:
            low, high = found.get("ci", {}).get("dice") or (None, None)
            shown = name if name == "mean" else f"{name} alone"
            rows.append([shown, None, found["dice"], low, high, found["iou"], None, None])
        for name in ("majority", "chance"):
            values = [document[name]["dice"], None, None, document[name]["iou"]]
            rows.append([name, None, *values, None, None])
        columns = ("class", "cells of 4 µm", "dice", "95 % from", "to", "iou", "precision",
                   "recall")  # fmt: skip
        title = f"{document['model']} on {split}: {document['slides']} slides"
        show_table(f"{title}, {document['windows']:,} windows", columns, rows)
        if out is not None:
            print(f"Written: {out}")
    tell_refused(document["failed"], "slide", as_json=as_json)


def _tile_task(task: str | None, classes: str | None, mpp: float | None) -> Any:
    """Return the task that the flags describe."""
    import dataclasses

    from pathflip.evaluation.prompts import TileTask, read_classes, read_tile_task

    if (task is None) == (classes is None):
        raise ConfigError(
            "Tiles need either --task or --classes.",
            hint="Name a task (--task nct-crc) or the classes (--classes FILE).",
            code="tasks",
        )
    if task is not None:
        found = read_tile_task(task)
        return found if mpp is None else dataclasses.replace(found, mpp=mpp)
    return TileTask(name="classes", classes=read_classes(classes or ""), mpp=mpp)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found):
        raise ConfigError(f"{text!r} is no list of numbers.", hint="Write --shots 1,2,4.")
    return found


def _check_picture(out: str | None) -> None:
    if out is not None and not out.lower().endswith(".png"):
        raise ConfigError(f"{out} is no .png.", hint="Pictures are written as PNG.")


def _row(name: str, found: dict[str, Any]) -> list[Any]:
    """Return a row of :data:`_COLUMNS`."""
    cells: list[Any] = [name, found.get("n")]
    for key in ("weighted_f1", "balanced_accuracy"):
        cells += [found[key], *(found.get("ci", {}).get(key) or (None, None))]
    return cells


def _show_probe(document: dict[str, Any], title: str, seeds: int) -> None:
    rows = [_row("linear", document["linear"])]
    for k, found in document["kshot"].items():
        cells: list[Any] = [f"{k}-shot", None]
        for one in (found["weighted_f1"], found["balanced_accuracy"]):
            cells += [one["mean"], one["mean"] - one["sd"], one["mean"] + one["sd"]]
        rows.append(cells)
    rows += [_row(name, document[name]) for name in ("majority", "chance")]
    title = (
        f"{title}: trained on {document['train']} tiles, C {document['C']:g}, measured on "
        f"{document['test']}; few-shot: one standard deviation over {seeds} draws"
    )
    show_table(title, _COLUMNS, rows)


def _show_confusion(found: dict[str, Any], names: list[str]) -> None:
    rows = [[name, *row] for name, row in zip(names, found["confusion"], strict=True)]
    show_table("confusion", ("true class", *names), rows)


def tell_refused(refused: list[dict[str, str]], what: str, *, as_json: bool) -> None:
    """List what could not be used, and exit with 3 if there is any."""
    if not refused:
        return
    if not as_json:
        rows = [[one[what], one["code"], one["why"]] for one in refused[:20]]
        show_table(f"{len(refused)} left out", (what, "reason", ""), rows)
    raise typer.Exit(3)
