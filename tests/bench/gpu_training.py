"""Share of a card's bf16 peak that pretraining and tuning reach: parts of ``tests.bench.gpu``.

Operations are counted (products and attention, forward and backward, nothing that is made again),
and divided by the time of a whole step, optimiser included, and by the card's peak.
"""

from __future__ import annotations

from functools import partial

import torch

from pathflip.models.llm import compile_layers
from pathflip.training import trainer
from pathflip.training.objective import Worker
from tests.bench.card import Bench, Report, flops_of, peak_flops
from tests.bench.gpu_beside_cpu import TUNED_SLIDES, pace, paper_run, recompute, tuned_model


def pretrain(bench: Bench) -> Report:
    """A step of PathFLIP at the paper's sizes in bf16, and the loop with the making of batches."""
    objective, dataset, run = paper_run(bench, "pretrain")
    loop = trainer.Trainer(run, objective, Worker(device=torch.device(bench.device), bf16=True))
    loop.model.train()
    batches = dataset.micro_batches(0, pin=bench.device == "cuda")
    once = partial(loop._step, loop.model, batches)
    recompute(loop.model, False)
    size, peak = bench.sizes["batch"], peak_flops(bench)
    flops = flops_of(once)
    report: Report = {"slides": size, "tflop_a_step": flops / 1e12, "peak_tflops": peak[0] / 1e12,
                      "peak_from": peak[1]}  # fmt: skip
    for name, again in (("step", True), ("step, nothing made again", False)):
        recompute(loop.model, again)
        report[name] = _with_mfu(bench.fits(partial(bench.timed, once)), flops, peak[0])
    rate = pace(objective, run, bench, size)
    report["loop"] = {
        "slides_per_s": rate, "mfu": flops / size * rate / peak[0], "peak_gib": bench.peak(),
    }  # fmt: skip
    return report


def tune(bench: Bench) -> Report:
    """A step of tuning in bf16: the paper's slide model, and LoRA in a Qwen3 of 0.6B's layers."""
    model, loss_of = tuned_model(bench)
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    peak, flops = peak_flops(bench), flops_of(once)
    report: Report = {
        "slides": TUNED_SLIDES[bench.quick], "tflop_a_step": flops / 1e12,
        "peak_tflops": peak[0] / 1e12, "peak_from": peak[1],
    }  # fmt: skip
    report["step"] = _with_mfu(bench.fits(partial(bench.timed, once)), flops, peak[0])
    if bench.device == "cuda" and bench.left > 40:
        compile_layers(model.causal)
        report["step, layers compiled"] = _with_mfu(bench.timed(once), flops, peak[0])
    return report


def _with_mfu(timed: Report, flops: int, peak: float) -> Report:
    return timed | ({"mfu": flops / timed["ms"] * 1e3 / peak} if timed["ms"] else {})
