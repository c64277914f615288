"""Memory of training's data as trees become more: part ``memory`` of ``mrplip``.

Makes two archives of made-up trees, one with four times as many. In a process of its own for each,
the trees are chosen, batches are drawn from the archive (nothing is cached) and the peak of
resident memory is read. What may grow is the list of trees: their ids and digests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pathflip.archive import Archive
from pathflip.training.tree_corpus import make_tree_corpus
from pathflip.training.tree_dataset import TreeDataset, TreeSampling
from tests.trees import make_tree_archive

PER_SLIDE, BATCH, STEPS = 8, 4, 100


def measure(trees: int) -> dict[str, Any]:
    """Return the peak memory of batches of ``trees`` and of four times as many trees."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("n", trees), ("4n", 4 * trees)):
            uri = make_tree_archive(
                Path(folder) / name, slides=count // PER_SLIDE, per_slide=PER_SLIDE
            )
            command = [sys.executable, "-m", "tests.bench.mrplip_memory", str(uri)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            report[name] = json.loads(done.stdout)
    few, many = report["n"], report["4n"]
    report["ratio"] = many["peak_mb"] / few["peak_mb"]
    grown = (many["peak_mb"] - few["peak_mb"]) * 2**20
    report["bytes_a_tree"] = grown / (many["trees"] - few["trees"])
    return report


def draw(uri: str) -> dict[str, Any]:
    """Choose the trees, draw batches, and return the peak of this process."""
    corpus = make_tree_corpus(Archive(uri))
    sampling = TreeSampling(seed=0, batch_size=BATCH, accumulate=1, pairs=16, steps=STEPS)
    dataset = TreeDataset(corpus, sampling)
    for step in range(STEPS):
        dataset.micro_batches(step)
    # Not ru_maxrss: that counts what the parent had when it started this process.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"trees": len(corpus), "steps": STEPS, "peak_mb": int(peak) / 1024}


if __name__ == "__main__":
    print(json.dumps(draw(sys.argv[1])))
