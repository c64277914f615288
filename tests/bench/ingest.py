"""Benchmark of ingest, beside the limits of decoding and disk: ``python -m tests.bench.ingest``.

Makes its own slides (kept in the system's temporary folder), runs both sides of every ratio in one
run, interleaved, and counts CPU seconds of all processes, so that other load on the machine
disturbs the figures little. docs/notes/performance.md says what each figure means and has the
measurements.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import openslide
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from jobs.stages import ActorPool
from pathflip.encoders import load_encoder
from pathflip.geometry import Tiling, patch_rects, plan_regions
from pathflip.slides.slide import Halving, Slide
from pathflip.slides.tissue import TissueConfig, find_tissue
from pathflip.synth import large
from pathflip.synth import tiff as synth_tiff
from tests.bench import meter

TILING = Tiling()
PX = TILING.patch_px
ROUNDS = 5
REAL = Path(__file__).resolve().parents[3] / "shared" / "slides" / "CMU-1-Small-Region.svs"

Report = dict[str, Any]


# -- slides ---------------------------------------------------------------------------------------


def slide(*, side: int, mpp: float, **kwargs: Any) -> Path:
    """A synthetic slide, made once for its arguments and the code that makes it."""
    kwargs |= {"width": side, "height": side, "mpp": mpp}
    source = inspect.getsource(large) + inspect.getsource(synth_tiff)
    key = hashlib.sha256((json.dumps(kwargs, sort_keys=True) + source).encode()).hexdigest()[:16]
    suffix = ".svs" if kwargs.get("layout") == "aperio" else ".tif"
    path = Path(tempfile.gettempdir(), "pathflip-bench", key + suffix)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        say(f"making a slide of {side} px at {mpp} µm/px")
        large.make_slide(path, **kwargs)
    return path


def slides(quick: bool) -> dict[str, Path]:
    """The slides of the reading figures."""
    side = 8192 if quick else 20480
    return {
        "20x_256": slide(side=side, mpp=0.5),
        "20x_240": slide(side=side, mpp=0.5, tile_px=240),
        # Levels 1, 4, 16: patches at 0.5 have to be made from level 0, as on most real 40x slides.
        "40x": slide(side=side, mpp=0.25, layout="aperio"),
        "0.2738": slide(side=side, mpp=0.2738, layout="aperio"),
    }


def cohort(n: int, quick: bool) -> list[str]:
    """``n`` different 20x slides of one size."""
    side = 12288 if quick else 16384
    return [str(slide(side=side, mpp=0.5, seed=100 + i)) for i in range(n)]


def regions_of(opened: Slide, limit: int) -> list[NDArray[np.int64]]:
    """Rectangles of the tissue patches of a slide's first ``limit`` full regions."""
    config = TissueConfig()
    mask = find_tissue(opened.overview(config.mpp), mpp=config.mpp, slide_mpp=opened.mpp)
    regions = plan_regions(
        TILING, width=opened.width, height=opened.height, mpp=opened.mpp, tissue=mask
    )
    fullest = np.argsort(-regions.patch_mask.sum(axis=1), kind="stable")[:limit]
    return [
        patch_rects(TILING, rx=int(regions.rx[i]), ry=int(regions.ry[i]), mpp=opened.mpp)[
            regions.patch_mask[i]
        ]
        for i in sorted(fullest)
    ]


# -- reading --------------------------------------------------------------------------------------


def floor(opened: Slide, regions: Sequence[NDArray[np.int64]]) -> Callable[[], None]:
    """pread and libjpeg-turbo decoding, at full size, of each tile under the patches, once."""
    layout = opened._jpeg[0]
    tiles: set[int] = set()
    for x, y, w, h in np.concatenate(regions).tolist():
        for row in range(y // layout.tile_h, -(-(y + h) // layout.tile_h)):
            for column in range(x // layout.tile_w, -(-(x + w) // layout.tile_w)):
                tiles.add(row * layout.across + column)
    places = [(int(layout.counts[t]) - 2, int(layout.offsets[t]) + 2) for t in sorted(tiles)]
    out = np.empty((layout.tile_h, layout.tile_w, 3), np.uint8)
    file, header = opened._file, layout.header

    def decode() -> None:
        for count, offset in places:
            simplejpeg.decode_jpeg(header + os.pread(file, count, offset), buffer=out)

    return decode


def ours(
    opened: Slide, regions: Sequence[NDArray[np.int64]], halving: Halving
) -> Callable[[], None]:
    """``Slide.read_patches``, region by region as the job asks for them."""
    out = np.empty((TILING.slots, PX, PX, 3), np.uint8)

    def read() -> None:
        opened._halving = halving
        for rects in regions:
            good = opened.read_patches(rects, mpp=TILING.mpp, out=out[: len(rects)])
            if not good.all():
                raise RuntimeError("a synthetic slide is damaged")

    return read


def patch_by_patch(path: Path, rects: NDArray[np.int64]) -> Callable[[], None]:
    """Read as other tools do: openslide-python, one read_region a patch, to RGB, to size."""

    def read() -> None:
        with openslide.OpenSlide(path) as handle:  # a new one: the last round's tiles are cached
            for x, y, w, h in rects.tolist():
                rgb = np.asarray(handle.read_region((x, y), 0, (w, h)).convert("RGB"))
                if rgb.shape[0] != PX:
                    cv2.resize(rgb, (PX, PX), interpolation=cv2.INTER_AREA)

    return read


def rates(sides: dict[str, tuple[int, Callable[[], None]]]) -> dict[str, float]:
    """Patches per CPU second of each side: its best of some rounds, the sides taking turns."""
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, (patches, work) in sides.items():
            started = time.process_time()
            work()
            best[name] = max(best.get(name, 0.0), patches / (time.process_time() - started))
    return best


def read(quick: bool) -> Report:
    """Reading against the floor and against OpenSlide patch by patch."""
    found: dict[str, dict[str, float]] = {}
    for name, path in slides(quick).items():
        with Slide(path) as opened:
            if opened.reader != "direct":
                raise RuntimeError(f"{name}: {opened.reader_note}")
            regions = regions_of(opened, 2 if quick else 6)
            n = sum(len(rects) for rects in regions)
            sides = {
                "floor": (n, floor(opened, regions)),
                "exact": (n, ours(opened, regions, "exact")),
                "openslide": (len(regions[0]), patch_by_patch(path, regions[0])),
            }
            if name not in ("20x_256", "20x_240"):
                sides["dct"] = (n, ours(opened, regions, "dct"))
            found[name] = rates(sides)
            say(f"{name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in found[name].items()))
    over = {name: rate["exact"] / rate["floor"] for name, rate in found.items()}
    return {
        "read_over_floor": {
            "20x_256": over["20x_256"],
            "20x_240": over["20x_240"],
            "40x_exact": over["40x"],
            "40x_halved": found["40x"]["dct"] / found["40x"]["floor"],
        },
        "over_openslide": {
            "20x": found["20x_256"]["exact"] / found["20x_256"]["openslide"],
            "40x": found["40x"]["exact"] / found["40x"]["openslide"],
        },
        "reading": {
            "patches_per_cpu_second": found,
            "0.2738_over_floor": over["0.2738"],
            "0.2738_over_openslide": found["0.2738"]["exact"] / found["0.2738"]["openslide"],
            "20x_240_over_openslide": found["20x_240"]["exact"] / found["20x_240"]["openslide"],
            "40x_halved_over_openslide": found["40x"]["dct"] / found["40x"]["openslide"],
        },
    }


def tissue(quick: bool) -> Report:
    """Overview, mask and regions of one slide of 40960 x 40960 px."""
    path = slide(side=16384 if quick else 40960, mpp=0.5)
    config = TissueConfig()
    seconds = []
    for _ in range(ROUNDS):
        with Slide(path) as opened:
            times = [time.process_time()]
            overview = opened.overview(config.mpp)
            times.append(time.process_time())
            mask = find_tissue(overview, mpp=config.mpp, slide_mpp=opened.mpp, config=config)
            times.append(time.process_time())
            plan_regions(
                TILING, width=opened.width, height=opened.height, mpp=opened.mpp, tissue=mask
            )
            times.append(time.process_time())
            seconds.append(np.diff(times).tolist())
    parts = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return {
        "tissue_cpu_seconds": statistics.median(sum(row) for row in seconds),
        "tissue": dict(zip(("overview", "mask", "regions"), parts, strict=True)),
    }


def features(quick: bool) -> Report:
    """Cosine between features of exactly and of DCT-halved patches."""
    sources = {"synthetic 40x": (slides(quick)["40x"], TILING.mpp)}
    if REAL.exists():  # scanned at 0.499: read at 1.0 it is halved too
        sources["CMU-1-Small-Region, 20x to 10x"] = (REAL, 0.998)
    found: Report = {}
    for encoder in (load_encoder("texture"),):
        for name, (path, mpp) in sources.items():
            with Slide(path) as opened:
                if path == REAL:
                    step = 2 * PX
                    at = [
                        (x, y, step, step)
                        for y in range(0, opened.height - step, step)
                        for x in range(0, opened.width - step, step)
                    ]
                    rects = np.array(at, np.int64)
                else:
                    rects = np.concatenate(regions_of(opened, 2))
                both = []
                for halving in ("exact", "dct"):
                    opened._halving = halving  # type: ignore[assignment]
                    out = np.empty((len(rects), PX, PX, 3), np.uint8)
                    opened.read_patches(rects, mpp=mpp, out=out)
                    both.append(out)
            vectors = [encoder(patches) for patches in both]
            cosine = _cosine(*vectors)
            gap = (both[0].astype(np.int16) - both[1]).astype(np.float64)
            # Scale for the cosine: other patches of the slide, in random order.
            other = _cosine(vectors[0], np.random.default_rng(0).permutation(vectors[0]))
            found.setdefault(encoder.name, {})[name] = {
                "patches": len(rects),
                "cosine_mean": float(cosine.mean()),
                "cosine_1_percent": float(np.quantile(cosine, 0.01)),
                "cosine_min": float(cosine.min()),
                "cosine_to_another_patch": float(other.mean()),
                "psnr_db": float(10 * np.log10(255**2 / np.mean(gap**2))),
            }
    return {"cosine_exact_to_dct": found}


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    dots = (a * b).sum(axis=1)
    cosine: NDArray[np.float32] = dots / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosine


# -- the job --------------------------------------------------------------------------------------


def job(quick: bool) -> Report:
    """The job on Ray and the same code in a bare loop, each on two sizes: the slope counts.

    Even the small size is large enough for Ray to have started the second actor, so that the slope
    holds no start of a process.
    """
    few, many = cohort(4 if quick else 6, quick), cohort(10 if quick else 16, quick)
    warm = {"sources": cohort(1, quick)}
    one, two = {"actors": 1}, {"actors": 2}
    turn = [
        {"sources": sources, "config": config, "address": "ray"}
        for config in (one, two)
        for sources in (few, many)
    ]
    repeat = 1 if quick else 2
    say("the job on Ray")
    ray_warm, *on_ray = _run([warm | {"address": "ray"}] + turn * repeat)
    say("the same in a bare loop")
    loop = [{"sources": few, "bare": True}, {"sources": many, "bare": True}]
    _, *bare = _run([warm | {"bare": True}] + loop * repeat)
    ones = [step for index, step in enumerate(on_ray) if index % 4 < 2]
    twos = [step for index, step in enumerate(on_ray) if index % 4 >= 2]
    slope = {name: _slope(s) for name, s in {"ray_1": ones, "ray_2": twos, "bare": bare}.items()}
    n_few, n_many = (bare[i].answer["patches"] for i in (0, 1))
    wall = {
        name: min(s.answer["seconds"] for s in steps[1::2])
        - min(s.answer["seconds"] for s in steps[::2])
        for name, steps in {"1": ones, "2": twos}.items()
    }
    return {
        # One actor against one process: two at once share caches, which is not Ray's doing.
        "ray_overhead_ms_per_patch": slope["ray_1"] - slope["bare"],
        "patches_per_cpu_second": 1e3 / slope["ray_2"],
        "actors_2_over_1": wall["1"] / wall["2"],
        "job": {
            "patches": [n_few, n_many],
            "marginal_ms_per_patch": slope,
            "fixed_cpu_s_per_run_in_a_warm_session": min(s.cpu_s for s in twos[::2])
            - n_few * slope["ray_2"] / 1e3,
            "session_start_and_first_run_cpu_s": ray_warm.cpu_s,
            "wall_s_marginal": wall,
            "patches_per_wall_second": {k: (n_many - n_few) / v for k, v in wall.items()},
            "cpu_s": {
                "ray, 1 actor": [round(s.cpu_s, 2) for s in ones],
                "ray, 2 actors": [round(s.cpu_s, 2) for s in twos],
                "bare": [round(s.cpu_s, 2) for s in bare],
            },
            "parts_cpu_s": {"ray, 2 actors": twos[-1].parts, "bare": bare[-1].parts},
        },
    }


def memory(quick: bool) -> Report:
    """Peak memory of the whole process tree, one slide against twenty, each in a new session."""
    sizes = (1, 4) if quick else (1, 20)
    found: Report = {}
    report: Report = {"peak_rss_mb": {}}
    for n, name in zip(sizes, ("1", "20"), strict=True):
        say(f"memory with {n} slides")
        (step,) = _run([{"sources": cohort(n, quick)}], memory=True)
        report["peak_rss_mb"][name] = step.pss_mb
        patches = step.answer["patches"]
        found[name] = {
            "slides": n,
            "patches": patches,
            "plain_rss_sum_mb": step.rss_mb,
            "cpu_s_with_session_start": step.cpu_s,
            "patches_per_cpu_second_with_session_start": patches / step.cpu_s,
            "patches_per_wall_second_with_session_start": patches / step.answer["seconds"],
        }
    if not quick:
        say("memory with one large slide")
        (step,) = _run([{"sources": [str(slide(side=40960, mpp=0.5))]}], memory=True)
        found["1 of 40960 px"] = {"pss_mb": step.pss_mb, "plain_rss_sum_mb": step.rss_mb}
    return report | {"memory": found}


def _run(steps: list[dict[str, Any]], *, memory: bool = False) -> list[meter.Step]:
    def show(step: meter.Step) -> None:
        answer = step.answer
        say(
            f"{answer['patches']:,} patches in {answer['seconds']:.1f} s, "
            f"{step.cpu_s:.1f} CPU-s {answer['config'] or ''}"
        )

    arguments = ["-m", "tests.bench.ingest", "--steps", json.dumps(steps)]
    return meter.run(arguments, memory=memory, done=show)


def _slope(steps: Sequence[meter.Step]) -> float:
    """CPU ms per further patch between the small and the large runs, each the least of its kind."""
    small, big = (min(steps[i::2], key=lambda step: step.cpu_s) for i in (0, 1))
    return 1e3 * (big.cpu_s - small.cpu_s) / (big.answer["patches"] - small.answer["patches"])


def perform(steps: Iterable[dict[str, Any]]) -> None:
    """In the measured process: run the ingests one after another, on Ray in one session."""
    from jobs import ingest

    with tempfile.TemporaryDirectory(prefix="pathflip-bench-") as folder:
        for index, step in enumerate(steps):
            archive = f"{folder}/{index}"
            config = ingest.IngestConfig(**{"device": "cpu"} | step.get("config", {}))
            if step.get("bare"):
                with mock.patch("jobs.local.run", bare_loop):
                    result = ingest.ingest(step["sources"], archive, config, address="local")
            else:
                address = step.get("address")
                result = ingest.ingest(step["sources"], archive, config, address=address)
            if result.slides["ready"] != len(step["sources"]):
                raise RuntimeError(f"not every slide was ingested: {result.slides}")
            answer = asdict(result) | {"config": step.get("config")}
            print("@" + json.dumps(answer), flush=True)
            sys.stdin.readline()
            shutil.rmtree(archive)


def bare_loop(
    rows: Sequence[dict[str, str]], pools: Sequence[ActorPool], **_: Any
) -> Iterator[pa.Table]:
    """Stands in for ``jobs.local.run``: the same actors in this process, one row after another."""
    tables: Iterable[pa.Table] = [pa.Table.from_pylist([row]) for row in rows]
    for pool in pools:
        tables = _mapped(pool.actor(*pool.arguments), tables)
    return iter(tables)


def _mapped(actor: Callable[..., Any], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for row in range(len(table)):
            made = actor(table.slice(row, 1))
            yield from [made] if isinstance(made, pa.Table) else made


# -- the report -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Report]] = {
    "read": read,
    "tissue": tissue,
    "features": features,
    "job": job,
    "memory": memory,
}
TARGETS = {
    "read_over_floor.20x_256": ">= 0.75",
    "read_over_floor.20x_240": ">= 0.75",
    "read_over_floor.40x_exact": ">= 0.6",
    "read_over_floor.40x_halved": ">= 1.1",
    "over_openslide.20x": ">= 3.5",
    "over_openslide.40x": ">= 5",
    "ray_overhead_ms_per_patch": "<= 0.15",
    "patches_per_cpu_second": ">= 1200",
    "actors_2_over_1": ">= 1.7",
    "tissue_cpu_seconds": "<= 0.5",
    "peak_rss_mb.1": "<= 2048",
    "peak_rss_mb.20": "<= 2048",
}


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """Floats to four significant digits, however deep."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(report: Report) -> str:
    """The figures that have a target, one a line."""
    lines = []
    for name, target in TARGETS.items():
        value: Any = report
        for key in name.split("."):
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if isinstance(value, int | float):
            sign, bound = target.split()
            met = value >= float(bound) if sign == ">=" else value <= float(bound)
            lines.append(f"{name:30}{value:>12,.4g}   {target:>9}   {'ok' if met else 'MISSED'}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingest", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="smaller slides, fewer repeats")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    parser.add_argument("--steps", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps:
        perform(json.loads(arguments.steps))
        return
    cv2.setNumThreads(1)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # idle threads spin
        os.environ.setdefault(variable, "1")
    # Ray starts its workers at nice 15: on a shared machine other people's load would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    report: Report = {}
    load = [os.getloadavg()[0]]
    for name in arguments.only or PARTS:
        report |= PARTS[name](arguments.quick)
        load.append(os.getloadavg()[0])
    report["machine"] = {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "load_average": load,
        "python": platform.python_version(),
        "quick": arguments.quick,
    }
    if arguments.json:
        print(json.dumps(rounded(report), indent=1))
    else:
        print(table(report))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


if __name__ == "__main__":
    main()
