"""Reading of patches, beside the floor and other readers, for ``tests.bench.ingest --only read``.

Every reader works in a fresh process of its own, for what one process's allocator has learned from
another reader's arrays is worth 400 page faults a patch; the processes take turns, round by round.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from pathflip.geometry import Tiling, patch_rects, plan_regions
from pathflip.slides.direct import Tiles
from pathflip.slides.slide import Slide
from pathflip.slides.tissue import TissueConfig, find_tissue
from pathflip.synth import large
from pathflip.synth import tiff as synth_tiff
from tests.unit.slides.dicom_files import write_level

TILING = Tiling()
PX = TILING.patch_px
ROUNDS = 5
COMPRESSED = ("dicom", "deflate", "deflate_predictor", "lzw", "lzw_predictor", "zstd",
              "zstd_predictor", "jpeg2000", "jpeg2000_ycbcr")  # fmt: skip
SIDES = ("floor", "pathflip", "openslide", "pyvips", "cucim")

Rects = NDArray[np.int64]


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


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
    """The JPEG slides of the reading figures."""
    side = 8192 if quick else 20480
    return {
        "20x_256": slide(side=side, mpp=0.5),
        "20x_240": slide(side=side, mpp=0.5, tile_px=240),
        # Levels 1, 4, 16: patches at 0.5 have to be made from level 0, as on most real 40x slides.
        "40x": slide(side=side, mpp=0.25, layout="aperio"),
        "0_2738": slide(side=side, mpp=0.2738, layout="aperio"),
    }


def compressed(source: Path) -> dict[str, Path]:
    """4096 px of a slide's middle in other compressions and formats, 256 px tiles, made once."""
    folder = source.with_suffix(".compressed")
    found = {
        name: folder / (f"{name}.svs" if name.startswith("jpeg") else f"{name}.tif")
        for name in COMPRESSED
    } | {"dicom": folder / "dicom"}
    if folder.exists():
        return found
    say("making slides of other compressions")
    making = Path(tempfile.mkdtemp(dir=source.parent))
    with Slide(source) as opened:
        corner = (opened.width - 4096) // 2 // 256 * 256
        pixels = opened.read(corner, corner, 4096)
    (making / "dicom").mkdir()
    write_level(making / "dicom" / "0.dcm", pixels, tile=256, mpp=0.5)
    for name, path in found.items():
        if name == "dicom":
            continue
        options: dict[str, Any] = {"compression": name.partition("_")[0]}
        if name.endswith("predictor"):
            options["predictor"] = True
        if name.startswith("jpeg2000"):
            kind = "YCBC" if name.endswith("ycbcr") else "RGB"
            options = {
                "compression": f"APERIO_JP2000_{kind}", "compressionargs": {"level": 40},
                "description": "Aperio x\n4096x4096 |AppMag = 20|MPP = 0.5",
            }  # fmt: skip
        tifffile.imwrite(
            making / path.name, pixels, tile=(256, 256), photometric="rgb", metadata=None,
            resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options,
        )  # fmt: skip
    making.rename(folder)
    return found


def regions_of(opened: Slide, limit: int) -> list[Rects]:
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


# -- sides: each makes a function that reads all patches, and says how many it reads ---------------


def floor(path: Path, regions: list[Rects]) -> tuple[int, Callable[[], None]]:
    """``pread`` and decoding, at full size, of each tile under the patches, once, in one buffer."""
    opened = Slide(path)
    level = opened._direct[0]
    needed: set[int] = set()
    for x, y, w, h in np.concatenate(regions).tolist():
        for row in range(y // level.tile_h, -(-(y + h) // level.tile_h)):
            for column in range(x // level.tile_w, -(-(x + w) // level.tile_w)):
                needed.add(row * level.across + column)
    places = [(int(level.counts[t]), int(level.offsets[t])) for t in sorted(needed)]
    out = np.empty((level.tile_h, level.tile_w, 3), np.uint8)
    file, decode = opened._files[level.file], level.codec.decode

    def read() -> None:
        for count, offset in places:
            data = os.pread(file, count, offset)
            decode(data, shrink=1, out=out)

    assert Tiles(file, level).tile_w == out.shape[1]
    return sum(len(rects) for rects in regions), read


def pathflip(
    path: Path, regions: list[Rects], *, halving: Any = "exact"
) -> tuple[int, Callable[[], None]]:
    """``Slide.read_patches``, region by region as the job asks for them."""
    opened = Slide(path, halving=halving)
    if opened.reader != "direct":
        raise RuntimeError(f"{path.name}: {opened.reader_note}")
    out = np.empty((TILING.slots, PX, PX, 3), np.uint8)

    def read() -> None:
        for rects in regions:
            if not opened.read_patches(rects, mpp=TILING.mpp, out=out[: len(rects)]).all():
                raise RuntimeError("a synthetic slide is damaged")

    return sum(len(rects) for rects in regions), read


def to_size(rgb: NDArray[np.uint8]) -> None:
    """Average pixels that are finer than the patch, as tools do."""
    if rgb.shape[0] != PX:
        cv2.resize(np.ascontiguousarray(rgb), (PX, PX), interpolation=cv2.INTER_AREA)


def through_openslide(path: Path, regions: list[Rects]) -> tuple[int, Callable[[], None]]:
    """Read as most tools do: openslide-python, one read_region a patch, to RGB, to size."""
    file = next(path.iterdir()) if path.is_dir() else path
    rects = regions[0]

    def read() -> None:
        with openslide.OpenSlide(file) as handle:  # a new one: the last round's tiles are cached
            for x, y, w, h in rects.tolist():
                to_size(np.asarray(handle.read_region((x, y), 0, (w, h)).convert("RGB")))

    return len(rects), read


def same_pixels(path: Path, regions: list[Rects], pixels: Callable[..., Any]) -> None:
    """Refuse a reader that shows another picture than OpenSlide: blank ones are read fast."""
    x, y, w, h = regions[0][len(regions[0]) // 2].tolist()
    with openslide.OpenSlide(path) as handle:
        expected = np.asarray(handle.read_region((x, y), 0, (w, h)).convert("RGB"), np.int16)
    seen = np.asarray(pixels(x, y, w, h), np.uint8).reshape(h, w, -1)[..., :3]
    if np.abs(seen - expected).mean() > 3:
        raise RuntimeError("it shows other pixels than OpenSlide")


def through_pyvips(path: Path, regions: list[Rects]) -> tuple[int, Callable[[], None]]:
    """``Region.fetch`` a patch, its best path; a new image each round, for its cache is kept."""
    import pyvips  # type: ignore[import-not-found]

    pyvips.cache_set_max(0)
    first = pyvips.Region.new(pyvips.Image.new_from_file(str(path), access="random"))
    same_pixels(path, regions, lambda *at: np.frombuffer(first.fetch(*at), np.uint8))

    def read() -> None:
        image = pyvips.Image.new_from_file(str(path), access="random")
        region = pyvips.Region.new(image)
        for rects in regions:
            for x, y, w, h in rects.tolist():
                data = region.fetch(x, y, w, h)
                to_size(np.frombuffer(data, np.uint8).reshape(h, w, 3))

    return sum(len(rects) for rects in regions), read


def through_cucim(path: Path, regions: list[Rects]) -> tuple[int, Callable[[], None]]:
    """Rows of patches at once on the CPU, its best path, cut into patches."""
    from cucim import CuImage  # type: ignore[import-not-found]

    image = CuImage(str(path))
    same_pixels(path, regions, lambda x, y, w, h: image.read_region((x, y), (w, h), level=0))
    runs: list[tuple[int, int, int, int, list[tuple[int, int, int]]]] = []
    for rects in regions:
        for top in np.unique(rects[:, 1]):
            row = rects[rects[:, 1] == top]
            row = row[np.argsort(row[:, 0])]
            for run in np.split(row, np.flatnonzero(np.diff(row[:, 0]) > row[0, 2] + 1) + 1):
                left = int(run[0, 0])
                width, height = int(run[-1, 0] + run[-1, 2]) - left, int(run[:, 3].max())
                cuts = [(int(x) - left, int(w), int(h)) for x, _, w, h in run]
                runs.append((left, int(top), width, height, cuts))

    def read() -> None:
        for left, top, width, height, cuts in runs:
            strip = np.asarray(image.read_region((left, top), (width, height), level=0))
            for x, w, h in cuts:
                to_size(strip[:h, x : x + w])

    return sum(len(rects) for rects in regions), read


def work(side: str, path: Path, regions: list[Rects], peers: str) -> None:
    """In a side's process: a round for each line of input."""
    cv2.setNumThreads(1)
    if peers:
        sys.path.append(peers)
    makers: dict[str, Callable[..., tuple[int, Callable[[], None]]]] = {
        "floor": floor, "pathflip": pathflip, "openslide": through_openslide,
        "pyvips": through_pyvips, "cucim": through_cucim,
        "dct": lambda path, regions: pathflip(path, regions, halving="dct"),
    }  # fmt: skip
    try:
        patches, read = makers[side](path, regions)
    except Exception as error:  # whatever a peer's loader raises is why it is skipped
        if side in ("floor", "pathflip", "dct"):
            raise
        print(json.dumps({"skipped": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        return
    print(json.dumps({"patches": patches}), flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        read()
        print(json.dumps(time.process_time() - started), flush=True)


# -- all sides, taking turns -----------------------------------------------------------------------


def turns(path: Path, sides: tuple[str, ...], *, limit: int, peers: str) -> dict[str, Any]:
    """Patches per CPU second of each side: the best of some rounds."""
    with Slide(path) as opened:
        regions = regions_of(opened, limit)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, *regions)
        file.flush()
        processes = {
            side: subprocess.Popen(
                [sys.executable, "-m", "tests.bench.reading", side, str(path), file.name, peers],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )
            for side in sides
        }  # fmt: skip

        def answer(side: str) -> Any:
            pipe = processes[side].stdout
            assert pipe is not None
            return json.loads(pipe.readline() or '{"skipped": "its process died"}')

        patches, skipped = {}, {}
        for side in sides:
            said = answer(side)
            if "skipped" in said:
                skipped[side] = said["skipped"]
            else:
                patches[side] = said["patches"]
        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            for side, count in patches.items():
                pipe = processes[side].stdin
                assert pipe is not None
                print(file=pipe, flush=True)
                seconds = answer(side)
                if isinstance(seconds, dict):
                    skipped[side] = seconds["skipped"]
                else:
                    best[side] = max(best.get(side, 0.0), count / seconds)
            patches = {side: count for side, count in patches.items() if side not in skipped}
        for process in processes.values():
            if process.stdin is not None:
                process.stdin.close()
            process.wait()
    ours = best.get("pathflip", best.get("dct", 0.0))
    over = {side: ours / rate for side, rate in best.items() if side not in ("pathflip", "dct")}
    return {"patches_per_cpu_second": best, "over": over, "skipped": skipped}


def measure(quick: bool, *, peers: str = "") -> dict[str, Any]:
    """Every layout by every side."""
    whole = slides(quick)
    found = {}
    for name, path in (whole | compressed(whole["20x_256"])).items():
        limit = (2 if quick else 6) if name in whole else 2
        found[name] = turns(path, SIDES, limit=limit, peers=peers)
        if name in ("40x", "0_2738"):
            found[f"{name}_dct"] = turns(path, ("floor", "dct"), limit=limit, peers=peers)
        rates = found[name]["patches_per_cpu_second"]
        say(f"{name}: " + ", ".join(f"{side} {rate:,.0f}" for side, rate in rates.items()))
    return found


def main() -> None:
    """Command line of a side's process."""
    parser = argparse.ArgumentParser()
    for name in ("side", "path", "regions", "peers"):
        parser.add_argument(name)
    given = parser.parse_args()
    with np.load(given.regions) as stored:
        regions = [stored[name] for name in stored.files]
    work(given.side, Path(given.path), regions, given.peers)


if __name__ == "__main__":
    main()
