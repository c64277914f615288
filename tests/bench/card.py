"""The card that ``tests.bench.gpu`` measures: sizes, timer, memory, peak, and how busy it is."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.planted import Slides

Report = dict[str, Any]

PAPER = {"regions": 24, "slots": 256, "dim": 1024, "batch": 64}
"""A step of preset pathflip/paper: as many regions and slides as its settings say, features as wide
as those of many pathology encoders."""
TINY = {"regions": 3, "slots": 8, "dim": 16, "batch": 4}
TINY_MODEL: Report = {
    "d": 32, "patch_width": 16, "num_queries": 4, "hidden": 32, "layers": 2, "heads": 2, "ffn": 32,
    "text_hidden": 32, "text_layers": 1, "text_heads": 2, "text_ffn": 32,
}  # fmt: skip


PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "GH200": 989.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A10G": 70.0, "A10": 125.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "RTX 6000 Ada": 364.2, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense bf16 products with fp32 sums, from the makers' data sheets; the first name that fits."""


class Bench:
    """Device, sizes and folder of a measurement.

    Args:
        device: ``cuda`` or ``cpu``.
        quick: Tiny sizes.
        folder: For runs and models.
        seconds: Time that the part may take; what it measures last is left out where little is.
    """

    def __init__(self, device: str, *, quick: bool, folder: Path, seconds: float) -> None:
        self.device, self.quick, self.folder = device, quick, folder
        self._until = time.monotonic() + seconds
        self.sizes = TINY if quick else PAPER
        self.rounds = 1 if quick else 5
        self.run: Path | None = None

    @cached_property
    def slides(self) -> Slides:
        """Slides with planted findings."""
        return Slides(40 if self.quick else 320, regions=(2, 6), slots=16, dim=32)

    @property
    def left(self) -> float:
        """Seconds that the part still has."""
        return self._until - time.monotonic()

    def timed(self, work: Callable[[], Any]) -> Report:
        """Seconds of one call, the least of several, and most memory held on the GPU meanwhile."""
        work()
        self.peak(begin=True)
        taken = []
        for _ in range(self.rounds):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            taken.append(time.perf_counter() - began)
        return {"ms": 1e3 * min(taken), "peak_gib": self.peak()}

    def peak(self, *, begin: bool = False) -> float | None:
        """Most GiB held on the GPU since it was called with ``begin``."""
        if self.device != "cuda":
            return None
        if begin:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def fits(self, work: Callable[[], Report]) -> Report:
        """Return the measurement, or a note that there is too little memory for it."""
        try:
            return work()
        except torch.OutOfMemoryError:
            return {"ms": None, "peak_gib": None, "note": "out of memory"}
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


def peak_flops(bench: Bench) -> tuple[float, str]:
    """Most bf16 operations a second, and where the number is from: a data sheet, or a product here.

    Of a card that the table lacks, and of a CPU (in float32), it is the rate of a large product.
    """
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    for known, tera in PEAK_TFLOPS.items():
        if known in name:
            return tera * 1e12, "data sheet"
    side = 8192 if bench.device == "cuda" else 512
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=bench.device, dtype=dtype)
    return 2 * side**3 / bench.timed(lambda: matrix @ matrix)["ms"] * 1e3, "measured product"


def flops_of(work: Callable[[], Any]) -> int:
    """Count the operations of products and attention in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


class Busy:
    """Share of the time that the card computed, of all processes, as the driver tells it."""

    share: float | None = None


@contextmanager
def watching(device: str) -> Iterator[Busy]:
    """Ask the driver ten times a second; of a CPU nothing is told."""
    found, seen = Busy(), []
    if device != "cuda":
        yield found
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    command += ["-i", "0", "-lms", "100"]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def listen() -> None:
        assert asked.stdout is not None
        seen.extend(float(line) for line in asked.stdout if line.strip().isdigit())

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        asked.kill()
        asked.wait()
        thread.join()
        kept = seen[3:]  # the driver's figure is of the moments before
        found.share = sum(kept) / len(kept) / 100 if kept else None


def kernels(work: Callable[[], Any]) -> Report:
    """Return a call's largest GPU operations and their shares of its time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as recorder:
        work()
    events = sorted(recorder.key_averages(), key=lambda event: -event.self_device_time_total)
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    ops = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    total = max(1e-9, sum(event.self_device_time_total for event in on_gpu))
    return {
        "ms": total / 1e3,
        "ops": {
            event.key: f"{event.self_device_time_total / total:.1%} in {event.count} calls"
            for event in ops[:14]
        },
    }


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """Floats to four significant digits, however deep."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
