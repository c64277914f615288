"""Benchmark of pretraining, beside the published formulation: ``python -m tests.bench.pretrain``.

Both sides do one step (forward and backward, fp32) of the published model's sizes on the same
weights, features and texts, each in processes of its own: CPU seconds of the second step, and the
most memory held beyond what the libraries hold by themselves. Their losses must be equal.
docs/concepts/models.md says what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pathflip.models import PathFLIP
from pathflip.text import draw_rng, sample_subcaptions, train_tokenizer
from tests.bench import meter, plain
from tests.bench.ingest import rounded, say
from tests.bench.small_llm import llm
from tests.bench.workers import workers

Report = dict[str, Any]

REGIONS, SLOTS, WIDTH, SUBCAPTIONS = 24, 256, 512, 8
VOCABULARY = 28996
"""Entries of BioBERT's."""
SENTENCES, SENTENCE_WORDS, TOKENS_PER_WORD = (4, 14, 7.3), 19, 1.3
"""Sentences (fewest, most, mean) and words a sentence of 732 SlideBench captions (2410.11761)."""
THREADS = 1
"""With more, CPU time counts how long threads wait for each other on a machine with other work."""
PARAMETERS = (
    "queries", "patch_in.weight", "qformer.layers.0.cross.key.weight",
    "qformer.layers.6.ffn_text.up.weight", "qformer.layers.6.ffn_query.up.weight",
    "qformer.words.weight", "text_out.weight", "context.layers.0.linear1.weight",
)  # fmt: skip
"""Whose gradients are compared."""


# -- the step -------------------------------------------------------------------------------------


class Words:
    """Stands in for a tokenizer: a text is its numbers, framed by [CLS] and [SEP]."""

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, text: str, most: int) -> list[int]:
        """Token ids of a text."""
        return [*[101, *map(int, text.split())][: most - 1], 102]


def texts(slides: int, seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Captions and sub-captions of realistic lengths, as token ids."""
    rng = np.random.default_rng(seed)
    captions, pieces, words = [], [], Words()
    low, high, mean = SENTENCES
    for slide in range(slides):
        count = int(np.clip(rng.normal(mean, 1.8), low, high).round())
        sentences = []
        for _ in range(count):
            length = int(max(5, rng.normal(SENTENCE_WORDS, 6)) * TOKENS_PER_WORD) + 1
            sentences.append(" ".join(map(str, rng.integers(1000, VOCABULARY, length))))
        drawn = sample_subcaptions(
            sentences, num=SUBCAPTIONS, rng=draw_rng(seed, 0, str(slide)), v1_window_bug=True
        )
        captions.append(words(" ".join(sentences), 384))
        pieces.append([words(text, 192) for text in drawn])
    return captions, pieces


def build(small: bool, **changes: Any) -> PathFLIP:
    """The published model, without dropout: two sides draw differently."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = ({"layers": 2} if small else {}) | changes
    model = PathFLIP.from_preset(
        "pathflip/official_v1", tokenizer=Words(), text_model=None, qformer_from_text=False,
        dropout=0.0, feature_dim=WIDTH, **sizes,
    )  # fmt: skip
    return model.train()


def perform(side: str, slides: int, regions: int, small: bool, warm: bool, profile: bool) -> Report:
    """In the measured process: the step, after a small one or (``warm``) after the same one."""
    torch.set_num_threads(THREADS)
    libraries = peak_gb()
    model = build(small)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(slides, regions, SLOTS, WIDTH, generator=generator)
    choice = torch.randint(SUBCAPTIONS, (slides, slides), generator=generator)
    captions, pieces = texts(slides)

    def step(features: torch.Tensor, captions: Any, pieces: Any) -> list[float]:
        model.zero_grad(set_to_none=True)
        if side == "ours":
            mask = torch.ones(features.shape[:3], dtype=torch.bool)
            out = model(features, mask, captions, pieces, negative_choice=choice)
            both = out.loss_slide, out.loss_region
        else:
            both = plain.losses(model, features, captions, pieces, choice)
        (both[0] + both[1]).backward()
        return [loss.item() for loss in both]

    if warm:
        step(features, captions, pieces)
    else:
        short = [ids[:8] for ids in captions]
        step(features[:, :1, :8], short, [[ids[:8] for ids in own] for own in pieces])
    started = time.process_time()
    recorder = torch.profiler.profile() if profile else nullcontext()
    with recorder:
        found = step(features, captions, pieces)
    flat = [ids for own in pieces for ids in own]
    parameters = dict(model.named_parameters())
    norms = [parameters[name].grad for name in PARAMETERS if name in parameters]
    report: Report = {
        "cpu_s": time.process_time() - started,
        "rss_gb": peak_gb(),
        "libraries_gb": libraries,
        "losses": found,
        "gradients": [0.0 if value is None else value.double().norm().item() for value in norms],
        "tokens": {
            "all": sum(map(len, captions)) + sum(map(len, flat)),
            "distinct": sum(map(len, {tuple(ids) for ids in [*captions, *flat]})),
            "padded": 384 * len(captions) + 192 * len(flat),
        },
    }
    if profile:
        events = sorted(recorder.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        report["top_ops"] = {
            event.key: f"{event.self_cpu_time_total / total:.1%} in {event.count} calls"
            for event in events[:10]
        }
    return report


def bounds(slides: int, regions: int, small: bool) -> Report:
    """Count the FLOPs of a step and its weights, and measure this machine's rate of products."""
    torch.set_num_threads(THREADS)
    side = 256 if small else 2048
    left, right = torch.randn(side, side), torch.randn(side, side)
    rates = []
    for _ in range(6):
        started = time.process_time()
        left @ right
        rates.append(2 * side**3 / (time.process_time() - started) / 1e9)
    model = build(small, recompute=False)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(slides, regions, SLOTS, WIDTH, generator=generator)
    mask = torch.ones(features.shape[:3], dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        out = model(features, mask, *texts(slides))
        (out.loss_slide + out.loss_region).backward()
    held = sum(own.numel() for own in model.parameters() if own.grad is not None)
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "sgemm_gflops": max(rates),
        "weights_and_gradients_gb": 2 * 4 * held / 2**30,
    }


def peak_gb() -> float:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(side: str, *flags: str, slides: int, regions: int, small: bool) -> Report:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.pretrain", "--side", side, *flags]
    command += ["--slides", str(slides), "--regions", str(regions)] + ["--small"] * small
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    if "--warm" not in flags:
        # Large blocks go back to the system when they are freed: what is measured is what a step
        # needs, not what the allocator keeps for later.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Report = json.loads(done.stdout)
    if side == "bounds":
        return found
    say(f"{side}, B={slides}, {regions} regions, {' '.join(flags)}: {found['cpu_s']:.1f} CPU-s, "
        f"{found['rss_gb']:.2f} GB")  # fmt: skip
    return found


def step(quick: bool) -> Report:
    """Ours beside the plain formulation, at B = 2 and B = 4."""
    report: Report = {}
    sizes = [(2, 4)] if quick else [(2, REGIONS), (4, REGIONS)]
    for slides, regions in sizes:
        kwargs: Report = {"slides": slides, "regions": regions, "small": quick}
        fast = [measure("ours", "--warm", **kwargs)]
        slow = measure("plain", "--warm", **kwargs)
        fast.append(measure("ours", "--warm", **kwargs))
        lean, fat = (measure(side, **kwargs) for side in ("ours", "plain"))
        needed = measure("bounds", **kwargs)
        cpu = statistics.mean(side["cpu_s"] for side in fast)
        own = needed["weights_and_gradients_gb"]
        needs = [side["rss_gb"] - side["libraries_gb"] for side in (lean, fat)]
        pairs = zip(fast[0]["losses"], slow["losses"], strict=True)
        norms = zip(fast[0]["gradients"], slow["gradients"], strict=True)
        found: Report = {
            "cpu_ratio": slow["cpu_s"] / cpu,
            "memory_ratio": needs[1] / needs[0],
            "rss_ratio": fat["rss_gb"] / lean["rss_gb"],
            "loss_gap": max(abs(a - b) for a, b in pairs),
            "gradient_gap": max(abs(a - b) / max(b, 1e-30) for a, b in norms),
            "cpu_s": {"ours": [side["cpu_s"] for side in fast], "plain": slow["cpu_s"]},
            "rss_gb": {"ours": lean["rss_gb"], "plain": fat["rss_gb"]},
            "rss_gb_allocator_keeps": {"ours": fast[0]["rss_gb"], "plain": slow["rss_gb"]},
            "tokens": fast[0]["tokens"],
            "needed": needed,
            "over_sgemm": needed["gflop"] / cpu / needed["sgemm_gflops"],
            "cpu_ratio_at_sgemm": slow["cpu_s"] * needed["sgemm_gflops"] / needed["gflop"],
            "memory_ratio_of_states": (needs[1] - own) / (needs[0] - own),
            "memory_ratio_without_states": needs[1] / own,
        }
        if not report:
            keys = ("cpu_ratio", "memory_ratio", "rss_ratio", "loss_gap", "gradient_gap",
                    "over_sgemm", "cpu_ratio_at_sgemm")  # fmt: skip
            report = {key: found[key] for key in keys}
        report[f"B={slides}, {regions} regions"] = found
    slides, regions = sizes[0]
    top = measure("ours", "--warm", "--profile", slides=slides, regions=regions, small=quick)
    return report | {"top_ops": top["top_ops"]}


# -- grounding ------------------------------------------------------------------------------------


def ground(quick: bool) -> Report:
    """Seconds to ground a text on a slide of 50 regions of 256 patches, at the paper's size."""
    torch.set_num_threads(THREADS)
    sizes: Report = {"layers": 2} if quick else {}
    tokenizer = train_tokenizer(["Necrosis is present."], vocab_size=100)
    model = PathFLIP.from_preset(
        "pathflip/paper", tokenizer=tokenizer, text_model=None, qformer_from_text=False, **sizes
    ).eval()
    features = torch.randn(1, 50, SLOTS, WIDTH)
    mask = torch.ones(1, 50, SLOTS, dtype=torch.bool)
    taken, used = [], []
    for _ in range(2 if quick else 5):
        wall, cpu = time.monotonic(), time.process_time()
        model.ground(features, mask, ["Necrosis is present."])
        taken.append(time.monotonic() - wall)
        used.append(time.process_time() - cpu)
    say(f"grounding: {min(taken):.2f} s, {min(used):.2f} CPU-s")
    return {"ground": {"wall_s": min(taken), "cpu_s": min(used), "threads": THREADS}}


# -- Ray ------------------------------------------------------------------------------------------


def ray_train(quick: bool) -> Report:
    """CPU time of a training step under Ray Train, beside the same loop in a bare process."""
    few, many = (4, 12) if quick else (20, 120)
    slopes: Report = {}
    for bare in (True, False):
        steps = [{"bare": bare, "steps": n} for n in (few, many)] * (1 if quick else 2)
        arguments = ["-m", "tests.bench.pretrain", "--runs", json.dumps(steps)]
        found = meter.run(
            arguments, done=lambda step: say(f"{step.answer}: {step.cpu_s:.1f} CPU-s")
        )
        # The first run of a session pays for its start: the least of each kind.
        small, big = (min(step.cpu_s for step in found[i::2]) for i in (0, 1))
        slopes["bare" if bare else "ray"] = (big - small) / (many - few)
    return {
        "ray_train_overhead": slopes["ray"] / slopes["bare"] - 1,
        "cpu_s_per_step": slopes,
    }


def perform_runs(steps: Sequence[Report]) -> None:
    """In the measured process: train the same thing again and again."""
    from jobs import pretrain
    from pathflip.training import run_dir, trainer
    from pathflip.training.contrastive import Contrastive
    from tests.archives import make_archive

    with tempfile.TemporaryDirectory(prefix="pathflip-bench-") as folder:
        archive = str(make_archive(Path(folder, "archive"), slides=64, regions=(12, 16), dim=128))
        for number, wanted in enumerate(steps):
            settings = [
                f"steps={wanted['steps']}", "batch_size=16", "val_fraction=0", "val_every=100000",
                "save_every=100000", "max_workers=1", "device=cpu", "model.warm_start=false",
                "subcaption_source=sentences",
            ]  # fmt: skip
            config = pretrain.resolve("pathflip/mini", overrides=settings)
            run = Path(folder, f"run-{number}")
            if wanted["bare"]:
                objective, _ = run_dir.prepare(Contrastive(config), archive, run)
                torch.set_num_threads(THREADS)
                trainer.train(run, objective)
            else:
                pretrain.pretrain(archive, run, config)
            print("@" + json.dumps(wanted), flush=True)
            sys.stdin.readline()


# -- the report -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Report]] = {
    "step": step,
    "ground": ground,
    "ray_train": ray_train,
    "workers": workers,
    "llm": llm,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON (it is printed anyway)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    parser.add_argument("--side", choices=("ours", "plain", "bounds"), help=argparse.SUPPRESS)
    parser.add_argument("--slides", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--regions", type=int, default=REGIONS, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side == "bounds":
        print(json.dumps(bounds(given.slides, given.regions, given.small)))
        return
    if given.side:
        found = perform(
            given.side, given.slides, given.regions, given.small, given.warm, given.profile
        )
        print(json.dumps(found))
        return
    if given.runs:
        perform_runs(json.loads(given.runs))
        return
    report: Report = {}
    load = [os.getloadavg()[0]]
    for name in given.only or PARTS:
        report |= PARTS[name](given.quick)
        load.append(os.getloadavg()[0])
    report["machine"] = {
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quick": given.quick,
    }
    print(json.dumps(rounded(report), indent=1))


if __name__ == "__main__":
    main()
