"""Patches a second of a ViT-L on a card, and how busy they keep it: part of ``tests.bench.gpu``.

The encoder is this package's own, loaded from a folder of random weights as any other is. The floor
is the bare network in bf16 on images that lie on the card. Between the two stand pixels in memory,
encoded region after region as the job does it, and the job itself on generated slides, with one and
with two actors on the card, where Lance and OpenSlide are installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip.encoders import load_encoder
from tests.bench.card import Bench, Report, flops_of, peak_flops, say, watching

NEEDED = ("lance", "lancedb", "openslide", "imagecodecs", "simplejpeg")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096, "image_size": 224, "patch_size": 16}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 32, "patch_size": 16}  # fmt: skip


def ingest(bench: Bench) -> Report:
    """Encode at the floor, from memory and from slides."""
    folder = _vit(bench)
    encoder: Any = load_encoder(f"hf:{folder}", device=bench.device)
    report = _from_memory(bench, encoder)
    say(f"ingest, from memory: {report}")
    del encoder
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return report | {"job": {"note": f"not installed: {', '.join(missing)}"}}
    slides = _slides(bench)
    for actors in (2, 1) if bench.device == "cuda" else (2,):
        if bench.left < 20:
            report[f"job, {actors} actors"] = {"note": "no time left"}
            continue
        found = _job(bench, folder, slides, actors)
        found["over_floor"] = found["patches_per_s"] / report["floor"]["patches_per_s"]
        report[f"job, {actors} actors"] = found
    return report


def _vit(bench: Bench) -> Path:
    from transformers import ViTConfig, ViTModel

    folder = bench.folder / "vit"
    torch.manual_seed(0)
    about = ViTConfig(**(TINY if bench.quick else LARGE))
    ViTModel(about, add_pooling_layer=False).save_pretrained(folder)
    return folder


def _from_memory(bench: Bench, encoder: Any) -> Report:
    from jobs.ingest.reading import encode_ahead

    slots, px = (16, 64) if bench.quick else (256, 256)
    rng = np.random.default_rng(0)
    shape = (slots, px, px, 3)
    memory = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]
    images = torch.randn(slots, 3, encoder.input_px, encoder.input_px, device=bench.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.inference_mode(), encoder._precision():
            encoder._forward(images)

    floor = bench.timed(bare)
    rate = slots / floor["ms"] * 1e3
    peak, source = peak_flops(bench)
    flops = flops_of(bare)
    report: Report = {
        "floor": {
            "patches_per_s": rate, "peak_gib": floor["peak_gib"],
            "gflop_a_patch": flops / slots / 1e9, "mfu": flops / floor["ms"] * 1e3 / peak,
            "peak_tflops": peak / 1e12, "peak_from": source,
        }
    }  # fmt: skip
    regions = 4 if bench.quick else max(20, math.ceil(12 * rate / slots))  # 12 s of the floor

    def batches() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for at in range(regions):
            yield at, memory[at % 2]

    for name, ahead in (("one after another", False), ("ahead", True)):
        encoder(memory[0])
        bench.peak(begin=True)
        with watching(bench.device) as busy:
            began = time.perf_counter()
            if ahead:
                for _ in encode_ahead([encoder], batches()):
                    pass
            else:
                for _, pixels in batches():
                    encoder(pixels)
            took = time.perf_counter() - began
        report[name] = {
            "patches_per_s": regions * slots / took, "over_floor": regions * slots / took / rate,
            "busy": busy.share, "peak_gib": bench.peak(),
        }  # fmt: skip
    if bench.device == "cuda" and bench.left > 120:
        encoder.compile()
        compiled = bench.timed(bare)
        report["floor, compiled"] = {"patches_per_s": slots / compiled["ms"] * 1e3}
    return report


def _slides(bench: Bench) -> list[str]:
    from pathflip.synth.large import make_slide

    count, side = (1, 1024) if bench.quick else (12, 20480)
    return [
        str(
            make_slide(
                bench.folder / f"slide{n}.svs", width=side, height=side, mpp=0.5, seed=n,
                layout="aperio",
            )
        )
        for n in range(count)
    ]  # fmt: skip


def _job(bench: Bench, vit: Path, slides: list[str], actors: int) -> Report:
    """The job between its first and its last news: the start of processes is left out."""
    from jobs.ingest import IngestConfig
    from jobs.ingest import ingest as run
    from jobs.ingest.result import IngestProgress
    from pathflip.geometry import Tiling

    news: list[IngestProgress] = []
    config = IngestConfig(
        encoder=f"hf:{vit}", device=bench.device, actors=actors, commit_s=1.0,
        tiling=Tiling(region_um=256.0, patch_um=32.0) if bench.quick else Tiling(),
    )  # fmt: skip
    with watching(bench.device) as busy:
        run(slides, str(bench.folder / f"archive{actors}"), config, progress=news.append)
    first, last = news[0], news[-1]
    for one in news:
        if one.patches:
            first = one
            break
    patches, seconds = last.patches - first.patches, last.seconds - first.seconds
    if not patches:  # a single piece of news
        patches, seconds = last.patches, last.seconds
    return {
        "patches": last.patches, "patches_per_s": patches / seconds, "seconds": last.seconds,
        "busy": busy.share,
    }  # fmt: skip
