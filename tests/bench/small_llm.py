"""Benchmark of a step of ``make-llm`` beside transformers' own modules.

Both sides train on the same rows (:mod:`pathflip.models.small_lessons`) of texts of the demo's
cohort: forward, backward, clipping and AdamW, on one thread. The plain side pads all rows of a step
to the longest and takes float32 throughout, as ``Qwen3ForCausalLM`` does. Rows are drawn
beforehand, and the sides take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models import small_llm
from pathflip.models.chat_template import CAPTION_INSTRUCTION, Prompter
from pathflip.models.small_lessons import Lessons
from pathflip.models.small_step import Row, pack, packed_loss, product_dtype
from pathflip.synth import text
from pathflip.synth.scene import sample_scenes
from tests.bench.ingest import say

Report = dict[str, Any]

SLIDES, STEPS, WARM = 960, 16, 4
"""Slides of the cohort, steps, and those before the first that counts."""


def llm(quick: bool) -> Report:
    """CPU time of a step, ours and plain, and by how much their losses differ."""
    torch.set_num_threads(1)
    config = small_llm.SmallLLMConfig()
    scenes = sample_scenes(slides=60 if quick else SLIDES, seed=0, size_um=1024.0)
    texts = [" ".join(said.text for said in text.sentences(scene)) for scene in scenes]
    tokenizer = small_llm.train_bpe([*texts, CAPTION_INSTRUCTION], vocab_size=config.vocab_size)
    torch.manual_seed(0)
    models = [small_llm._build(config, tokenizer).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    lessons = Lessons(
        models[0], Prompter(tokenizer, "qwen3"), texts=texts, asked=[[] for _ in texts],
        vision=None, turns=config.turns, mixed=config.mixed, noise=config.noise,
        longest=config.max_positions,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    steps = WARM + 2 if quick else STEPS
    order = rng.choice(len(texts), (steps, config.batch_size))
    with torch.no_grad():
        drawn = [[row for i in batch for row in lessons.rows(i, rng)] for batch in order.tolist()]
    sides: list[Callable[[Any, Sequence[Row]], Tensor]] = [_ours, _plain]
    optimizers = [small_llm._optimizer(model, config, steps)[0] for model in models]
    taken: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for rows in drawn:
        for side, loss_of in enumerate(sides):
            model = models[side]
            began = time.process_time()
            loss = loss_of(model, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[side].step()
            optimizers[side].zero_grad()
            taken[side].append(time.process_time() - began)
            losses[side].append(loss.item())
    ours, plain = (statistics.median(own[WARM:]) * 1e3 for own in taken)
    say(f"make-llm: {ours:.1f} CPU ms a step, plain {plain:.1f}")
    return {
        "llm_step": plain / ours,
        "llm_step_cpu_ms": {"ours": ours, "plain": plain},
        "llm_step_products": str(product_dtype()),
        "llm_step_rows": statistics.mean(map(len, drawn)),
        "llm_step_loss_gap": abs(losses[0][0] - losses[1][0]),  # later ones train apart
    }


def _ours(model: Any, rows: Sequence[Row]) -> Tensor:
    table = model.get_input_embeddings().weight
    count = sum(len(row.answer) for row in rows)
    return packed_loss(model, pack(table, rows), product_dtype()) / count


def _plain(model: Any, rows: Sequence[Row]) -> Tensor:
    """Loss of padded rows, by the modules as they are."""
    embed = model.get_input_embeddings()
    longest = max(map(len, rows)) + 1
    states, labels, mask = [], [], torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        before, after = (
            embed(torch.tensor(ids)) for ids in (row.before, [*row.after, *row.answer])
        )
        joint = torch.cat([before, row.regions, after])
        states.append(F.pad(joint, (0, 0, 0, longest - len(joint))))
        own = torch.full((longest,), -100)
        own[len(joint) - len(row.answer) : len(joint)] = torch.tensor(row.answer)
        labels.append(own)
        mask[number, : len(joint)] = 1
    out: Tensor = model(
        inputs_embeds=torch.stack(states), attention_mask=mask, labels=torch.stack(labels)
    ).loss
    return out
