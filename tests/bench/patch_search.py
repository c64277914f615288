"""Benchmark of search over single patches: ``python -m tests.bench.patch_search --json``.

An archive is written directly with the layout of ``pathflip ingest --encoder mrplip:RUN``: fp16
features of all patches, and the mean of each region. Every measurement is a process of its own:
the first query after the files were dropped from the page cache, queries after it, and its peak
memory. ``--folder`` keeps the archive for further runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.bench.search import forget, make_blocks
from tests.patch_runs import TEXTURE, make_run

SLOTS, REGIONS_PER_SLIDE, FRAGMENT = 256, 256, 512
TILING = {"region_um": 512.0, "patch_um": 32.0, "mpp": 0.5}
K, ROUNDS = 10, 3
TEXT = "round nuclei"


def make_archive(folder: Path, patches: int, dim: int) -> None:
    """Write a run of that width and an archive of its features below a folder."""
    from pathflip.archive import schema
    from pathflip.archive.commit import Committer
    from pathflip.archive.create import create_archive
    from pathflip.encoders import patch_model

    # Nodes of 256, 128, 64 and 32 µm.
    run = make_run(folder / "patches", TEXTURE, parent_um=256.0, node_px=128, d=dim)
    info = patch_model(f"mrplip:{run}", patch_um=TILING["patch_um"]).info
    uri, regions = str(folder / "archive"), patches // SLOTS  # no more than are all compared
    create_archive(uri, tiling=TILING)
    slides = [f"slide{n:06d}" for n in range(-(-regions // REGIONS_PER_SLIDE))]
    body = pa.schema([item for item in schema.slides_schema() if item.name != schema.CHECKSUM])
    ready = [{"slide_id": name, "status": "ready", "encoders": [info.name]} for name in slides]
    drawn = make_blocks(regions * SLOTS, dim)
    kept = np.zeros((0, dim), np.float16)
    with Committer(uri) as committer:
        features = committer.ensure_encoder_table(
            info.name, revision=info.revision, dim=dim, mpp=0.5, licence="none"
        )
        means = committer.archive.encoders()[info.name]["embeddings_table"]
        committer.upsert("slides", pa.Table.from_pylist(ready, schema=body))
        for start in range(0, regions, FRAGMENT):
            number = np.arange(start, min(regions, start + FRAGMENT))
            while len(kept) < len(number) * SLOTS:
                kept = np.concatenate([kept, next(drawn).astype(np.float16)])
            block, kept = np.split(kept, [len(number) * SLOTS])
            in_slides = [slides[n // REGIONS_PER_SLIDE] for n in number.tolist()]
            at = number % REGIONS_PER_SLIDE
            ids = [
                schema.region_id(slide, rx=rx, ry=0)
                for slide, rx in zip(in_slides, at.tolist(), strict=True)
            ]
            mean = block.reshape(len(number), SLOTS, dim).mean(axis=1, dtype=np.float32)
            mean /= np.linalg.norm(mean, axis=1, keepdims=True)
            committer.replace_rows(
                features,
                pa.table({
                    "region_id": ids, "slide_id": in_slides,
                    "features": _lists(block, SLOTS * dim),
                }),
            )  # fmt: skip
            committer.replace_rows(
                means,
                pa.table({
                    "id": ids, "kind": ["region"] * len(ids), "slide_id": in_slides,
                    "patient_id": in_slides, "x0": at * 1024, "y0": np.zeros(len(ids), np.int64),
                    "size0": np.full(len(ids), 1024, np.int32), "mpp": np.full(len(ids), 0.5),
                    "tissue_fraction": np.ones(len(ids), np.float32),
                    "n_patches": np.full(len(ids), SLOTS, np.int32), "vector": _lists(mean, dim),
                }),
            )  # fmt: skip


def _lists(rows: Any, width: int) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)


# -- measuring ------------------------------------------------------------------------------------


def query(dim: int) -> Any:
    """Return a vector near a region's mean, [dim]."""
    block = next(make_blocks(SLOTS, dim))
    return block[0] + 0.2 * block[1]


def library(folder: Path, dim: int) -> dict[str, Any]:
    """The first query of this process and those after it, by :func:`search_patches`."""
    from pathflip.archive import Archive
    from pathflip.archive.patch_search import search_patches

    asked = query(dim)
    forget(folder / "archive")
    archive = Archive(folder / "archive")
    before = _peak_mb()
    took, cpu = [], []
    for _ in range(1 + ROUNDS):
        began, busy = time.perf_counter(), time.process_time()
        found = search_patches(archive, asked, k=K)
        took.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    assert found.exhaustive
    assert found.rows.num_rows == K
    return {
        "cold_s": took[0], "warm_s": statistics.median(took[1:]),
        "warm_cpu_s": statistics.median(cpu[1:]), "before_mb": before, "peak_mb": _peak_mb(),
        "best": found.rows["score"][0].as_py(), "rows": found.rows["region_id"].to_pylist(),
    }  # fmt: skip


def command_line(folder: Path, *, cold: bool) -> dict[str, Any]:
    """``pathflip search TEXT --level patch`` as a process of its own."""
    if cold:
        forget(folder / "archive")
    command = [
        sys.executable, "-m", "pathflip.cli", "search", TEXT, "--archive", folder / "archive",
        "--encoder", f"mrplip:{folder / 'patches'}", "--level", "patch", "-k", K, "--json",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE)
    assert done.stdout is not None
    rows = json.loads(done.stdout.read())
    _, status, used = os.wait4(done.pid, 0)
    assert status == 0
    assert len(rows) == K
    return {
        "seconds": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
    }


def side(folder: Path, name: str, patches: int, dim: int) -> str:
    """Do a part in a process of its own, so that this one stays small: its size is inherited."""
    command = [sys.executable, "-m", "tests.bench.patch_search", "--side", name]
    command += ["--folder", str(folder), "--patches", str(patches), "--dim", str(dim)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _peak_mb() -> float:
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--folder", help="where the archive is, or is made and kept")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry; always JSON")
    parser.add_argument("--side", choices=("make", "library"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "make":
        make_archive(Path(args.folder), args.patches, args.dim)
        return
    if args.side == "library":
        print(json.dumps(library(Path(args.folder), args.dim)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        report: dict[str, Any] = {
            "load_average": os.getloadavg()[0], "patches": args.patches, "dim": args.dim,
        }  # fmt: skip
        if not (folder / "archive").exists():
            folder.mkdir(parents=True, exist_ok=True)
            side(folder, "make", args.patches, args.dim)
            os.sync()
        size = sum(p.stat().st_size for p in (folder / "archive").rglob("*") if p.is_file())
        report["archive_mb"] = size / 2**20
        report["library"] = json.loads(side(folder, "library", args.patches, args.dim))
        report["command"] = {
            kind: command_line(folder, cold=kind == "cold") for kind in ("cold", "warm")
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
