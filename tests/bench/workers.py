"""Benchmark of two workers beside one, the training loop of ``pathflip/mini`` without Ray.

Workers meet over gloo and compute on a thread each, as Ray Train's do. One worker takes whole
batches, two take half of each; times are medians over steps, so that what else a machine does for
a moment does not count. Run it on two cores that nobody else uses, or at real-time priority.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.ingest import say

Report = dict[str, Any]

BATCH, STEPS, WARM = 16, 60, 15
"""Slides of a step, steps, and those before the first that is timed."""


def workers(quick: bool) -> Report:
    """Wall and CPU time of a step with one worker and with two, and with one of half the batch."""
    from jobs import pretrain
    from pathflip.training import run_dir
    from pathflip.training.contrastive import Contrastive
    from tests.archives import make_archive

    steps = 20 if quick else STEPS
    with tempfile.TemporaryDirectory(prefix="pathflip-bench-") as folder:
        archive = str(make_archive(Path(folder, "archive"), slides=64, regions=(12, 16), dim=128))
        found: Report = {}
        for name, batch, world in (("half", BATCH // 2, 1), ("one", BATCH, 1), ("two", BATCH, 2)):
            settings = [
                f"steps={steps}", f"batch_size={batch}", "val_fraction=0", "val_every=100000",
                "save_every=100000", "max_workers=2", "device=cpu", "model.warm_start=false",
                "subcaption_source=sentences",
            ]  # fmt: skip
            config = pretrain.resolve("pathflip/mini", overrides=settings)
            run = Path(folder, name)
            run_dir.prepare(Contrastive(config), archive, run)
            found[name] = _together(run, settings, world)
            say(f"{name}: {found[name]}")
    wall = {name: own[0]["wall_ms"] for name, own in found.items()}
    busy = {name: [worker["cpu_ms"] for worker in own] for name, own in found.items()}
    return {
        "two_workers": wall["one"] / wall["two"],
        "two_workers_without_waiting": busy["one"][0] / max(busy["two"]),
        "half_batches_without_others": busy["one"][0] / busy["half"][0],
        "workers_wall_ms": wall,
        "workers_cpu_ms": busy,
        "workers_losses": {name: own[0]["loss"] for name, own in found.items()},
    }


def _together(run: Path, settings: list[str], world: int) -> list[Report]:
    """Train a run in ``world`` processes; return what each says of its steps."""
    given = {"run": str(run), "settings": settings, "world": world}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.workers", json.dumps(given | {"rank": rank})],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    return [json.loads(job.communicate()[0]) for job in jobs]


def _work(run: str, settings: list[str], world: int, rank: int) -> None:
    """Train as one of the workers and print the medians of the steps."""
    import torch
    import torch.distributed as dist

    from jobs import pretrain
    from pathflip.training import trainer
    from pathflip.training.contrastive import Contrastive

    torch.set_num_threads(1)
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{run}/meet", rank=rank, world_size=world
        )
    times: list[tuple[float, float]] = []
    loss = None

    def note(progress: trainer.TrainingProgress) -> None:
        nonlocal loss
        loss = progress.loss
        times.append((time.perf_counter(), time.process_time()))

    objective = Contrastive(pretrain.resolve("pathflip/mini", overrides=settings))
    trainer.train(run, objective, rank=rank, world=world, progress=note)
    timed = times[WARM - 1 :]
    wall, cpu = (
        statistics.median((after[i] - before[i]) * 1e3 for before, after in pairwise(timed))
        for i in (0, 1)
    )
    print(json.dumps({"wall_ms": wall, "cpu_ms": cpu, "loss": loss}))


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
