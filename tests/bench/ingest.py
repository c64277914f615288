"""Benchmark of ingest, beside the limits of decoding and disk: ``python -m tests.bench.ingest``.

Makes its own slides (kept in the system's temporary folder), runs both sides of every ratio in one
run, interleaved, and counts CPU seconds of all processes, so that other load on the machine
disturbs the figures little. docs/notes/performance.md says what each figure means and has the
measurements.
"""

from __future__ import annotations

import argparse
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
import pyarrow as pa
from numpy.typing import NDArray

from jobs.stages import ActorPool
from pathflip.encoders import load_encoder
from pathflip.geometry import plan_regions
from pathflip.slides.slide import Slide
from pathflip.slides.tissue import TissueConfig, find_tissue
from tests.bench import meter, reading
from tests.bench.reading import PX, ROUNDS, TILING, regions_of, say, slide, slides

REAL = Path(__file__).resolve().parents[3] / "shared" / "slides" / "CMU-1-Small-Region.svs"

Report = dict[str, Any]


# -- slides ---------------------------------------------------------------------------------------


def cohort(n: int, quick: bool) -> list[str]:
    """``n`` different 20x slides of one size."""
    side = 12288 if quick else 16384
    return [str(slide(side=side, mpp=0.5, seed=100 + i)) for i in range(n)]


def read(quick: bool, peers: str = "") -> Report:
    """Reading against the floor and against other readers, each in a process of its own."""
    return {"reading": reading.measure(quick, peers=peers)}


# -- other parts ----------------------------------------------------------------------------------


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

PARTS: dict[str, Callable[..., Report]] = {
    "read": read,
    "tissue": tissue,
    "features": features,
    "job": job,
    "memory": memory,
}
TARGETS = {
    "reading.20x_256.over.floor": ">= 0.92",
    "reading.20x_240.over.floor": ">= 0.85",
    "reading.40x.over.floor": ">= 0.92",
    "reading.40x_dct.over.floor": ">= 1.1",
    "reading.0_2738.over.floor": ">= 0.55",
    "reading.0_2738.over.pyvips": ">= 1",
    "reading.0_2738.over.cucim": ">= 1",
    "reading.20x_256.over.openslide": ">= 3.5",
    "reading.40x.over.openslide": ">= 5",
    "reading.dicom.over.openslide": ">= 3.5",
    "reading.deflate.over.openslide": ">= 2.5",
    "reading.deflate_predictor.over.openslide": ">= 2.5",
    "reading.lzw.over.openslide": ">= 2.5",
    "reading.lzw_predictor.over.openslide": ">= 2.5",
    "reading.zstd.over.openslide": ">= 2.5",
    "reading.zstd_predictor.over.openslide": ">= 2.5",
    "reading.jpeg2000.over.openslide": ">= 1.4",
    "ray_overhead_ms_per_patch": "<= 0.15",
    "patches_per_cpu_second": ">= 1200",
    "actors_2_over_1": ">= 1.7",
    "tissue_cpu_seconds": "<= 0.5",
    "peak_rss_mb.1": "<= 2048",
    "peak_rss_mb.20": "<= 2048",
}


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
            lines.append(f"{name:42}{value:>12,.4g}   {target:>9}   {'ok' if met else 'MISSED'}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingest", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="smaller slides, fewer repeats")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    parser.add_argument(
        "--peers", default="", metavar="DIR", help="folder that pip --target filled with readers"
    )
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
        part = PARTS[name]
        report |= part(arguments.quick, arguments.peers) if part is read else part(arguments.quick)
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
