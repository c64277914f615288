"""MR-PLIP's step beside plain formulations: part ``step`` of ``mrplip``.

One step (forward and backward, fp32, one thread) of the same weights, trees, texts and draws:

* ours: distinct keywords, packed texts, text-guided vectors once a patch;
* edges: the fusion encoder anew for both ends of every edge, texts padded to a maximum;
* bags: what a careful plain version does, once for all patches of a tree, padded to the longest.

Each number is the least CPU time of some repetitions in one process. Losses are compared by the
largest difference of one of the six, relative to it where it is above 1. No dropout, as the sides
would draw differently.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pathflip.models import MRPLIP, TreeBatch
from tests.bench import mr_plain
from tests.bench.ingest import say

Report = dict[str, Any]

VOCABULARY = 600
TREES, PAIRS, KEYWORDS, POOL = 4, 16, 40, 250
CAPTION, KEYWORD = (12, 40), (3, 6)
"""Tokens, fewest and most, with [CLS] and [SEP]."""
PADDED = {"texts": 64, "words": 16}
WIDTH = 131


class Words:
    """Stands in for a tokenizer: a text is its numbers, framed by [CLS] and [SEP]."""

    all_special_ids = (0, 1, 2, 3, 4)
    mask_token_id = 4

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, texts: list[str], **cut: Any) -> dict[str, list[list[int]]]:
        """Token ids of texts."""
        return {"input_ids": [[2, *map(int, text.split()), 3] for text in texts]}


def build(layers: int, width: int) -> MRPLIP:
    """A model between the presets in size; positives by similarity, as in the paper."""
    torch.manual_seed(0)
    return MRPLIP.from_preset(
        "mrplip/mini", tokenizer=Words(), feature_dim=WIDTH, feature_norm="none", d=width,
        text_hidden=width, text_layers=layers, text_ffn=2 * width, fusion_layers=layers,
        fusion_ffn=2 * width, keywords=5, selection="current",
    ).train()  # fmt: skip


def trees(count: int, pairs: int, keywords: int, seed: int = 0) -> TreeBatch:
    """Whole trees with random features, captions and keywords, some of which trees share."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(map(str, rng.integers(5, VOCABULARY, rng.integers(low, high + 1) - 2)))

    pool = list(dict.fromkeys(text(*KEYWORD) for _ in range(POOL)))
    index = np.stack([rng.permutation(len(pool))[:keywords] for _ in range(count)])
    used = sorted(set(index.flatten().tolist()))
    place = {old: new for new, old in enumerate(used)}
    captions = [text(*CAPTION) for _ in range(count * pairs)]
    features = torch.from_numpy(rng.normal(size=(count, 85, WIDTH))).float()
    return TreeBatch(
        trees=list(range(count)),
        features=features,
        node_mask=torch.ones(count, 85, dtype=torch.bool),
        keywords=[pool[i] for i in used],
        keyword_index=torch.tensor([[place[i] for i in own] for own in index.tolist()]),
        own=torch.from_numpy(rng.random((count, 85, keywords)) < 0.1),
        pair_bag=torch.arange(count).repeat_interleave(pairs),
        pair_node=torch.cat([torch.from_numpy(rng.permutation(85)[:pairs]) for _ in range(count)]),
        captions=captions,
        caption_id=torch.arange(len(captions)),
        draw=torch.from_numpy(rng.integers(2**62, size=len(captions))),
        edge_draw=torch.from_numpy(rng.integers(2**62, size=count)),
    )


def perform(side: str, model: MRPLIP, batch: TreeBatch) -> tuple[float, dict[str, float], Any]:
    """One step: CPU seconds, losses and gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)  # of the mismatched pairs
    started = time.process_time()
    if side == "ours":
        out = model(batch)
        loss = out.loss
        found = {name: out.totals[name] / out.counts[name] for name in out.totals}
    else:
        found = mr_plain.losses(model, batch, style=side, **(PADDED if side == "edges" else {}))
        loss = torch.stack(list(found.values())).sum()
    loss.backward()
    taken = time.process_time() - started
    gradients = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
    return taken, {name: value.item() for name, value in found.items()}, torch.cat(gradients)


def compare(model: MRPLIP, batch: TreeBatch, repeats: int, sides: Sequence[str]) -> Report:
    """All sides in turn, so that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, dict[str, float]] = {}
    gradients: dict[str, Any] = {}
    for _ in range(repeats):
        for side in sides:
            taken, losses[side], gradients[side] = perform(side, model, batch)
            times[side].append(taken)
            say(f"{side}: {taken:.2f} CPU-s")
    report: Report = {"cpu_s": {side: min(own) for side, own in times.items()}}
    for side in sides[1:]:
        gap = max(
            abs(value - losses[side][name]) / max(1.0, abs(value))
            for name, value in losses["ours"].items()
        )
        norm = gradients[side].norm()
        report[f"ratio_{side}"] = report["cpu_s"][side] / report["cpu_s"]["ours"]
        report[f"loss_gap_{side}"] = gap
        report[f"gradient_gap_{side}"] = float((gradients["ours"] - gradients[side]).norm() / norm)
    report["losses"] = losses["ours"]
    return report


def measure(*, quick: bool) -> Report:
    """Measure at the documented size, or once at a tiny one."""
    torch.set_num_threads(1)
    sizes = (1, 32, 1, 4, 8) if quick else (2, 128, TREES, PAIRS, KEYWORDS)
    layers, width, count, pairs, keywords = sizes
    model, batch = build(layers, width), trees(count, pairs, keywords)
    report = compare(model, batch, 1 if quick else 3, ("ours", "edges", "bags"))
    report["size"] = {
        "trees": count, "pairs": count * pairs, "keywords": keywords, "width": width,
        "layers": f"{layers}+{layers}", "padded": PADDED, "torch": torch.__version__,
    }  # fmt: skip
    return report
