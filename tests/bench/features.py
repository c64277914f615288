"""Speed of importing patch features: slides of 15,000 patches, as TRIDENT and as CLAM chunk them.

    python -m tests.bench.features [--slides N] [--json]

Files and archive lie in $TMPDIR. The files were just written, so they come from memory: what is
measured is what the import itself can do. Seconds of the CPU stand beside those of the clock, for
machines that do other things as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PATCHES, DIM = 15_000, 1024
ROWS = {"rows of 1 (TRIDENT)": 1, "rows of 32 (CLAM)": 32, "rows of 1,024 (pathflip)": 1024}


def measure(*, slides: int, rows: int) -> dict[str, float]:
    """Return seconds, MB/s and peak memory of one import."""
    from pathflip.interop.features.importing import import_features

    with TemporaryDirectory() as made:
        folder = Path(made) / "features_uni_v1"
        _write(folder, slides=slides, rows=rows)
        clock, cpu = time.perf_counter(), time.process_time()
        result = import_features(str(Path(made) / "archive"), folder)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    assert result.slides["imported"] == slides
    mb = result.bytes / 1e6
    return {
        "slides": slides,
        "mb": round(mb, 1),
        "seconds": round(clock, 2),
        "cpu_seconds": round(cpu, 2),
        "mb_per_second": round(mb / clock, 1),
        "mb_per_cpu_second": round(mb / cpu, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def _write(folder: Path, *, slides: int, rows: int) -> None:
    """Write a disc of tissue on a grid of 512 px, the same features for every slide."""
    import h5py
    import numpy as np

    folder.mkdir(parents=True)
    side = np.stack(np.meshgrid(np.arange(150), np.arange(150)), axis=-1).reshape(-1, 2)
    near = np.hypot(*(side - 75).T).argsort(kind="stable")[:PATCHES]
    places = side[np.sort(near)] * 512
    values = np.random.default_rng(0).standard_normal((PATCHES, DIM), dtype=np.float32)
    for number in range(slides):
        with h5py.File(folder / f"slide{number:04d}.h5", "w") as file:
            file.create_dataset("features", data=values, chunks=(rows, DIM), maxshape=(None, DIM))
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
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {"cpus": os.cpu_count()}
    found |= {name: measure(slides=given.slides, rows=rows) for name, rows in ROWS.items()}
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
