"""The part of the demo about patches: trees of planted truth, a model of four resolutions, a page.

    python -m jobs.demo --full        (the same as: make demo FULL=1)

Each cue of these trees shows at some levels alone, so that the page can say what pooling the levels
gains. A second run does only what is missing, as everywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.ingest.config import IngestConfig
from pathflip.files import write_file
from pathflip.geometry import Tiling

if TYPE_CHECKING:
    from jobs.demo_stages import Stages

TREE_SLIDES = 40
"""Slides of the cohort: 27 to train on with some 390 trees, and 10 of 5 patients to test."""
PRESET, STEPS = "mrplip/mini", 500
PARENT_UM, NODE_PX, PATCH_UM = 256.0, 128, 64.0
"""Trees have a root to a square of the cohort; a patch shows what a node of 20x does."""
SOURCE = "tree_captions"


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Results of the part about patches.

    Attributes:
        page: The page.
        document: Results of :func:`pathflip.evaluation.trees.evaluate_trees`.
        commands: Commands to try next, word by word.
    """

    page: Path
    document: dict[str, Any]
    commands: tuple[tuple[str, ...], ...]


def patches(
    out: Path, stages: Stages, *, slides: int = TREE_SLIDES, training: Sequence[str] = ()
) -> Patches:
    """Make the trees, train on them, measure against their truth and write the page.

    Args:
        out: Folder of the demo; this part is in ``out``/patches.
        stages: Announcer of the stages.
        slides: Slides of the cohort.
        training: Settings of the training over the preset's.
    """
    from pathflip.archive import Archive
    from pathflip.checkpoints import load_run
    from pathflip.evaluation.patch_text import patch_reader
    from pathflip.evaluation.trees import evaluate_trees
    from pathflip.progress import show_progress
    from pathflip.report.patches import write_patches_report

    folder = out / "patches"
    uri, run = str(folder / "archive"), folder / "mini"
    _make_archive(folder, uri, stages, slides=slides)
    _train(uri, run, training, stages)
    archive, loaded = Archive(uri), load_run(run, family="mrplip")
    with (
        stages.run("evaluate trees", "Measuring it against the planted truth"),
        show_progress() as progress,
    ):
        reader = patch_reader(loaded, pixels=False)
        document = evaluate_trees(archive, reader, probes=False, progress=progress)
        write_file(folder / "evaluation.json", json.dumps(document, indent=1))
    with stages.run("patches' report", "Writing the page of patches"):
        page = write_patches_report(
            archive, loaded, document, out / "patches.html",
            meanings=_meanings(folder), title="pathflip demo: patches at four resolutions",
        )  # fmt: skip
    where = ("--archive", uri)
    return Patches(
        page=page,
        document=document,
        commands=(
            ("search", "grooved nuclei", *where, "--encoder", f"mrplip:{run}",
             "--level", "patch", "--where", "split=test", "--out", "patches-found.html"),
            ("trees", "show", *where, "--out", "tree.html"),
            ("evaluate", "trees", *where, "--run", str(run)),
        ),
    )  # fmt: skip


def print_patches(document: Mapping[str, Any]) -> None:
    """Print the accuracy of each task, by level and pooled, beside chance."""
    from rich.console import Console
    from rich.table import Table

    tasks = ("joint", "architecture", "nuclei")
    levels = list(document["joint"]["levels"])
    table = Table(title="on the test trees", title_justify="left", caption_justify="left")
    for heading in ("accuracy", *levels, "pooled", "chance"):
        table.add_column(heading, justify="left" if heading == "accuracy" else "right")
    for task in tasks:
        own = document[task]
        found = [*own["levels"].values(), own["pooled"]]
        values = [*(one["accuracy"] for one in found), own["chance"]]
        table.add_row(task, *("" if value is None else f"{value:.3f}" for value in values))
    table.caption = "Joint: a tree's architecture and a quadrant's nuclei, both right."
    Console().print(table)


def _make_archive(folder: Path, uri: str, stages: Stages, *, slides: int) -> None:
    """Draw the cohort, ingest it, cut its trees, and give them their captions."""
    from jobs.ingest import ingest
    from jobs.trees import TreesConfig, trees
    from pathflip.archive import Archive
    from pathflip.interop.tree_captions import import_tree_captions, read_tree_captions
    from pathflip.keywords import load_lexicon
    from pathflip.progress import Progress, show_progress
    from pathflip.synth import make_tree_cohort

    started = time.monotonic()
    with (
        stages.run("make trees' slides", f"Making {slides} slides in {folder}"),
        show_progress() as progress,
    ):
        make_tree_cohort(
            folder,
            slides=slides,
            progress=lambda done, total: progress(
                Progress(what="drawing", done=done, total=total, seconds=time.monotonic() - started)
            ),
        )
    with stages.run("ingest them", f"Ingesting them into {uri}"), show_progress() as progress:
        ingest([str(folder / "slides")], uri, _settings(folder), progress=progress)
    with stages.run("trees", "Cutting patch trees"), show_progress() as progress:
        trees(uri, TreesConfig(parent_um=PARENT_UM, node_px=NODE_PX), progress=progress)
    with stages.run("captions", "Importing captions of their nodes"):
        import_tree_captions(
            uri,
            read_tree_captions(Archive(uri), folder / f"{SOURCE}.jsonl"),
            source=SOURCE,
            lexicon=load_lexicon(folder / "terms.txt"),
        )


def _settings(folder: Path, **more: Any) -> IngestConfig:
    return IngestConfig(
        tiling=Tiling(region_um=PARENT_UM, patch_um=PATCH_UM),
        patients=str(folder / "labels.csv"),
        **more,
    )


def _train(uri: str, run: Path, settings: Sequence[str], stages: Stages) -> None:
    """Train a model of the trees, and give the archive its vectors of single patches."""
    from jobs.ingest import ingest
    from jobs.pretrain import pretrain, resolve
    from pathflip.progress import show_progress

    config = resolve(PRESET, overrides=[f"steps={STEPS}", *settings])
    with (
        stages.run("pretrain patches", f"Training {PRESET} in {run}; it resumes, too"),
        show_progress() as progress,
    ):
        pretrain(uri, run, config, progress=progress)
    with stages.run("patches", "Embedding single patches with it"), show_progress() as progress:
        more = _settings(run.parent, encoder=f"mrplip:{run}", add_encoder=True)
        ingest([str(run.parent / "slides")], uri, more, progress=progress)


def _meanings(folder: Path) -> dict[str, str]:
    """Return {keyword: the value it names} of the keywords that name one value of the cohort."""
    from pathflip.keywords import caption_keywords, load_lexicon
    from pathflip.synth.trees import FORMS

    lexicon = load_lexicon(folder / "terms.txt")
    found: dict[str, set[str]] = {}
    for value, forms in FORMS.items():
        for word in caption_keywords(". ".join(forms), lexicon=lexicon):
            found.setdefault(word, set()).add(value)
    return {word: values.pop() for word, values in found.items() if len(values) == 1}
