"""One card in six minutes: ``python -m tests.bench.gpu --json``.

Each part runs in a process of its own, for as long as BUDGET says: one that fails or takes longer
reports its error and costs the others nothing. Without a GPU they run at tiny sizes on the CPU,
which measures nothing. ``--all`` adds the parts beside the CPU and plain PyTorch.

Needs PyTorch, transformers, peft, scikit-learn, pyarrow and tensorboardX; the job of the part
ingest needs Lance and OpenSlide too, and the part vllm vLLM: without them they say so.
docs/notes/performance.md has the measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

Report = dict[str, Any]

BUDGET = {"ingest": 120, "pretrain": 60, "tune": 75, "vllm": 105}
"""Seconds of each part: 360 together."""
BESIDE = ("train", "step", "qformer", "encode", "instruct", "tune_step")
BESIDE_BUDGET = 300
MODULES = {"ingest": "gpu_ingest", "pretrain": "gpu_training", "tune": "gpu_training",
           "vllm": "gpu_vllm", **dict.fromkeys(BESIDE, "gpu_beside_cpu")}  # fmt: skip
FIGURES = {
    "ingest_patches_per_s": "ingest/ahead/patches_per_s",
    "ingest_over_floor": "ingest/ahead/over_floor",
    "ingest_busy": "ingest/ahead/busy",
    "ingest_peak_gib": "ingest/ahead/peak_gib",
    "job_patches_per_s": "ingest/job, 2 actors/patches_per_s",
    "job_over_floor": "ingest/job, 2 actors/over_floor",
    "job_busy": "ingest/job, 2 actors/busy",
    "pretrain_mfu": "pretrain/step/mfu",
    "pretrain_loop_mfu": "pretrain/loop/mfu",
    "pretrain_peak_gib": "pretrain/step/peak_gib",
    "tune_mfu": "tune/step/mfu",
    "tune_peak_gib": "tune/step/peak_gib",
    "vllm_tokens_per_s": "vllm/ours/tokens_per_s",
    "vllm_over_bare": "vllm/over_bare",
    "vllm_used_gib": "vllm/ours/used_gib",
}
"""The figures of the document's start, and where they stand in it; null where they were not had."""


def budget(name: str, *, quick: bool) -> float:
    """Seconds that a part may take; ten times as many where it is to run and measures nothing."""
    return BUDGET.get(name, BESIDE_BUDGET) * (10 if quick else 1)


def measured(name: str, *, quick: bool) -> Report:
    """Run a part in a process of its own; its report, with the machine, or what went wrong."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--part", name]
    began = time.monotonic()
    work = subprocess.Popen(
        command + (["--quick"] if quick else []), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = work.communicate(timeout=budget(name, quick=quick) + 15)
        report: Report = json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        report = {"error": f"not done within {budget(name, quick=quick):.0f} s"}
    except (ValueError, IndexError):
        report = {"error": f"the process ended with {work.wait()}; see what it said"}
    finally:
        with suppress(ProcessLookupError):  # engines and actors of the part, too
            os.killpg(work.pid, signal.SIGKILL)
        work.wait()
    report["seconds"] = round(time.monotonic() - began, 1)
    return report


def part(name: str, *, quick: bool) -> None:
    """Run a part in this process and print its report."""
    import torch

    from tests.bench.card import Bench, rounded

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = quick or device == "cpu"
    with tempfile.TemporaryDirectory(prefix="pathflip-gpu-") as folder:
        bench = Bench(device, quick=quick, folder=Path(folder), seconds=budget(name, quick=quick))
        try:
            report = getattr(import_module(f"tests.bench.{MODULES[name]}"), name)(bench)
        except Exception as error:
            import traceback

            traceback.print_exc()
            report = {"error": f"{type(error).__name__}: {error}"[:2000]}
    report["machine"] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quick": quick,
    }
    print(json.dumps(rounded(report)))


def figure(report: Report, path: str) -> Any:
    """The value at a path of the report; None where there is none."""
    found: Any = report
    for key in path.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON (it is printed anyway)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--all", action="store_true", help="also the parts beside the CPU")
    parser.add_argument("--only", choices=MODULES, action="append", help="one part; repeatable")
    parser.add_argument("--part", choices=MODULES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        part(given.part, quick=given.quick)
        return 0
    parts = given.only or [*BUDGET, *(BESIDE if given.all else ())]
    report: Report = {}
    machine: Report = {}
    for name in parts:
        report[name] = measured(name, quick=given.quick)
        machine = report[name].pop("machine", machine)
        print(f"{name}: {json.dumps(report[name])}", file=sys.stderr, flush=True)
    if machine.get("device") == "cpu":
        print("There is no GPU: tiny sizes on the CPU measure nothing.", file=sys.stderr)
    figures = {name: figure(report, path) for name, path in FIGURES.items()}
    print(json.dumps({"machine": machine, "figures": figures, **report}, indent=1))
    return int(any("error" in one for one in report.values()))


if __name__ == "__main__":
    sys.exit(main())
