"""Cost of an archive as it grows: ``python -m tests.bench.scale --json``.

Makes archives of 200, 2,000 and 20,000 slides (``--slides``) through the real ledger and committer
of an ingest, as if workers had sent their chunks: one fragment of features for each slide. Slides
are small (8 regions of 16 patches, 64 features a patch, pictures of 24 KB), so that they fit; what
grows with the number of slides grows as it does for large ones. Every stage runs in a process of
its own, after its imports, and reports CPU seconds, seconds, bytes read and written (of system
calls, cached or not) and peak memory. The exponent of a figure is the slope of its logarithm over
that of the slides, between the two largest archives; 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

TILING = {
    "region_um": 512.0, "patch_um": 128.0, "mpp": 0.5, "min_patch_tissue": 0.5,
    "min_region_patches": 0.1,
}  # fmt: skip
SLOTS, DIM, REGIONS = 16, 64, 8
PICTURE_BYTES = 12 << 10
"""Bytes of a thumbnail, and of a tissue mask; real ones take some 350 KB together."""
LIMIT = 1.1
"""Largest exponent that is wanted."""
STAGES = ("open", "list", "lookup", "resume", "patients", "verify", "retrieval", "epoch")


@dataclass(kw_only=True)
class Cost:
    """Cost of a stage: CPU seconds, seconds, megabytes read, written and in memory at most."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    read_mb: float = 0.0
    written_mb: float = 0.0
    peak_mb: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add what the block takes."""
        before = _used()
        try:
            yield
        finally:
            after = _used()
            names = ("cpu_s", "wall_s", "read_mb", "written_mb")
            for name, a, b in zip(names, before, after, strict=True):
                setattr(self, name, getattr(self, name) + b - a)
            self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def rounded(self) -> dict[str, float]:
        """Return the figures as JSON values."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def _used() -> tuple[float, float, float, float]:
    times = os.times()
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return (
        times.user + times.system + times.children_user + times.children_system,
        time.perf_counter(),
        int(io["rchar"]) / 1e6,
        int(io["wchar"]) / 1e6,
    )


# -- making an archive ----------------------------------------------------------------------------


def slide_id(n: int) -> str:
    """Return the id of the nth slide; ids do not sort by number."""
    return f"slide{n * 2654435761 % 2**32:08x}-{n}"


def make_chunk(uri: str, table: str, n: int, source: Any, pictures: tuple[bytes, bytes]) -> Any:
    """Return what a worker would send of a slide; its features are written."""
    from jobs.ingest.rows import Chunk, SlideRecord
    from jobs.worker import to_ipc
    from pathflip.archive.fragments import write_fragment
    from pathflip.archive.slide_rows import fixed

    rng, name = np.random.default_rng(n), slide_id(n)
    ids = [f"{name}/{i}_{n % 7}" for i in range(REGIONS)]
    owner, here = [name] * REGIONS, np.arange(REGIONS)
    features = rng.standard_normal((REGIONS, SLOTS * DIM), dtype=np.float32).astype(np.float16)
    features_rows = pa.table({"region_id": ids, "slide_id": owner, "features": fixed(features)})
    means = features.reshape(REGIONS, SLOTS, DIM).astype(np.float64).mean(axis=1)
    places = {
        "slide_id": owner,
        "x0": pa.array(1024 * here, pa.int64()),
        "y0": pa.array(1024 * (n % 7) + 0 * here, pa.int64()),
        "size0": pa.array([1024] * REGIONS, pa.int32()),
        "mpp": pa.array([0.5] * REGIONS, pa.float64()),
        "tissue_fraction": pa.array(rng.random(REGIONS), pa.float32()),
        "n_patches": pa.array([SLOTS] * REGIONS, pa.int32()),
    }
    vectors = {"id": ids, "vector": fixed(means.astype(np.float32))} | places
    scores = rng.random((3, REGIONS, SLOTS), dtype=np.float32)
    regions = pa.table(
        {
            "region_id": ids,
            "rx": pa.array(here, pa.int32()),
            "ry": pa.array([n % 7] * REGIONS, pa.int32()),
            "n_bad": pa.array([0] * REGIONS, pa.int32()),
            "patch_mask": fixed(np.ones((REGIONS, SLOTS), np.uint8)),
            "patch_tissue": fixed(scores[0]),
            "patch_blur": fixed(scores[1]),
            "patch_pen": fixed(scores[2]),
        }
        | places
    )
    record = SlideRecord(
        slide_id=name, uri=source.uri, bytes=source.bytes, mtime_ns=source.mtime_ns,
        sha256=f"{n:064x}", vendor="aperio", width=8192, height=8192, levels=3, mpp=0.5,
        mpp_source="metadata", outline="mask", tissue_mpp=8.0, tissue_mm2=4.0, thumbnail_mpp=8.0,
        tiles_ok=REGIONS * SLOTS, planned_patches=REGIONS * SLOTS, size0=1024,
    )  # fmt: skip
    return Chunk(
        record=record,
        n_chunks=1,
        tissue_png=pictures[0],
        thumbnail=n.to_bytes(8, "little") + pictures[1],
        regions=to_ipc(regions),
        embeddings=(to_ipc(pa.table(vectors)),),
        sums=(means.sum(axis=0).tobytes(),),
        fragments=((write_fragment(uri, table, features_rows),),),
    )  # fmt: skip


def candidates_of(slides: int) -> list[Any]:
    """Return the slides to ingest, as if they lay in a folder."""
    from jobs.ingest.candidates import Candidate
    from pathflip.slides.sources import Source

    return [
        Candidate(source=Source(uri=f"/data/{slide_id(n)}.svs", bytes=10**9 + n, mtime_ns=n))
        for n in range(slides)
    ]


@contextmanager
def opened(uri: str, slides: int) -> Iterator[tuple[Any, Any, str]]:
    """Open an archive for ingest as the job does: committer, ledger, table of features."""
    from jobs.ingest.config import IngestConfig
    from jobs.ingest.ledger import Ledger
    from jobs.ingest.side_files import SideFiles
    from pathflip.archive.commit import Committer
    from pathflip.archive.create import create_archive
    from pathflip.encoders import EncoderInfo

    create_archive(uri, tiling=TILING)
    with Committer(uri) as committer:
        entry = {"revision": "1", "dim": DIM, "mpp": 0.5, "licence": "MIT"}
        table = committer.ensure_encoder_table("made", **entry)
        ledger = Ledger(
            committer, config=IngestConfig(commit_s=0.0), encoders=[
                EncoderInfo(name="made", input_px=256, patch_um=128.0, gated=False, **entry)
            ],
            candidates=candidates_of(slides), side=SideFiles(), started=time.monotonic(),
            progress=None,
        )  # fmt: skip
        yield committer, ledger, table


def ingest(uri: str, slides: int, *, batch: int) -> dict[str, Any]:
    """Make an archive; the driver is metered, making the slides is not."""
    from jobs.ingest.rows import to_table

    _import_all()
    rng = np.random.default_rng(0)
    pictures = (rng.bytes(PICTURE_BYTES), rng.bytes(PICTURE_BYTES - 8))
    driver, started, ratios = Cost(), time.perf_counter(), []
    entering = opened(uri, slides)
    with driver.counted():
        committer, ledger, table = entering.__enter__()
        ledger.outstanding()
    candidates = candidates_of(slides)
    steps = list(range(0, slides, batch))
    for number, first in enumerate(steps):
        chunks = [
            make_chunk(committer.uri, table, n, candidates[n].source, pictures)
            for n in range(first, min(first + batch, slides))
        ]
        rows = to_table(chunks)
        with driver.counted():
            ledger.take(rows)
        if number % max(1, len(steps) // 40) == 0 or number == len(steps) - 1:
            ratios.append(disk_bytes(uri) / live_bytes(uri))
    with driver.counted():
        ledger.finish()
        entering.__exit__(None, None, None)
    live, disk = live_bytes(uri), disk_bytes(uri)
    late = ratios[len(ratios) // 10 :]  # the first commits are mostly what an empty archive is
    return driver.rounded() | {
        "made_s": round(time.perf_counter() - started, 1),
        "live_mb": live / 1e6,
        "disk_mb": disk / 1e6,
        "disk_over_live": round(disk / live, 3),
        "disk_over_live_max": round(max([*late, disk / live]), 3),
        "fragments": _fragments(uri),
    }


def disk_bytes(uri: str) -> int:
    """Return the bytes of all files of an archive."""
    return sum(
        entry.stat().st_size for folder, _, names in os.walk(uri)
        for entry in (Path(folder, name) for name in names)
    )  # fmt: skip


def live_bytes(uri: str) -> int:
    """Return the bytes of the data files that the newest versions refer to, and of indexes."""
    from pathflip.archive import Archive
    from pathflip.archive.storage import data_paths

    archive, size = Archive(uri), 0
    for table in archive.tables():
        size += sum(Path(uri, p).stat().st_size for p in data_paths(archive.dataset(table), table))
        size += disk_bytes(f"{uri}/{table}.lance/_indices")
    return size


def _fragments(uri: str) -> dict[str, int]:
    from pathflip.archive import Archive

    archive = Archive(uri)
    return {name: len(archive.dataset(name).get_fragments()) for name in archive.tables()}


def _import_all() -> None:
    import lance
    import lance.fragment
    import pandas  # noqa: F401  lance imports it late

    import jobs.ingest.ledger  # noqa: F401
    import pathflip.archive.verify
    import pathflip.evaluation.retrieval
    import pathflip.training.order  # noqa: F401

    lance.dataset  # noqa: B018


# -- stages ---------------------------------------------------------------------------------------


def _open(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.archive import Archive

    return {"ready": len(Archive(uri).ready_ids())}


def _list(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.archive import Archive

    return {"rows": len(Archive(uri).slides().to_pylist())}


def _lookup(uri: str, slides: int) -> dict[str, Any]:
    """Read regions, features and vectors of 20 slides in an archive that is open."""
    from pathflip.archive import Archive

    archive = Archive(uri)
    archive.ledger()
    cost = Cost()
    with cost.counted():
        for n in range(0, slides, slides // 20):
            archive.features_array(slide_id(n))
            archive.slide_embeddings(slide_id(n))
    return {name: value / 20 for name, value in cost.rounded().items() if name != "peak_mb"}


def _resume(uri: str, slides: int) -> dict[str, Any]:
    with opened(uri, slides) as (_, ledger, _):
        return {"outstanding": len(ledger.outstanding())}


def _patients(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.archive import Archive
    from pathflip.archive.commit import Committer

    cost = Cost()
    with Committer(uri) as committer, cost.counted():
        committer.update_slides(
            {slide_id(n): {"patient_id": f"P{n % 997}-{os.getpid()}"} for n in range(slides)}
        )
    dataset = Archive(uri).dataset("embeddings_made")
    missing = {index.name: dataset.stats.index_stats(index.name)["num_unindexed_rows"]
               for index in dataset.describe_indices()}  # fmt: skip
    return cost.rounded() | {"unindexed": missing}


def _verify(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.archive.verify import verify

    report = verify(uri)
    return {"ok": report.ok, "rows": report.rows, "notes": report.notes}


def _retrieval(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.evaluation.retrieval import retrieval

    rng = np.random.default_rng(0)
    slide, noise = rng.standard_normal((2, slides, 256), dtype=np.float32)
    captions = [f"caption {n * 7919 % (slides - slides // 10)}" for n in range(slides)]
    patients = [f"P{n // 2}" for n in range(slides)]
    found = retrieval(slide, slide + 4 * noise, captions, protocol="full", patients=patients)
    return {"itr": found["itr"], "tir": found["tir"]}


def _epoch(uri: str, slides: int) -> dict[str, Any]:
    from pathflip.training.dataset import Corpus
    from pathflip.training.order import epoch_order

    corpus = Corpus(
        slide_ids=[slide_id(n) for n in range(slides)],
        patients=[f"P{n // 2}" for n in range(slides)],
        splits=["train"] * slides,
        captions=[f"caption {n * 7919 % (slides // 2)}" for n in range(slides)],
        pieces=[["a"]] * slides,
        num_regions=[REGIONS] * slides,
        fingerprints=["f"] * slides,
        about={},
    )
    return {"steps": len(epoch_order(corpus, epoch=0, seed=0, batch_size=16))}


_RUN: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "open": _open, "list": _list, "lookup": _lookup, "resume": _resume, "patients": _patients,
    "verify": _verify, "retrieval": _retrieval, "epoch": _epoch,
}  # fmt: skip


def run_stage(stage: str, uri: str, slides: int) -> dict[str, Any]:
    """Run one stage in this process and return its cost."""
    _import_all()
    cost = Cost()
    with cost.counted():
        found = _RUN[stage](uri, slides)
    return cost.rounded() | found


# -- all of it ------------------------------------------------------------------------------------


def measure(sizes: list[int], stages: list[str], *, batch: int, folder: str) -> dict[str, Any]:
    """Return {stage: {slides: cost}} and the exponents."""
    costs: dict[str, dict[int, dict[str, Any]]] = {}
    for slides in sizes:
        uri = f"{folder}/{slides}"
        shutil.rmtree(uri, ignore_errors=True) if "ingest" in stages else None
        for stage in stages:
            cost = _in_child(stage, uri, slides, batch)
            costs.setdefault(stage, {})[slides] = cost
            print(f"{slides:>7} {stage:<10} {_short(cost)}", file=sys.stderr, flush=True)
    return {"costs": costs, "exponents": exponents(costs)}


def exponents(costs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the growth of each figure between the two largest archives."""
    found: dict[str, dict[str, float]] = {}
    for stage, by_size in costs.items():
        if len(by_size) < 2:
            continue
        small, large = sorted(by_size)[-2:]
        for name in ("cpu_s", "read_mb", "written_mb", "peak_mb", "disk_mb"):
            a, b = by_size[small].get(name, 0), by_size[large].get(name, 0)
            if a > 0 and b > 0:
                growth = math.log(b / a) / math.log(large / small)
                found.setdefault(stage, {})[name] = round(growth, 2)
    return found


def _in_child(stage: str, uri: str, slides: int, batch: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.scale", "--run", stage, "--folder", uri]
    command += ["--slides", str(slides), "--batch", str(batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _short(cost: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in cost.items())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", default="200,2000,20000", help="sizes, or one size of --run")
    parser.add_argument("--only", action="append", choices=("ingest", *STAGES), help="stages")
    parser.add_argument("--batch", type=int, default=128, help="slides in a commit")
    parser.add_argument("--folder", help="where archives are made, and kept")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--run", choices=("ingest", *STAGES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = sorted(int(text) for text in given.slides.split(","))
    if given.run == "ingest":
        print(json.dumps(ingest(given.folder, sizes[0], batch=given.batch)))
        return
    if given.run:
        print(json.dumps(run_stage(given.run, given.folder, sizes[0])))
        return
    with tempfile.TemporaryDirectory(prefix="pathflip-scale-") as own:
        folder, stages = given.folder or own, given.only or ["ingest", *STAGES]
        found = measure(sizes, stages, batch=given.batch, folder=folder)
    if given.json:
        print(json.dumps(found))
        return
    for stage, of in found["exponents"].items():
        above = [name for name, growth in of.items() if growth > LIMIT]
        print(f"{stage:<10} {of}" + (f"  above {LIMIT}: {', '.join(above)}" if above else ""))


if __name__ == "__main__":
    main()
