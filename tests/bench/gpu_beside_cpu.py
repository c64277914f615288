"""Training and encoding on a GPU beside the CPU and plain PyTorch: parts of ``tests.bench.gpu``.

They need neither Ray, Lance nor OpenSlide: slides with planted findings are made in memory.
docs/notes/performance.md has the measurements.

Shapes: B slides, N regions, M patch slots, E patch width, Q latent queries, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathflip.checkpoints import load_run
from pathflip.models import InstructConfig, PathFLIP, PathFLIPInstruct, small_llm
from pathflip.models.chat_template import question_example
from pathflip.models.grounding import VARIANTS
from pathflip.models.llm import fingerprint_of, with_adapter
from pathflip.text import train_tokenizer
from pathflip.training import run_dir, trainer
from pathflip.training.config import resolve, resolve_tuning
from pathflip.training.objective import Worker
from tests.bench import plain
from tests.bench.card import TINY_MODEL, Bench, Report, kernels, say
from tests.bench.planted import (
    ARCHIVE,
    FINDINGS,
    ORGANS,
    PlantedContrastive,
    PlantedInstruct,
    wide_slides,
)

TUNED_SLIDES = {False: 16, True: 2}


class StopHere(Exception):
    """A training is stopped on purpose."""


def trained(objective: Any, run: Path, device: str, *, stop: int | None = None) -> list[float]:
    """Losses of a training, step by step; ``stop``: it is cut off there and goes on from disk."""
    objective, _ = run_dir.prepare(objective, ARCHIVE, run)

    def cut(progress: trainer.TrainingProgress) -> None:
        if progress.step == stop:
            raise StopHere

    if stop is not None:
        with suppress(StopHere):
            trainer.train(run, objective, device=device, progress=cut)
    trainer.train(run, objective, device=device)
    return [line["loss"] for line in run_dir.read_metrics(run) if "loss" in line]


def worst(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference of two lists."""
    return max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))


def train(bench: Bench) -> Report:
    """Pretrain on planted slides: GPU in bf16 and fp32 beside the CPU; stop, go on, export."""
    slides = bench.slides
    report: Report = {}
    steps = 6 if bench.quick else 150
    settings = [
        f"steps={steps}", "batch_size=8" if bench.quick else "batch_size=32", "log_every=1",
        "val_every=1000", f"save_every={steps // 3}", "model.feature_dim=32", "pieces=sentences",
    ]  # fmt: skip
    losses: dict[str, list[float]] = {}
    for name, device, precision, stop in (
        ("cpu fp32", "cpu", "fp32", None),
        ("fp32", bench.device, "fp32", None),
        ("auto", bench.device, "auto", None),
        ("auto, again", bench.device, "auto", None),
        ("auto, stopped", bench.device, "auto", steps // 2),
    ):
        config = resolve("pathflip/mini", overrides=[*settings, f"precision={precision}"])
        objective = PlantedContrastive(config, slides.corpus, slides.regions)
        run = bench.folder / f"pretrain-{name.replace(' ', '-')}"
        began = time.monotonic()
        losses[name] = trained(objective, run, device, stop=stop)
        result = run_dir.finish(objective, objective.load(run / run_dir.DATA), run)
        chance = result["val"]["chance"]
        report[name] = {
            "first_loss": losses[name][0],
            "last_loss": losses[name][-1],
            "mean_recall": result["val"]["mean_recall"],
            "chance": chance,
            "skipped": result["skipped"],
            "seconds": time.monotonic() - began,
        }
        bench.run = run
    report["gap_to_cpu"] = {
        "fp32, first step": worst(losses["fp32"][:1], losses["cpu fp32"][:1]),
        "fp32, all steps": worst(losses["fp32"], losses["cpu fp32"]),
        "auto, first step": worst(losses["auto"][:1], losses["cpu fp32"][:1]),
    }
    # Some sums on a GPU are in no fixed order: two runs differ, stopped or not.
    report["gap_when_repeated"] = worst(losses["auto, again"], losses["auto"])
    report["gap_when_stopped"] = worst(losses["auto, stopped"], losses["auto"])
    return report


def paper_model(bench: Bench, **overrides: Any) -> PathFLIP:
    """Preset pathflip/paper with a text tower from scratch."""
    torch.manual_seed(0)
    sizes: Report = TINY_MODEL if bench.quick else {}
    return PathFLIP.from_preset(
        "pathflip/paper", tokenizer=train_tokenizer(["There is necrosis."], vocab_size=200),
        text_model=None, qformer_from_text=False, feature_dim=bench.sizes["dim"],
        **(sizes | overrides),
    )  # fmt: skip


def recompute(model: torch.nn.Module, value: bool) -> None:
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = value


def pace(objective: Any, run: Path, bench: Bench, size: int) -> float:
    """Measure the training loop itself, reading and copying included, in slides a second."""
    skipped, counted = (1, 2) if bench.quick else (12, 24)
    at: list[float] = []

    def note(progress: trainer.TrainingProgress) -> None:
        at.append(time.perf_counter())
        if progress.step == skipped + counted:
            raise StopHere

    bench.peak(begin=True)
    with suppress(StopHere):
        trainer.train(run, objective, device=bench.device, progress=note)
    return size * counted / (at[-1] - at[skipped - 1])


def paper_run(bench: Bench, name: str) -> tuple[Any, Any, Path]:
    """Objective, dataset and begun run of pretraining at the paper's sizes."""
    sizes = {key: bench.sizes[key] for key in ("regions", "slots", "dim")}
    size = bench.sizes["batch"]
    corpus, regions = wide_slides(2 * size, **sizes)
    settings: Report = {"text_model": "null", "qformer_from_text": "false"}
    settings |= {"feature_dim": sizes["dim"]} | (TINY_MODEL if bench.quick else {})
    config = resolve(
        "pathflip/paper",
        overrides=[f"model.{key}={value}" for key, value in settings.items()]
        + [f"batch_size={size}", "steps=1000", "val_fraction=0"],
    )
    run = bench.folder / name
    objective, dataset = run_dir.prepare(PlantedContrastive(config, corpus, regions), ARCHIVE, run)
    return objective, dataset, run


def step(bench: Bench) -> Report:
    """An optimisation step at the paper's sizes, in bf16 and fp32, and how fast batches come."""
    size = bench.sizes["batch"]
    objective, dataset, run = paper_run(bench, "step")
    report: Report = {}
    pin = bench.device == "cuda"
    for name, bf16, tf32, again in (
        ("bf16", True, False, True),
        ("fp32", False, False, True),
        ("bf16, nothing made again", True, False, False),
        ("fp32 by TF32", False, True, True),
    ):
        if bench.quick and name not in ("bf16", "fp32"):
            continue
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        worker = Worker(device=torch.device(bench.device), bf16=bf16)
        loop = trainer.Trainer(run, objective, worker)
        loop.model.train()
        recompute(loop.model, again)
        batches = dataset.micro_batches(0, pin=pin)

        def once(loop: Any = loop, batches: Any = batches) -> Report:
            found: Report = loop._step(loop.model, batches)
            return found

        found = bench.fits(partial(bench.timed, once))
        if found["ms"]:
            found["slides_per_s"] = size / found["ms"] * 1e3
            found["loss"] = once()["loss"]
            say(f"step, {name}: {found}")
            if name in ("bf16", "fp32") and bench.device == "cuda":
                found["kernels"] = kernels(once)
        report[name] = found
        del loop, batches, once
    torch.set_float32_matmul_precision("highest")
    report["batch_ms"] = bench.timed(lambda: dataset.micro_batches(0, pin=pin))["ms"]
    report["trainer_slides_per_s"] = pace(objective, run, bench, size)
    report["trainer_peak_gib"] = bench.peak()
    bf16, fp32 = report["bf16"], report["fp32"]
    if bf16["ms"] and fp32["ms"]:
        report["fp32_over_bf16"] = fp32["ms"] / bf16["ms"]
    return report


def _round_trip(
    device: str,
    model: PathFLIP,
    side: Callable[[Tensor], tuple[Tensor, Tensor]],
    patches: Tensor,
    *,
    bf16: bool,
) -> Tensor:
    """Forward and backward of a Q-Former; returns the regions of the first slides."""
    patches.grad = None
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        whole, each = side(patches)
    (whole.float().square().mean() + each.float().mean(2).square().mean()).backward()
    return each.detach()[:2].float()


def qformer(bench: Bench) -> Report:
    """The Q-Former, forward and backward: ours, the published formulation, PyTorch's attention."""
    model = paper_model(bench, dropout=0.0).to(bench.device).train()
    slots, num = bench.sizes["slots"], bench.sizes["regions"]
    report: Report = {}

    def ours(patches: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(patches.shape[:3], dtype=torch.bool, device=patches.device)
        seen = model.qformer(model.queries, patches, mask)
        return seen.slide, seen.regions

    def published(patches: Tensor) -> tuple[Tensor, Tensor]:
        queries = model.queries.expand(len(patches), -1, -1)
        whole = plain.bert(model, queries, None, patches.flatten(1, 2))
        each = [plain.bert(model, queries, None, patches[:, n]) for n in range(num)]
        return whole, torch.stack(each, 1)

    def kept(patches: Tensor) -> tuple[Tensor, Tensor]:
        recompute(model, False)
        try:
            return ours(patches)
        finally:
            recompute(model, True)

    sides: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "ours": ours,
        "ours, nothing made again": kept,
        "published": published,
        "projected": lambda patches: plain.projected(model, patches),
    }
    for bf16 in (True, False):
        for size in sorted({bench.sizes["batch"], max(2, bench.sizes["batch"] // 4)}):
            shape = (size, num, slots, model.config.patch_width)
            # In bf16 they come so from the linear map before.
            dtype = torch.bfloat16 if bf16 else torch.float32
            patches = torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True)
            found: Report = {}
            outputs: dict[str, Tensor] = {}
            for name, side in sides.items():
                work = partial(_round_trip, bench.device, model, side, patches, bf16=bf16)
                found[name] = bench.fits(partial(bench.timed, work))
                if found[name]["ms"]:
                    outputs[name] = work()
                    if bench.device == "cuda" and size == bench.sizes["batch"]:
                        found[name]["kernels"] = kernels(work)
            for name in ("published", "projected"):
                if found[name]["ms"]:
                    found[f"{name}_over_ours"] = found[name]["ms"] / found["ours"]["ms"]
                    gap = (outputs[name] - outputs["ours"]).abs().max()
                    found[f"{name}_gap"] = float(gap)
            report[f"{'bf16' if bf16 else 'fp32'}, B={size}"] = found
            say(f"qformer, {bf16=}, B={size}: {found}")
            del patches
    return report


def encode(bench: Bench) -> Report:
    """Slides, texts and grounding on the GPU beside the CPU, fp32; milliseconds to ground."""
    model = paper_model(bench).eval()
    sizes = bench.sizes
    # More patches than attention takes at once without a gradient, and masked ones among them.
    generator = torch.Generator().manual_seed(0)
    num = 6 if bench.quick else 70
    shape = (1, num, sizes["slots"], sizes["dim"])
    features = torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:3], generator=generator) < 0.9
    mask[0, -1] = False
    texts = ["There is necrosis.", "Sections show colon.", "There is mucin."]
    found: dict[str, dict[str, Tensor]] = {}
    report: Report = {}
    for device in ("cpu", bench.device):
        model = model.to(device)
        slide = model.encode_slide(features, mask)
        raw = model.encode_text(texts, normalize=False)
        mine = {
            "slide": slide.slide, "regions": slide.regions, "text": raw,
            "scores": model.local_scores(slide, raw),
        }  # fmt: skip
        for variant in VARIANTS:
            heat = model.ground(features, mask, texts, variant=variant).heat
            mine[f"heat, {variant}"] = heat
        found[device] = {name: value.float().cpu() for name, value in mine.items()}
    cpu, here = found["cpu"], found[bench.device]
    report["largest_gap_to_cpu"] = {
        name: float((here[name] - cpu[name]).abs().max() / cpu[name].abs().max().clamp(min=1e-12))
        for name in cpu
    }
    fewer, there = features[:, :50].to(bench.device), mask[:, :50].to(bench.device)
    for name, bf16 in (("fp32", False), ("bf16", True)):

        def once(bf16: bool = bf16) -> None:
            with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=bf16):
                model.ground(fewer, there, texts[:1])

        report[f"ground, {name}"] = bench.timed(once)
        with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=bf16):
            # (1, 70) regions and many slides: regions go in parts, slides in parts of patches.
            heat = model.ground(features, mask, texts).heat
            embedded = model.encode_slide(features.expand(4, -1, -1, -1), mask.expand(4, -1, -1))
        report[f"ground, {name}"]["finite"] = bool(
            torch.isfinite(heat).all() and torch.isfinite(embedded.tokens).all()
        )
    return report


def instruct(bench: Bench) -> Report:
    """Tune a small language model on planted slides in both stages; export it and ask it."""
    if bench.run is None:
        train(bench)
    assert bench.run is not None
    run, slides = bench.run, bench.slides
    report: Report = {}
    llm = bench.folder / "llm"
    few = small_llm.SmallLLMConfig(epochs=1, batch_size=16, mixed=0)
    small_llm.make(slides.corpus.captions, llm, few)
    losses: dict[str, list[float]] = {}
    for name, device, precision, stop in (
        ("cpu fp32", "cpu", "fp32", None),
        ("fp32", bench.device, "fp32", None),
        ("auto", bench.device, "auto", None),
        ("auto, stopped", bench.device, "auto", 3),
    ):
        settings = [
            "projector_epochs=1", "epochs=2", "batch_size=8", "log_every=1", "save_every=2",
            "instruct.train_vision=true", "instruct.lora_dropout=0.0", "captions=whole",
            "pieces=sentences", "align=0.1", f"precision={precision}",
        ]  # fmt: skip
        given = {"run": str(run), "llm": str(llm)}
        config = resolve_tuning("instruct/mini", overrides=settings, given=given)
        vision = load_run(run)
        about = slides.corpus.about | {
            "vision": {"run": run.name, "name": vision.name, "fingerprint": vision.fingerprint},
            "base": {"name": config.llm, "fingerprint": fingerprint_of(llm)},
        }
        keep = slice(0, 40)
        corpus = replace(slides.corpus, questions=slides.questions, about=about)
        parts = {
            key: getattr(corpus, key)[keep]
            for key in ("slide_ids", "patients", "splits", "captions", "pieces", "num_regions",
                        "fingerprints", "questions")
        }  # fmt: skip
        corpus = replace(corpus, **parts)
        objective = PlantedInstruct(config, corpus, slides.regions)
        tuned = bench.folder / f"tune-{name.replace(' ', '-')}"
        began = time.monotonic()
        losses[name] = trained(objective, tuned, device, stop=stop)
        result = run_dir.finish(objective, objective.load(tuned / run_dir.DATA), tuned)
        report[name] = {
            "losses": [losses[name][0], losses[name][-1]],
            "val": result["val"]["loss_answer"],
            "seconds": time.monotonic() - began,
        }
    report["gap_to_cpu"] = {
        "fp32, first step": worst(losses["fp32"][:1], losses["cpu fp32"][:1]),
        "fp32, all steps": worst(losses["fp32"], losses["cpu fp32"]),
        "auto, first step": worst(losses["auto"][:1], losses["cpu fp32"][:1]),
    }
    report["gap_when_stopped"] = worst(losses["auto, stopped"], losses["auto"])
    answers, letters, likely = {}, {}, {}
    for device in ("cpu", bench.device):
        model = PathFLIPInstruct.from_pretrained(tuned / "model", device=device)
        dataset = objective.load(tuned / run_dir.DATA)
        batch = dataset.batch([0, 1], epoch=0).to(torch.device(device))
        with torch.no_grad():
            prefixes = model.visual_prefix(batch.features, batch.patch_mask)
            prompts = [model.embed_prompt(own, "Which organ is shown?") for own in prefixes]
        answers[device] = model.generate(prompts, max_new_tokens=12)
        letters[device] = model.letter_logits(prompts, "ABCD").cpu()
        scores = model.continuation_log_probs(prompts, [list(ORGANS)] * 2)
        likely[device] = [value for own in scores for value, _ in own]
    report["same_answers_as_cpu"] = answers["cpu"] == answers[bench.device]
    report["letter_gap"] = float((letters["cpu"] - letters[bench.device]).abs().max())
    report["likelihood_gap"] = worst(likely[bench.device], likely["cpu"])
    return report


def random_llm(bench: Bench) -> tuple[Any, Any]:
    """Language model of the layers of Qwen3-0.6B, random, and its tokenizer."""
    tokenizer = small_llm.train_bpe(bench.slides.corpus.captions, vocab_size=600)
    sizes = {"hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 3072}
    kind = small_llm.SmallLLMConfig(**({} if bench.quick else sizes))
    with torch.device(bench.device):
        llm = small_llm._build(kind, tokenizer)
    return llm, tokenizer


def tuned_model(bench: Bench) -> tuple[PathFLIPInstruct, Callable[[], Tensor]]:
    """An instruction model with LoRA in a random language model, and what computes its loss."""
    llm, tokenizer = random_llm(bench)
    config = InstructConfig()
    model = PathFLIPInstruct(
        paper_model(bench), with_adapter(llm, config), tokenizer, config,
        base={"name": "random", "fingerprint": ""},
    ).to(bench.device).train()  # fmt: skip
    model.trainable("all")
    slides = TUNED_SLIDES[bench.quick]
    shape = (slides, bench.sizes["regions"], bench.sizes["slots"], bench.sizes["dim"])
    features = torch.randn(shape, device=bench.device)
    mask = torch.ones(shape[:3], dtype=torch.bool, device=bench.device)
    answer = " ".join(f"There is {name}." for name in FINDINGS)
    examples = [[question_example("What is seen?", (), answer)] * 4] * slides
    return model, lambda: model(features, mask, examples).loss


def tune_step(bench: Bench) -> Report:
    """Forward and backward of instruction tuning, in bf16 and fp32."""
    model, loss_of = tuned_model(bench)
    slides = TUNED_SLIDES[bench.quick]
    report: Report = {}
    for name, bf16 in (("bf16", True), ("fp32", False)):

        def once(bf16: bool = bf16) -> float:
            model.zero_grad(set_to_none=True)
            with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=bf16):
                loss = loss_of()
            loss.backward()
            return loss.item()

        report[name] = bench.fits(partial(bench.timed, once))
        if report[name]["ms"]:
            report[name] |= {"slides_per_s": slides / report[name]["ms"] * 1e3, "loss": once()}
        say(f"tune_step, {name}: {report[name]}")
    return report
