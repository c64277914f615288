"""Learning-rate schedule and parameter groups of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pathflip.training.sharding import is_cut


def learning_rate(step: int, *, steps: int, peak: float, floor: float, warmup: float) -> float:
    """Return the learning rate of a step (from 0): linear to the peak, then cosine to the floor.

    Args:
        step: The step.
        steps: All steps.
        peak: Rate at the end of the warm-up.
        floor: Rate of the last step.
        warmup: Share of the steps that warm up.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, steps - 1 - rising)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the parameters that train, in groups: matrices decay, all others do not.

    Not decayed are biases, norms, scales and the bias of the sigmoid loss (vectors and scalars),
    and the query tokens.

    Args:
        model: The model.
        weight_decay: Weight decay of the matrices.
        rates: Learning rates of parts of the model, by their name in it, as a multiple of that of
            the rest; each group has its own as ``rate``.
    """
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tokens = "query_tokens" in name or "queries" in name or "latent" in name
            plain = parameter.ndim < 2 or tokens
            rate = (rates or {}).get(name.partition(".")[0], 1.0)
            cut = is_cut(parameter)  # one step updates tensors of one kind
            group = groups.setdefault(
                (rate, plain, cut),
                {"params": [], "weight_decay": 0.0 if plain else weight_decay, "rate": rate},
            )
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
