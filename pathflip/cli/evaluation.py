"""Commands that use or measure a trained model: classify, ground, evaluate."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any, Literal

import typer

from pathflip.cli import patches, published
from pathflip.cli.options import (
    AddressOption,
    ArchiveOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    LocalOption,
    OverrideOption,
    ResamplesOption,
    RunOption,
    SeedOption,
    SplitOption,
    TemplatesOption,
    engine,
    flat,
    job,
    open_run,
    open_slide_qa,
    print_json,
    show_document,
    show_table,
    torch_device,
    were_set,
    working,
)
from pathflip.cli.process import open_archive
from pathflip.cli.published import show_recall
from pathflip.errors import ConfigError

app = typer.Typer()
evaluate_app = typer.Typer(
    help="Measure a trained model: of slides, of answers and captions, or of patches and texts.",
    no_args_is_help=True,
)
app.add_typer(evaluate_app, name="evaluate")
evaluate_app.add_typer(patches.app)
evaluate_app.add_typer(published.app)

TunedOption = Annotated[str, typer.Option("--run", help="Folder that pathflip tune wrote.")]
LlmOption = Annotated[
    str | None,
    typer.Option(help="Where the base language model is, if it is not where it was tuned."),
]
TasksOption = Annotated[
    str | None,
    typer.Option(help="YAML of tasks; default: tasks.yaml beside the slides' folder."),
]
ContrastOption = Annotated[
    str | None,
    typer.Option(help="Neutral text whose heat is subtracted, e.g. tissue.", metavar="TEXT"),
]
Variant = Literal["attn", "region_only", "cosine", "product"]

# -- using a model --------------------------------------------------------------------------------


@app.command()
def classify(
    archive: ArchiveOption,
    run: RunOption,
    classes: Annotated[
        str, typer.Option(help="Names with commas, or a YAML, JSON or text file of them.")
    ],
    split: Annotated[str | None, typer.Option(help="Only slides of this split.")] = None,
    slide: Annotated[list[str] | None, typer.Option(help="Only these slides.")] = None,
    templates: TemplatesOption = "ensemble",
    score: Annotated[
        Literal["global", "local", "sum"], typer.Option(help="Slide, regions, or both.")
    ] = "global",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Choose for each slide the class whose words fit it best."""
    from pathflip.evaluation.classify import classify as classify_slides
    from pathflip.evaluation.prompts import read_classes

    named = read_classes(classes)
    with working() as progress:
        rows = classify_slides(
            open_archive(archive), open_run(run, device=device), named,
            templates=templates, score=score, split=split, slides=slide, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(rows)
        return
    table = [[row["slide_id"], row["label"], *row["scores"].values()] for row in rows]
    show_table("", ("slide_id", "label", *named), table)


@app.command()
def ground(
    slide: Annotated[str, typer.Argument(help="Slide id, or its file name where unique.")],
    text: Annotated[str, typer.Argument(help='What to look for, e.g. "areas of necrosis".')],
    archive: ArchiveOption,
    run: RunOption,
    out: Annotated[
        str | None, typer.Option(help="Picture (.png) or QuPath objects (.geojson).")
    ] = None,
    variant: Annotated[Variant, typer.Option(help="How the heatmap is computed.")] = "attn",
    contrast: ContrastOption = None,
    min_patches: Annotated[int, typer.Option(help="Smallest box, patches.", min=1)] = 4,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show where on a slide a text is true: heat over the thumbnail, and boxes."""
    from pathflip.evaluation.ground_slide import check_ending, ground_slide

    if out is not None:
        check_ending(out)
    with redirect_stdout(sys.stderr):
        found = ground_slide(
            open_archive(archive), open_run(run, device=device), slide, text,
            variant=variant, contrast=contrast, min_patches=min_patches,
        )  # fmt: skip
        if out is not None:
            found.write(out)
    document = found.as_json()
    if as_json:
        print_json(document)
        return
    columns = ("x0", "y0", "w0", "h0", "x_um", "y_um", "w_um", "h_um", "score", "patches")
    title = f"{document['slide_id']}: {text}"
    show_table(title, columns, [[box[key] for key in columns] for box in document["boxes"]])
    if out is not None:
        print(f"Written: {out}")


# -- measuring it ---------------------------------------------------------------------------------


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    archive: ArchiveOption,
    run: RunOption,
    split: SplitOption = "test",
    protocol: Annotated[
        Literal["batch64", "full"],
        typer.Option(help="Galleries of 64 as in the paper, or one of all slides."),
    ] = "batch64",
    source: Annotated[
        str | None, typer.Option(help="Source of the captions, where there are several.")
    ] = None,
    shuffles: Annotated[int, typer.Option(help="Random batch orders.", min=0)] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure recall at 1, 5, 10 from slide to caption (ITR) and back (TIR)."""
    from pathflip import Archive
    from pathflip.evaluation.retrieval import evaluate_retrieval as measure

    with working() as progress:
        document = measure(
            Archive(archive), open_run(run, device=device), split=split, source=source,
            protocol=protocol, shuffles=shuffles, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    show_recall(document, "slides")


@evaluate_app.command("zeroshot")
def evaluate_zeroshot(
    archive: ArchiveOption,
    run: RunOption,
    tasks: TasksOption = None,
    split: SplitOption = "test",
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure AUC of every task against the slides' labels, beside trivial baselines."""
    from pathflip import Archive
    from pathflip.evaluation.prompts import read_tasks
    from pathflip.evaluation.zeroshot import default_tasks, summary, zeroshot

    opened = Archive(archive)
    suite = read_tasks(tasks or default_tasks(opened))
    with working() as progress:
        document = zeroshot(
            opened, open_run(run, device=device), suite,
            split=split, resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    columns = (
        "task", "kind", "n", "auc", "95 % from", "to", "patient auc", "ap", "ap chance",
        "balanced accuracy", "its chance", "accuracy", "majority",
    )  # fmt: skip
    rows = [
        [
            name, task["kind"], task["n"], task["auc"], *(task["ci"] or (None, None)),
            task.get("patient", {}).get("auc"), task.get("ap"), task["baseline"].get("ap"),
            task["balanced_accuracy"], task["baseline"]["balanced_accuracy"], task["accuracy"],
            task["baseline"]["accuracy"],
        ]
        for name, task in document.items()
    ]  # fmt: skip
    show_table(f"zero-shot on {split}", columns, rows)
    show_table("means", ("what", "value"), list(flat(summary(document))))


@evaluate_app.command("grounding")
def evaluate_grounding(
    archive: ArchiveOption,
    run: RunOption,
    truth: Annotated[
        str | None,
        typer.Option(
            help="Folder of outlines named like slides, or a table of boxes; default: lesions/ "
            "beside the slides."
        ),
    ] = None,
    tasks: TasksOption = None,
    split: SplitOption = "test",
    iou: Annotated[
        list[float] | None,
        typer.Option(
            help="Overlap from which on a box counts as found; may be repeated.",
            show_default="0.1, 0.3, 0.5",
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="attn, region_only, cosine, product or all; may be repeated."),
    ] = None,
    contrast: ContrastOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure whether heat lies in outlined lesions: pointing game, patch AP, overlap of boxes."""
    from pathflip import Archive
    from pathflip.evaluation.boxes import THRESHOLDS
    from pathflip.evaluation.grounding import VARIANTS, grounding, queries_of
    from pathflip.evaluation.prompts import read_tasks
    from pathflip.evaluation.zeroshot import default_tasks

    opened = Archive(archive)
    file = tasks or default_tasks(opened)
    queries = queries_of(read_tasks(file))
    if not queries:
        raise ConfigError(
            f"{file} has no task of kind presence.",
            hint="Grounding asks for the prompts of those; their label is an outline's class.",
        )
    variants = VARIANTS if variant and "all" in variant else tuple(variant or VARIANTS[:1])
    with working() as progress:
        document = grounding(
            opened, open_run(run, device=device), queries, truth=truth, split=split,
            variants=variants, contrast=contrast, thresholds=iou or THRESHOLDS,
            resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    keys = ("pointing", "pointing_chance", "patch_ap", "patch_ap_chance", "n")
    by_variant = document.get("variants", {document["variant"]: document})
    for name, found in by_variant.items():
        shown = [("all", found), *found["findings"].items()]
        rows = [
            [what, *(one[key] for key in keys), *(one["smoothed"] or {}).values()]
            for what, one in shown
        ]
        columns = ("finding", *keys, "smoothed pointing", "smoothed ap")
        show_table(f"{name} on {split}", columns, rows)
        rows = [row for what, one in shown if one["boxes"] for row in _box_rows(what, one["boxes"])]
        of_boxes = ("finding", "boxes", "value", "95 % from", "to", "chance")
        show_table(f"{name} on {split}, boxes", of_boxes, rows)


def _box_rows(finding: str, found: dict[str, Any]) -> list[list[Any]]:
    """Return the measures of a finding's boxes, a row each, with interval and chance."""
    ci = found["ci"] or {"iou": None, "hit": {}, "recall": {}}
    low, high = ci["iou"] or (None, None)
    rows = [[finding, "iou", found["iou"], low, high, found["iou_chance"]]]
    for key in ("hit", "recall"):
        for at, value in found[key].items():
            low, high = ci[key].get(at) or (None, None)
            chance = found[f"{key}_chance"][at]
            rows.append([finding, f"{key} at {at}", value, low, high, chance])
    return rows


@evaluate_app.command("vqa")
def evaluate_vqa(
    archive: ArchiveOption,
    run: TunedOption,
    split: SplitOption = "test",
    source: Annotated[
        str | None, typer.Option(help="Source of the questions, where there are several.")
    ] = None,
    mode: Annotated[
        Literal["letter_logit", "option_ll", "generate"] | None,
        typer.Option(help="How an option is chosen: next letter, its text's likelihood, writing."),
    ] = None,
    permute_options: Annotated[
        int, typer.Option(help="Show options in this many cyclic orders.", min=1, max=8)
    ] = 4,
    swapped: Annotated[
        bool, typer.Option("--swapped/--no-swapped", help="Ask with another patient's slide, too.")
    ] = True,
    llm: LlmOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on questions with options, calibration, and abstaining."""
    from pathflip import Archive
    from pathflip.evaluation.vqa import evaluate_vqa as measure

    with working() as progress:
        document = measure(
            Archive(archive), open_slide_qa(run, llm=llm, device=device), split=split,
            source=source, mode=mode, permute_options=permute_options, swap=swapped,
            resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    other = document.get("swapped", {})
    rows = [
        [name, one["n"], one["accuracy"], one["majority_baseline"],
         other.get("by_category", {}).get(name)]
        for name, one in document["by_category"].items()
    ]  # fmt: skip
    rows.append(
        ["all", document["n"], document["accuracy"], document["majority_baseline"],
         other.get("accuracy")]
    )  # fmt: skip
    columns = ("category", "n", "accuracy", "majority baseline", "slides swapped")
    show_table(f"{document['model']} on {split}, {mode}", columns, rows)
    names = ("macro", "accuracy_permuted", "consistency", "unanswered", "chance", "open")
    low, high = document.get("ci") or (None, None)
    what = [(name, document[name]) for name in names]
    what += [("95 % from", low), ("95 % to", high)]
    calibration = document["calibration"] or {}
    for name in ("ece", "floor", "ece_uncalibrated", "temperature", "confidence"):
        what.append((f"calibration {name}", calibration.get(name)))
    silent = document.get("abstaining", {})
    for name in ("unanswerable", "abstained", "precision", "recall", "wrongly"):
        if name in silent:
            what.append((f"abstaining {name}", silent[name]))
    show_table("", ("what", "value"), what)


@evaluate_app.command("caption")
def evaluate_caption(
    archive: ArchiveOption,
    run: TunedOption,
    split: SplitOption = "test",
    source: Annotated[
        str | None, typer.Option(help="Source of the captions, where there are several.")
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(help="Captions that pathflip caption --out wrote; default: write them."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="Sentence-embedding model: minilm, a folder, or owner/name on the hub; without "
            "one, similarity is TF-IDF."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption, tokens.", min=1)] = 512,
    llm: LlmOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure BLEU, ROUGE-L, similarity, findings named or invented, and unsupported sentences."""
    from pathflip import Archive
    from pathflip.evaluation.captioning import (
        evaluate_captions,
        read_predictions,
        sentence_embedder,
    )

    with working() as progress:
        written = None if predictions is None else read_predictions(predictions)
        answerer = None if predictions is not None else open_slide_qa(run, llm=llm, device=device)
        loaded = open_run(run, device=device) if answerer is None else answerer.run
        embed = (
            None if embedder is None else sentence_embedder(embedder, device=torch_device(device))
        )
        document = evaluate_captions(
            Archive(archive), loaded, answerer=answerer, predictions=written, split=split,
            source=source, embed=embed, max_new_tokens=max_new_tokens, resamples=resamples,
            seed=seed, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    baseline = document["baseline"]
    rows = [
        [name, value, baseline[name]]
        for name, value in document.items()
        if isinstance(value, float)
    ]
    for name in ("named", "invented") if "findings" in document else ():
        rows.append([f"findings {name}", document["findings"][name], baseline["findings"][name]])
    claims = document["unsupported"]
    estimate = "" if claims["by"] == "planted" else f", estimated by {claims['by']}"
    rows.append([f"sentences that no image supports{estimate}", claims["share"], None])
    title = f"{document['model']} on {split}: {document['n']} captions"
    show_table(title, ("metric", "value", "one caption for all"), rows)


@evaluate_app.command("all")
def evaluate_everything(
    archive: ArchiveOption,
    run: RunOption,
    tasks: TasksOption = None,
    truth: Annotated[str | None, typer.Option(help="As for evaluate grounding.")] = None,
    split: SplitOption = "test",
    out: Annotated[str | None, typer.Option(help="HTML page with curves and pictures.")] = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure retrieval, zero-shot and grounding in one pass; with --out, write a page."""
    from pathflip import Archive
    from pathflip.evaluation.prompts import read_tasks
    from pathflip.evaluation.suite import evaluate_all, headline
    from pathflip.evaluation.zeroshot import find_tasks
    from pathflip.report import write_pretrain_report

    opened = Archive(archive)
    file = tasks or find_tasks(opened)
    suite = read_tasks(file) if file else None
    with working() as progress:
        loaded = open_run(run, device=device)
        document = evaluate_all(
            opened, loaded, suite=suite, truth=truth, split=split,
            resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
        if out is not None:
            write_pretrain_report(opened, loaded, document, out, suite=suite, truth=truth)
    if as_json:
        print_json(document)
        return
    rows = [[name, value, chance] for name, (value, chance) in headline(document).items()]
    show_table(f"{document['model']} on {split}", ("metric", "value", "chance"), rows)
    if out is not None:
        print(f"Page: {out}")


@evaluate_app.command("ablations")
def evaluate_ablations(
    archive: ArchiveOption,
    run: Annotated[
        str, typer.Option("--run", help="Run folder; ablations are trained in its ablations/.")
    ],
    preset: Annotated[
        str | None, typer.Option(help="Settings of a preset; default: those of --run.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds each ablation is trained with.", min=1)] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this ablation; may be repeated.")
    ] = None,
    parallel: Annotated[int, typer.Option(help="Trainings at a time.", min=1)] = 1,
    tasks: TasksOption = None,
    truth: Annotated[
        str | None,
        typer.Option(
            help="Folder of <slide>.geojson, or trees.csv for patch models; default: lesions/, or "
            "that file, beside the slides' folder."
        ),
    ] = None,
    split: SplitOption = "test",
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and count trainings; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the model with parts left out, over several seeds, and measure each.

    Settings are those of the run in --run, or of --preset, with --config and -o over them as for
    pathflip pretrain. What is trained already is not trained again.
    """
    from pathflip.config import load_config

    jobs_ablations = job("ablations")
    options = load_config(
        jobs_ablations.AblationConfig,
        given=were_set(
            seeds=seeds, only=tuple(only) if only else None, parallel=parallel, tasks=tasks,
            truth=truth, split=split,
        ),
    )  # fmt: skip
    recipe = jobs_ablations.pretrain_config(
        run, preset=preset, config=config, overrides=overrides or ()
    )
    if dry_run:
        plan = jobs_ablations.planned(archive, run, options, settings=recipe)
        show_document(plan, as_json=as_json, dry_run=True)
        return
    with working() as progress:
        document = jobs_ablations.ablations(
            archive,
            run,
            options,
            settings=recipe,
            address=engine(address, local),
            progress=progress,
        )
    if as_json:
        print_json(document)
        return
    columns, rows = jobs_ablations.table(document)
    show_table(f"ablations in {run}", columns, rows)
