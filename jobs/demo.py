"""The whole path in one command: slides, archive, trained models, search, answers, reports.

    python -m jobs.demo [--slides FOLDER] [--out DIR] [--full] [--serve]       (also: make demo)

Without a folder it makes a cohort of slides with captions and questions whose truth is known, three
of them with a fault or nothing on them, trains the small presets on it and shows what they find and
what they answer. Slides of one's own have no captions: they are archived and searched by image. A
second run does only what is missing. With --full patch trees follow (jobs/demo_patches.py), with
--serve the service is started and asked something.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.demo_patches import TREE_SLIDES, patches, print_patches
from jobs.ingest.config import IngestConfig
from pathflip.errors import ArchiveError, ConfigError, PathFLIPError, SlideError
from pathflip.evaluation.prompts import read_tasks
from pathflip.files import replacing
from pathflip.geometry import Tiling
from pathflip.interop.questions import import_questions

if TYPE_CHECKING:
    from jobs.ingest.result import IngestResult
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.report.archive import SampleSearch
    from pathflip.slide_qa import SlideQA

TRUNCATED, WITHOUT_MPP, GLASS = "truncated.svs", "without-mpp.tif", "glass.svs"
PLANTED = (TRUNCATED, WITHOUT_MPP)
COHORT = 960
"""Slides made: fewer, and a model trained from scratch memorises them (docs/notes/mini.md)."""
SIZE_UM = 1024.0
REGION_UM, PATCH_UM = 256.0, 32.0
"""The cohort's slides are small, so its regions are: 16 a slide, of 64 patches."""
PRESET, TUNE_PRESET = "pathflip/mini", "instruct/mini"
_WORKERS = f"max_workers={min(2, os.cpu_count() or 1)}"
"""Workers of both trainings, unless settings say otherwise."""
RESULTS = 6
QUERY_PX = 360


@dataclass
class Stages:
    """Announcer of stages on stderr, with the time each took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def run(self, name: str, saying: str) -> Iterator[None]:
        """Time one stage."""
        print(f"{saying} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def demo(
    out: str | Path = "demo",
    *,
    slides: str | Path | None = None,
    cohort: int = COHORT,
    training: Sequence[str] = (),
    language: Sequence[str] = (),
    tuning: Sequence[str] = (),
    full: bool = False,
    tree_slides: int = TREE_SLIDES,
    tree_training: Sequence[str] = (),
    serve: bool = False,
) -> int:
    """Run the demo.

    Args:
        out: Folder for everything written: slides, archive, run, reports.
        slides: The user's slides, which are only read; None to make some in ``out``/slides.
        cohort: Number of slides to make, besides an empty one and two faulty ones.
        training: Settings of the pretraining over the preset's, ``key=value``.
        language: Settings of the small language model.
        tuning: Settings of the tuning over the preset's.
        full: Whether to show patch trees, too.
        tree_slides: Number of slides to make for them.
        tree_training: Settings of the pretraining on them over the preset's.
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
    with stages.run("make slides", f"Making {cohort + 3:,} slides in {source}"):
        make_slides(out, cohort=cohort)
    settings = IngestConfig(
        tiling=Tiling(region_um=REGION_UM, patch_um=PATCH_UM),
        patients=str(out / "labels.csv"),
        captions=str(out / "captions.csv"),
        questions=str(out / "vqa.jsonl"),
    )
    archive, result = _ingested(out, source, settings, stages)
    import_questions(archive.uri, out / "abstain.jsonl")
    run, document = _trained(archive.uri, out / "run", training, stages)
    answerer, vqa, captions = _tuned(archive.uri, out, language, tuning, stages)
    found = patches(out, stages, slides=tree_slides, training=tree_training) if full else None
    with stages.run("report", "Writing the reports"):
        from pathflip.report.answers import write_answers_report
        from pathflip.report.archive import write_report
        from pathflip.report.pretrain import write_pretrain_report

        archive.refresh()
        write_report(archive, out / "slides.html", title="Slides of the demo")
        report = write_pretrain_report(
            archive,
            run,
            document,
            out / "report.html",
            suite=read_tasks(out / "tasks.yaml"),
            title="pathflip demo",
        )
        answers = write_answers_report(
            archive,
            answerer,
            out / "answers.html",
            vqa=vqa,
            captions=captions,
            title="pathflip demo: captions and answers",
        )
    _print_summary(archive, result, stages.seconds, planted=PLANTED)
    _print_results(document, vqa, captions)
    if found is not None:
        print_patches(found.document)
    tuned = str(answerer.run.path)
    where = f"--archive {_quoted(archive.uri)} --run {_quoted(str(run.path))}"
    slide = next(iter(sorted(captions["captions"])))
    print(f"Open {report} and {answers}. Then try:")
    print(f'  {_program()} search "necrosis" {where} --level region --out found.html')
    print(f'  {_program()} ground {slide} "necrosis" {where} --out heat.png')
    of_tuned = f"--archive {_quoted(archive.uri)} --run {_quoted(tuned)}"
    print(f'  {_program()} ask {slide} "How many foci of necrosis are there?" {of_tuned}')
    if found is not None:
        print(f"Open {found.page}, too, and try:")
        for words in found.commands:
            print(f"  {_program()} {' '.join(map(_quoted, words))}")
    print("And the service, which answers what OpenAI clients ask (docs/howto/serve.md):")
    print(f"  {_program()} serve {where} --llm {_quoted(tuned)}")
    if serve:
        _ask_the_service(archive.uri, str(run.path), tuned, slide)
    quarantined = archive.slides("quarantined", columns=["uri"])["uri"].to_pylist()
    return 3 if {Path(uri).name for uri in quarantined} - set(PLANTED) else 0


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
    _print_summary(archive, result, stages.seconds, planted=())
    print(f"Open {report}" + (f", then try: {command}" if command else "."))
    return result.exit_code


def _ingested(
    out: Path, source: Path, config: IngestConfig, stages: Stages
) -> tuple[Archive, IngestResult]:
    from jobs.ingest import ingest
    from pathflip.archive import Archive
    from pathflip.progress import show_progress

    uri = str(_archive_for(out, Path(os.path.abspath(source))))
    with (
        stages.run("ingest", f"Ingesting into {uri}; interrupt it and run it again as you like"),
        show_progress() as progress,
    ):
        result = ingest([str(source)], uri, config, progress=progress)
    return Archive(uri), result


def _trained(
    archive: str, folder: Path, settings: Sequence[str], stages: Stages
) -> tuple[Run, dict[str, Any]]:
    """Train, index and measure; steps already finished are not repeated."""
    from jobs.index import IndexConfig, index
    from jobs.pretrain import pretrain, resolve
    from pathflip.archive import Archive
    from pathflip.checkpoints import load_run
    from pathflip.evaluation.suite import evaluate_all
    from pathflip.progress import show_progress

    config = resolve(PRESET, overrides=[_WORKERS, *settings])
    with (
        stages.run("pretrain", f"Training {PRESET} in {folder}; it resumes, too"),
        show_progress() as progress,
    ):
        pretrain(archive, folder, config, progress=progress)
    with stages.run("index", "Indexing slides and regions"), show_progress() as progress:
        index(archive, str(folder), config=IndexConfig(), progress=progress)
    run = load_run(folder)
    with stages.run("evaluate", "Measuring against the planted truth"), show_progress() as shown:
        document = evaluate_all(
            Archive(archive),
            run,
            suite=read_tasks(folder.parent / "tasks.yaml"),
            split="test",
            progress=shown,
        )
    return run, document


def _tuned(
    archive: str, out: Path, language: Sequence[str], settings: Sequence[str], stages: Stages
) -> tuple[SlideQA, dict[str, Any], dict[str, Any]]:
    """Make a small language model, tune it, and ask it about the test slides."""
    from jobs.tune import resolve, tune
    from pathflip.archive import Archive
    from pathflip.checkpoints import load_run
    from pathflip.config import load_config
    from pathflip.evaluation.captioning import evaluate_captions
    from pathflip.evaluation.vqa import evaluate_vqa
    from pathflip.models.small_llm import SmallLLMConfig, make_from_archive
    from pathflip.progress import show_progress
    from pathflip.slide_qa import SlideQA

    opened = Archive(archive)
    base, folder = out / "llm", out / "tuned"
    with (
        stages.run("language model", f"Training a small Qwen3 from scratch in {base}"),
        show_progress() as progress,
    ):
        wanted = load_config(SmallLLMConfig, overrides=language)
        vision = load_run(out / "run").model
        make_from_archive(opened, base, wanted, vision=vision, source="vqa", progress=progress)
    given = {"run": str(out / "run"), "llm": str(base)}
    config = resolve(TUNE_PRESET, overrides=[_WORKERS, *settings], given=given)
    with (
        stages.run("tune", f"Tuning it to see ({TUNE_PRESET}) in {folder}; it resumes, too"),
        show_progress() as progress,
    ):
        tune(archive, folder, config, progress=progress)
    with stages.run("ask", "Asking about the test slides"), show_progress() as progress:
        answerer = SlideQA.from_run(folder)
        vqa = evaluate_vqa(opened, answerer, split="test", progress=progress)
        captions = evaluate_captions(
            opened, answerer.run, answerer=answerer, split="test", progress=progress
        )
    return answerer, vqa, captions


def _ask_the_service(archive: str, run: str, tuned: str, slide: str) -> None:
    """Start the service as a user would, ask it about a slide with OpenAI's client, and end it."""
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
            if not line:
                raise ConfigError(
                    "The service did not start.", hint="What it said is above.", code="not_started"
                )
            url = json.loads(line)["url"]
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
        finally:
            service.send_signal(signal.SIGTERM)


def make_slides(out: Path, *, cohort: int) -> None:
    """Make the missing ones of the demo's slides in ``out``/slides."""
    from pathflip.progress import Progress, show_progress
    from pathflip.synth import make_cohort, make_slide

    started = time.monotonic()
    with show_progress() as progress:
        make_cohort(
            out,
            slides=cohort,
            size_um=SIZE_UM,
            progress=lambda done, total: progress(
                Progress(what="drawing", done=done, total=total, seconds=time.monotonic() - started)
            ),
        )
    folder = out / "slides"
    made = sorted(path for path in folder.iterdir() if path.name[:1] == "s")
    px = round(SIZE_UM / 0.5)
    if not (folder / GLASS).exists():
        make_slide(folder / GLASS, width=px, height=px, mpp=0.5, layout="aperio", tissue="glass")
    for name, suffix, spoil in ((TRUNCATED, ".svs", _truncate), (WITHOUT_MPP, ".tif", _forget_mpp)):
        _plant(folder / name, next(path for path in made if path.suffix == suffix), spoil)


def _plant(path: Path, source: Path, spoil: Callable[[Path], None]) -> None:
    if path.exists():
        return
    with replacing(path) as copy:
        shutil.copyfile(source, copy)
        spoil(copy)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 6 // 10)


def _forget_mpp(path: Path) -> None:
    import tifffile

    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            if isinstance(page, tifffile.TiffPage) and "ResolutionUnit" in page.tags:
                page.tags["ResolutionUnit"].overwrite(1)  # 1: no unit, so a ratio only


def _archive_for(out: Path, source: Path) -> Path:
    """Return the archive's path in ``out``; user slides and made ones have separate archives."""
    from pathflip.archive import Archive

    for number in count(1):
        path = out / ("archive" if number == 1 else f"archive-{number}")
        try:
            uris = Archive(path).slides(columns=["uri"])["uri"].to_pylist()
        except ArchiveError as error:
            if error.code == "missing_archive":
                return path
            raise
        if all(Path(uri).is_relative_to(source) for uri in uris):
            return path
    raise AssertionError("count() does not end")


def sample_search(archive: Archive) -> tuple[SampleSearch | None, str]:
    """Search with a picture of a region that stands out; None where that cannot be done.

    Returns:
        The search, and the command that does the same.
    """
    from pathflip.archive.search import search
    from pathflip.encoders import load_encoder
    from pathflip.image_query import ImageQuery, embed_image
    from pathflip.report.archive import SampleSearch
    from pathflip.slides.reader import SlideReader

    name, region = _unusual_region(archive)
    if region is None:
        return None, ""
    row = archive.slide(region["slide_id"])
    tiling = Tiling(**archive.tiling())
    x0, y0, size0 = _tissue_square(archive, region["id"], tiling, mpp=row["mpp"])
    override = row["mpp"] if row["mpp_source"] == "override" else None
    try:
        vector = embed_image(
            ImageQuery(path=Path(row["uri"]), box=(x0, y0, size0, size0)),
            encoder=load_encoder(name),
            tiling=tiling,
            mpp=override,
        )
        with SlideReader(patches=1, px=16) as reader:
            picture = reader.view(
                row["uri"], x0=x0, y0=y0, size0=size0, px=QUERY_PX, slide_mpp=override
            )
    except (ConfigError, SlideError) as error:  # its file is gone or changed since it was ingested
        print(f"No sample search: {error}", file=sys.stderr)
        return None, ""
    sample = SampleSearch(
        title=f"Regions that look like {size0 * row['mpp']:,.0f} µm of {Path(row['uri']).name}, "
        f"at x {x0:,} px, y {y0:,} px, by {name} features",
        results=search(archive, vector, encoder=name, k=RESULTS),
        picture=picture,
    )
    image = shlex.quote(f"{_shown(row['uri'])}#{x0},{y0},{size0},{size0}")
    where = _quoted(archive.uri)
    return sample, f"{_program()} search --archive {where} --image {image} --out results.html"


def _unusual_region(archive: Archive) -> tuple[str, dict[str, Any] | None]:
    """Return an encoder, and of some thousand regions the one least like the rest of its slide."""
    import numpy as np
    import pyarrow.compute as pc

    from pathflip.archive import vectors

    name = next(iter(archive.encoders()))
    _, entry = archive.encoder(name)
    rows = archive.dataset(entry["embeddings_table"]).to_table(
        columns=["id", "slide_id", "n_patches", "vector"],
        filter=pc.field("kind") == "region",
        limit=4096,
    )
    ready = archive.ready_ids(name)
    rows = rows.filter([slide in ready for slide in rows["slide_id"].to_pylist()]).sort_by("id")
    if not len(rows):
        return name, None
    found = vectors(rows["vector"])
    slides = rows["slide_id"].to_numpy()
    distance = np.zeros(len(found))
    for slide in np.unique(slides):
        of_it = slides == slide
        distance[of_it] = np.linalg.norm(found[of_it] - found[of_it].mean(axis=0), axis=1)
    patches = rows["n_patches"].to_numpy()
    distance[patches < 0.75 * patches.max()] = -1  # a fragment differs for being one
    region: dict[str, Any] = rows.slice(int(distance.argmax()), 1).to_pylist()[0]
    return name, region


def _tissue_square(
    archive: Archive, region_id: str, tiling: Tiling, *, mpp: float
) -> tuple[int, int, int]:
    """Return (x0, y0, size0) of a region's largest all-tissue square of patches, level-0 px."""
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view

    from pathflip.geometry import patch_rects

    slide_id, _, place = region_id.rpartition("/")
    regions = archive.regions(slide_id, columns=["region_id", "patch_mask"]).to_pylist()
    mask = next(row["patch_mask"] for row in regions if row["region_id"] == region_id)
    kept = np.reshape(mask, (tiling.side, tiling.side)) != 0
    for side in range(tiling.side, 0, -1):
        whole = sliding_window_view(kept, (side, side)).all(axis=(2, 3))
        if whole.any():
            break
    row, col = np.argwhere(whole)[0]
    rx, ry = map(int, place.split("_"))
    rects = patch_rects(tiling, rx=rx, ry=ry, mpp=mpp).reshape(tiling.side, tiling.side, 4)
    x0, y0 = rects[row, col, :2].tolist()
    last_x, last_y, w0, h0 = rects[row + side - 1, col + side - 1].tolist()
    return x0, y0, min(last_x + w0 - x0, last_y + h0 - y0)


def _program() -> str:
    beside = Path(sys.executable).with_name("pathflip")
    on_path = shutil.which("pathflip")
    return "pathflip" if on_path or not beside.exists() else shlex.quote(_shown(str(beside)))


def _quoted(path: str) -> str:
    return shlex.quote(_shown(path))


def _shown(path: str) -> str:
    """Return a path, relative to the working directory where it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _print_summary(
    archive: Archive, result: IngestResult, seconds: dict[str, float], *, planted: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    stats = archive.stats()
    run = result.as_json()
    done = {name: n for name, n in run["slides"].items() if n}
    speed = f"{run['patches_per_second']:,.0f}" if run["patches"] else "nothing was left to read"
    table = Table(title="pathflip demo", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (
        ("slides in the archive", _listed(stats["status"])),
        ("in this run", _listed(done)),
        ("regions", f"{stats['regions']:,}"),
        ("patches", f"{stats['patches']:,}"),
        ("patches/s", speed),
        *((name, f"{took:,.1f} s") for name, took in seconds.items()),
        ("archive size", f"{stats['bytes'] / 1e6:,.1f} MB"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    columns = ["uri", "reason", "message"]
    bad = archive.slides("quarantined", columns=columns).to_pylist()
    if not bad:
        return
    faults = Table(title="quarantined", title_justify="left", caption_justify="left")
    if planted:
        faults.caption = "Files spoilt on purpose show what happens to bad ones; they are no error."
    for heading in ("file", "reason", "what is wrong"):
        faults.add_column(heading, overflow="fold")
    for row in bad:
        name = Path(row["uri"]).name
        note = " (spoilt on purpose)" if name in planted else ""
        faults.add_row(escape(name + note), row["reason"], escape(row["message"] or ""))
    console.print(faults)


def _print_results(document: dict[str, Any], vqa: dict[str, Any], captions: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pathflip.evaluation.suite import headline

    table = Table(title="on the test slides", title_justify="left")
    for heading in ("measured", "found", "chance"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    rows = dict(headline(document))
    rows["questions"] = (vqa["accuracy"], vqa["majority_baseline"])
    if vqa.get("swapped"):
        rows["questions, another slide shown"] = (vqa["swapped"]["accuracy"], None)
    plain = captions["baseline"]
    if findings := captions.get("findings"):
        rows["findings named"] = (findings["named"], plain["findings"]["named"])
        rows["absent findings named"] = (findings["invented"], plain["findings"]["invented"])
    rows["sentences no image supports"] = (captions["unsupported"]["share"], None)
    if calibration := vqa.get("calibration"):
        rows["calibration error of choices"] = (calibration["ece"], None)
    if silent := vqa.get("abstaining"):
        rows["unanswerable questions abstained from"] = (silent["recall"], None)
    rows["bleu-1"] = (captions["bleu1"], plain["bleu1"])
    rows["rouge-l"] = (captions["rouge_l"], plain["rouge_l"])
    for name, values in rows.items():
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    table.caption = (
        "Beside questions stands the majority answer, beside captions one caption for all slides."
    )
    Console().print(table)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items())) or "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--slides", metavar="FOLDER", help="your own slides; only read")
    parser.add_argument("--out", metavar="DIR", default="demo", help="default: demo")
    parser.add_argument(
        "--serve", action="store_true", help="start the service at the end and ask it something"
    )
    parser.add_argument(
        "--full", action="store_true", help="patch trees and a model of four resolutions, too"
    )
    given = parser.parse_args(argv)
    if given.full and given.slides:
        parser.error("--full shows slides that it makes; leave --slides out")
    return demo(given.out, slides=given.slides, full=given.full, serve=given.serve)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PathFLIPError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("demo: interrupted; the same command continues where it stopped.", file=sys.stderr)
        sys.exit(130)
