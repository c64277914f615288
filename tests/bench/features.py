"""Speed of importing patch features, beside what reading and writing the same bytes take alone.

    python -m tests.bench.features [--slides N] [--patches N] [--dim N] [--json]

Slides are a disc of tissue each, in files chunked as TRIDENT, CLAM and pathflip write them. The two
floors are h5py's reading of the files, and Lance's writing of the regions' 16-bit features without
checksums or digests; ``share`` is the import's speed by that of the slower one. All speeds are MB
of the files' features. Files and archive lie in $TMPDIR; the files were just written, so they come
from memory. Seconds of the CPU stand beside those of the clock, for machines that do other things.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REGION = 256  # patches
ROWS = {"rows of 1 (TRIDENT)": 1, "rows of 32 (CLAM)": 32, "rows of 1,024 (pathflip)": 1024}


def measure(*, slides: int, rows: int, patches: int, dim: int) -> dict[str, float]:
    """Return seconds, MB/s and peak memory of one import, and the speeds of the floors."""
    import torch  # noqa: F401 - as lance and h5py: what is measured is not their loading

    from pathflip.interop.features.importing import FeaturesImported, import_features

    with TemporaryDirectory() as made:
        folder = Path(made) / "features_uni_v1"
        _write(folder, slides=slides, rows=rows, patches=patches, dim=dim)
        results: list[FeaturesImported] = []
        clock, cpu = _timed(
            lambda: results.append(import_features(str(Path(made) / "archive"), folder))
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        reader_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        (result,) = results
        assert result.slides["imported"] == slides
        again, _ = _timed(lambda: import_features(str(Path(made) / "archive"), folder))
        _, reading = _timed(lambda: _read(folder))
        per_slide = result.regions // slides
        table = _regions(per_slide, dim=dim)
        _, writing = _timed(lambda: _write_alone(Path(made) / "floor", table, slides=slides))
    mb = result.bytes / 1e6
    return {
        "slides": slides,
        "mb": round(mb, 1),
        "seconds": round(clock, 2),
        "seconds_again": round(again, 2),
        "cpu_seconds": round(cpu, 2),
        "mb_per_second": round(mb / clock, 1),
        "mb_per_cpu_second": round(mb / cpu, 1),
        "read_mb_per_cpu_second": round(mb / reading, 1),
        "write_mb_per_cpu_second": round(mb / writing, 1),
        "share": round(max(reading, writing) / cpu, 3),
        "peak_mb": peak,
        "reader_peak_mb": reader_peak,
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the clock and of the CPU that something takes."""
    clock, cpu = time.perf_counter(), sum(os.times()[:4])  # with processes that have ended
    work()
    return time.perf_counter() - clock, sum(os.times()[:4]) - cpu


def _read(folder: Path) -> None:
    import h5py

    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            assert len(file["features"][:])


def _regions(count: int, *, dim: int) -> Any:
    """Return as many regions of features as a slide has."""
    import numpy as np
    import pyarrow as pa

    values = np.random.default_rng(0).standard_normal(count * REGION * dim, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16)), REGION * dim)
    return pa.table({"features": column})


def _write_alone(folder: Path, table: Any, *, slides: int) -> None:
    """Write the features of regions, and nothing else."""
    import lance
    from lance.fragment import write_fragments

    lance.write_dataset(table.slice(0, 0), str(folder), schema=table.schema)
    for _ in range(slides):
        write_fragments(table, str(folder))


def _write(folder: Path, *, slides: int, rows: int, patches: int, dim: int) -> None:
    """Write a disc of tissue on a grid of 512 px, the same features for every slide."""
    import h5py
    import numpy as np

    folder.mkdir(parents=True)
    side = np.stack(np.meshgrid(np.arange(150), np.arange(150)), axis=-1).reshape(-1, 2)
    near = np.hypot(*(side - 75).T).argsort(kind="stable")[:patches]
    places = side[np.sort(near)] * 512
    values = np.random.default_rng(0).standard_normal((patches, dim), dtype=np.float32)
    for number in range(slides):
        with h5py.File(folder / f"slide{number:04d}.h5", "w") as file:
            file.create_dataset("features", data=values, chunks=(rows, dim), maxshape=(None, dim))
            coords = file.create_dataset("coords", data=places)
            coords.attrs.update(
                {
                    "patch_size": 256, "patch_size_level0": 512, "target_magnification": 20,
                    "level0_width": 76_800, "level0_height": 76_800, "mpp": 0.25,
                }
            )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--patches", type=int, default=15_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rows", type=int, choices=sorted(ROWS.values()), help="only this chunk")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {"cpus": os.cpu_count()}
    for name, rows in ROWS.items():
        if given.rows in (None, rows):
            found[name] = measure(
                slides=given.slides, rows=rows, patches=given.patches, dim=given.dim
            )
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
