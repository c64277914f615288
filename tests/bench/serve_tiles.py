"""Tiles: how many a CPU-second, beside other tile servers' libraries, and 64 viewers that pan.

``python -m tests.bench.serve --only tiles --json``

* ``per_cpu_s``: tiles from a reader process, beside openslide-python's ``DeepZoomGenerator`` with
  the JPEG encoder of its own example server, and large_image, where it can be imported
  (``PATHFLIP_BENCH_LARGE_IMAGE`` names a folder of packages to import it from). Every side works in
  a process of its own on the same files and tiles, each tile once, and they take turns. Tiles are
  as many of each level, as somebody sees them who zooms in; ``full`` are those of the full level
  alone, as of somebody who pans there. CPU is of all processes of a side.
* ``viewers``: 64 clients of a running service, each with a screen of 7 x 4 tiles on a slide, which
  move on by half a screen every few seconds, at any level. A pan is over when every tile of the
  screen is there.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pathflip.slides.pyramid import Pyramid
from tests.bench.ingest import rounded, say
from tests.serving import cpu_s

Report = dict[str, Any]
Place = tuple[int, int, int]

VIEWERS, SLIDES, PX = 64, 8, 256
REST_S = 5.0
SCREEN = (7, 4)
SIDES = ("pathflip", "deepzoom", "large_image")
LARGE_IMAGE = "PATHFLIP_BENCH_LARGE_IMAGE"
KINDS: dict[str, dict[str, Any]] = {
    "aperio": {"layout": "aperio"},
    "generic": {},
    "aperio_rgb_240": {"layout": "aperio", "components": "rgb", "tile_px": 240},
}
"""Layouts: levels 1, 4, 16 with shared tables; levels that halve; tiles of 240 px, R, G, B."""


def tiles(folder: Path, *, quick: bool) -> Report:
    """Both measurements."""
    side, rounds, each, seconds = (6_000, 1, 40, 10) if quick else (20_000, 3, 120, 60)
    return {
        "per_cpu_s": per_cpu_s(folder / "files", side=side, rounds=rounds, each=each),
        "viewers": viewers(folder / "viewers", side=side, seconds=seconds),
    }


# -- tiles a CPU-second ----------------------------------------------------------------------------


def per_cpu_s(folder: Path, *, side: int, rounds: int, each: int) -> Report:
    """Measure tiles for each CPU-second of every side, and ours over theirs."""
    from pathflip.synth import make_slide

    folder.mkdir(parents=True)
    report: Report = {}
    skipped: dict[str, str] = {}
    for kind, options in KINDS.items():
        path = folder / f"{kind}.{'svs' if 'layout' in options else 'tif'}"
        make_slide(path, width=side, height=side * 3 // 4, mpp=0.25, seed=1, **options)
        for part, levels in (("zoom", 0), ("full", 1)):
            rates: dict[str, list[float]] = {}
            for _ in range(rounds):
                for name in SIDES:
                    if name in skipped:
                        continue
                    found = _aside(name, path, each=each, levels=levels)
                    if "skipped" in found:
                        skipped[name] = found["skipped"]
                        continue
                    rates.setdefault(name, []).append(found["tiles_per_cpu_s"])
            middle = {name: statistics.median(values) for name, values in rates.items()}
            over = {f"over_{name}": middle["pathflip"] / middle[name] for name in middle}
            over.pop("over_pathflip")
            report[f"{kind}_{part}"] = middle | over
            say(f"{kind}, {part}: {json.dumps(rounded(report[f'{kind}_{part}']))}")
    return report | ({"skipped": skipped} if skipped else {})


def _aside(name: str, path: Path, *, each: int, levels: int) -> Report:
    command = [sys.executable, "-m", "tests.bench.serve_tiles", "--side", name]
    command += ["--path", str(path), "--each", str(each), "--levels", str(levels)]
    environment = dict(os.environ)
    if name == "large_image":
        ours = [environment.get(LARGE_IMAGE, ""), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, ours))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Report = json.loads(done.stdout.splitlines()[-1])
    return found


def places(pyramid: Pyramid, *, each: int, levels: int) -> list[Place]:
    """Draw ``each`` tiles of every level, or of the last ``levels``, those inside the slide."""
    rng = random.Random(3)
    found: list[Place] = []
    shown = range(pyramid.min_level, pyramid.max_level + 1)
    for level in shown[-levels:] if levels else shown:
        columns, rows = pyramid.grid(level)
        own = [(level, x, y) for x in range(columns) for y in range(rows)]
        found += rng.sample(own, min(len(own), each * (10 if levels else 1)))
    return found


def _pathflip(path: str, *, each: int, levels: int) -> tuple[Callable[[Place], bytes], list[Place]]:
    from pathflip.slides.reader import SlideReader

    reader = SlideReader(patches=1, px=16)
    pyramid, _, _ = reader.pyramid(path)
    return lambda place: reader.tile(path, *place)[0], places(pyramid, each=each, levels=levels)


def _deepzoom(path: str, *, each: int, levels: int) -> tuple[Callable[[Place], bytes], list[Place]]:
    import openslide
    from openslide.deepzoom import DeepZoomGenerator

    slide = openslide.OpenSlide(path)
    px = int(slide.properties["openslide.level[0].tile-width"])
    generator = DeepZoomGenerator(slide, tile_size=px, overlap=0, limit_bounds=False)
    width, height = slide.dimensions

    def tile(place: Place) -> bytes:
        out = io.BytesIO()
        generator.get_tile(place[0], place[1:]).save(out, "jpeg", quality=75)
        return out.getvalue()

    pyramid = Pyramid(width=width, height=height, tile_w=px, tile_h=px)
    return tile, places(pyramid, each=each, levels=levels)


def _large_image(
    path: str, *, each: int, levels: int
) -> tuple[Callable[[Place], bytes], list[Place]]:
    import large_image

    large_image.config.setConfig("cache_backend", "python")
    source = large_image.open(path, encoding="JPEG", jpegQuality=75)
    about = source.getMetadata()
    pyramid = Pyramid(
        width=about["sizeX"], height=about["sizeY"], tile_w=about["tileWidth"],
        tile_h=about["tileHeight"],
    )  # fmt: skip
    first = pyramid.max_level - (about["levels"] - 1)
    chosen = [one for one in places(pyramid, each=each, levels=levels) if one[0] >= first]
    return lambda place: bytes(source.getTile(place[1], place[2], place[0] - first)), chosen


def measure(name: str, path: str, *, each: int, levels: int) -> Report:
    """Measure tiles for each CPU-second of one side, in this process and its children."""
    from tests.faults import descendants

    makers = {"pathflip": _pathflip, "deepzoom": _deepzoom, "large_image": _large_image}
    try:
        tile, chosen = makers[name](path, each=each, levels=levels)
    except ImportError as error:
        return {"skipped": str(error)}
    tile(chosen[0])
    children = descendants(os.getpid())

    def spent() -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return own.ru_utime + own.ru_stime + sum(map(cpu_s, children))

    rest, size = chosen[1:], 0  # each once: what any of them keeps is of no use
    before = spent()
    for place in rest:
        data = tile(place)
        assert data[:2] == b"\xff\xd8"
        size += len(data)
    return {"tiles_per_cpu_s": len(rest) / (spent() - before), "bytes": size / len(rest)}


# -- viewers that pan ------------------------------------------------------------------------------


def viewers(folder: Path, *, side: int, seconds: float) -> Report:
    """Milliseconds of tiles and of pans, and statuses, with 64 viewers."""
    from tests.bench.serve_grounding import running

    uri, run = make_inputs(folder, side=side)
    with running(uri, run, **{"limits.concurrent": 512}) as url:
        return asyncio.run(_pan(url, seconds))


def make_inputs(folder: Path, *, side: int) -> tuple[str, str]:
    """Make slides, an archive of them and a run below a folder."""
    from pathflip.archive import schema
    from pathflip.archive.commit import Committer
    from pathflip.archive.create import create_archive
    from pathflip.archive.fragments import write_fragment
    from pathflip.slides.sources import digest_source, stat_source
    from pathflip.synth import make_slide
    from tests.archives import DIM, SLOTS, TILING, filled
    from tests.bench.serve_grounding import make_run

    folder.mkdir(parents=True)
    rows: dict[str, list[Report]] = {"slides": [], "regions": [], "features": [], "vectors": []}
    kinds = list(KINDS.values())
    for number in range(SLIDES):
        slide, kind = f"slide{number:03d}", kinds[number % len(kinds)]
        path = folder / f"{slide}.{'svs' if 'layout' in kind else 'tif'}"
        make_slide(path, width=side, height=side * 3 // 4, mpp=0.25, seed=number, **kind)
        source = stat_source(path)
        key = {"slide_id": slide, "region_id": schema.region_id(slide, rx=0, ry=0)}
        rows["slides"].append(
            {"slide_id": slide, "uri": str(path), "aliases": [], "status": "ready", "mpp": 0.25}
            | {"bytes": source.bytes, "mtime_ns": source.mtime_ns, "sha256": digest_source(path)}
            | {"width": side, "height": side * 3 // 4, "mpp_source": "metadata"}
            | {"fingerprint": slide, "encoders": ["tex"], "n_regions": 1, "n_patches": SLOTS}
        )
        rows["regions"].append(
            key
            | {"rx": 0, "ry": 0, "x0": 0, "y0": 0, "size0": 512, "mpp": 0.25}
            | {"tissue_fraction": 1.0, "n_patches": SLOTS, "n_bad": 0}
            | {"patch_mask": np.ones(SLOTS, np.uint8)}
            | {f"patch_{what}": np.zeros(SLOTS) for what in ("tissue", "blur", "pen")}
        )
        rows["features"].append(key | {"features": np.zeros(SLOTS * DIM, np.float16)})
        rows["vectors"] += [
            {"id": name, "kind": kind_, "slide_id": slide, "mpp": 0.25, "vector": np.eye(DIM)[0]}
            for name, kind_ in ((key["region_id"], "region"), (slide, "slide"))
        ]
    uri = folder / "archive"
    create_archive(uri, tiling=dict(TILING))
    with Committer(uri) as committer:
        committer.ensure_encoder_table("tex", revision="1", dim=DIM, mpp=0.5, licence="MIT")
        features = filled(schema.features_schema(SLOTS, DIM), rows["features"])
        fragment = write_fragment(committer.uri, schema.features_table("tex"), features)
        committer.commit(
            slides=filled(schema.slides_schema(), rows["slides"]),
            regions=filled(schema.regions_schema(SLOTS), rows["regions"]),
            embeddings={"tex": filled(schema.embeddings_schema(DIM), rows["vectors"])},
            fragments={"tex": [fragment]},
        )
    return str(uri), make_run(folder / "run", uri, texts=["Sections show colon."], dim=DIM)


async def _pan(url: str, seconds: float) -> Report:
    """Let 64 viewers pan: each moves on when its screen is whole and it has looked a while."""
    status: Counter[int] = Counter()
    tile_ms: list[float] = []
    pan_ms: list[float] = []
    opened_ms: list[float] = []
    size = 0

    async def viewer(number: int) -> None:
        nonlocal size
        rng, slide = random.Random(number), f"slide{number % SLIDES:03d}"
        have: set[Place] = set()
        # As many connections as a browser's, and a client that takes less than what it measures.
        connections = aiohttp.TCPConnector(limit=6)
        async with aiohttp.ClientSession(url, connector=connections) as client:

            async def get(place: Place) -> None:
                nonlocal size
                level, x, y = place
                began = time.perf_counter()
                path = f"/v1/slides/{slide}/tiles/{level}/{x}_{y}.jpg"
                async with client.get(path) as answer:
                    size += len(await answer.read())
                tile_ms.append(1e3 * (time.perf_counter() - began))
                status[answer.status] += 1
                if answer.status == 200:
                    have.add(place)

            async with client.get(f"/v1/slides/{slide}/tiles") as answer:
                info = await answer.json()
            pyramid = Pyramid(**{n: info[n] for n in ("width", "height", "tile_w", "tile_h")})
            level = rng.randint(info["min_level"] + 2, info["max_level"])
            columns, rows = pyramid.grid(level)
            x, y = rng.randrange(columns), rng.randrange(rows)
            first = True
            while time.perf_counter() < end:
                wanted = [
                    (level, column, row)
                    for column in range(x, x + SCREEN[0])
                    for row in range(y, y + SCREEN[1])
                    if pyramid.has(level, column, row) and (level, column, row) not in have
                ]
                began = time.perf_counter()
                await asyncio.gather(*(get(place) for place in wanted))
                if wanted:
                    took = opened_ms if first else pan_ms
                    took.append(1e3 * (time.perf_counter() - began))
                first = False
                await asyncio.sleep(rng.uniform(2, 6))
                x += rng.choice((-3, 0, 3))
                y += rng.choice((-2, 0, 2))
                x = max(0, min(x, columns - SCREEN[0]))
                y = max(0, min(y, rows - SCREEN[1]))

    async with aiohttp.ClientSession(url) as client:
        for slide in range(SLIDES):  # the readers are there, and slides were opened once
            async with client.get(f"/v1/slides/slide{slide:03d}/tiles") as answer:
                answer.raise_for_status()
    before = _service_cpu()
    await asyncio.sleep(REST_S)
    rest = sum(_service_cpu().values()) - sum(before.values())
    end = time.perf_counter() + seconds
    before, began, own = _service_cpu(), time.perf_counter(), time.process_time()
    await asyncio.gather(*(viewer(number) for number in range(VIEWERS)))
    wall, own, after = time.perf_counter() - began, time.process_time() - own, _service_cpu()
    cpu = {name: after[name] - before[name] for name in after}
    counted = sum(status.values())
    return {
        "viewers": VIEWERS,
        "seconds": wall,
        "tiles": counted,
        "status": {str(code): count for code, count in sorted(status.items())},
        "tile_p50_ms": statistics.median(tile_ms),
        "tile_p95_ms": _percentile(tile_ms, 95),
        "pan_p50_ms": statistics.median(pan_ms),
        "pan_p95_ms": _percentile(pan_ms, 95),
        "open_p95_ms": _percentile(opened_ms, 95),
        "tile_kb": size / counted / 1024,
        "service_cpu_ms_per_tile": 1e3 * sum(cpu.values()) / counted,
        "cpu_ms_per_tile": {name: 1e3 * spent / counted for name, spent in cpu.items()},
        "viewers_cpu_ms_per_tile": 1e3 * own / counted,
        "service_cpu_ms_per_s_at_rest": 1e3 * rest / REST_S,
    }


def _percentile(values: list[float], share: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * share // 100)]


def _service_cpu() -> Counter[str]:
    """CPU seconds of the service's processes, by what they are."""
    from tests.faults import command_line, descendants

    words = {
        "pathflip.slides.reader_child": "readers", "pathflip:ingress": "ingress",
        "haproxy": "proxy", "ProxyActor": "others", "ServeReplica": "others",
    }  # fmt: skip
    spent: Counter[str] = Counter()
    for pid in descendants(os.getpid()):
        line = command_line(pid)
        name = next((name for word, name in words.items() if word in line), None)
        if name is not None:
            spent[name] += cpu_s(pid)  # type: ignore[assignment]
    return spent


def main() -> None:
    """Measure one side; started by :func:`per_cpu_s`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--each", type=int, required=True)
    parser.add_argument("--levels", type=int, required=True)
    args = parser.parse_args()
    found = measure(args.side, args.path, each=args.each, levels=args.levels)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
