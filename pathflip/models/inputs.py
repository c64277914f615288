"""Fixed normalisation of patch features, the first thing a model does with them.

The statistics are buffers ``feature_mean`` and ``feature_scale`` of the model and saved with it;
``feature_norm`` of its configuration says which kind there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WHITENING_FLOOR = 0.05
"""Added to the variances of whitening: directions that hold less are not blown up."""


def add_statistics(model: Any) -> None:
    """Register the buffers of a model's normalisation, as one that changes nothing."""
    config = model.config
    if config.feature_norm == "none":
        return
    one = torch.ones(config.feature_dim)
    model.register_buffer("feature_mean", torch.zeros_like(one))
    model.register_buffer(
        "feature_scale", torch.diag(one) if config.feature_norm == "whiten" else one
    )


@torch.no_grad()
def fit(model: Any, features: Tensor) -> None:
    """Fit a model's normalisation to patch features; do nothing where the setting is off.

    Args:
        model: A model with the buffers of :func:`add_statistics`.
        features: A sample of the training data's patches [n, d_in].
    """
    kind = model.config.feature_norm
    if kind == "none":
        return
    x = features.to("cpu", torch.float64)
    correction = min(1, len(x) - 1)  # one patch has no spread, rather than one that is no number
    mean, std = x.mean(0), x.std(0, correction=correction) + 1e-4
    scale = 1 / std
    if kind == "whiten":
        spread = torch.cov(((x - mean) * scale).T, correction=correction)
        values, vectors = torch.linalg.eigh(spread)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * largest.sign()  # eigenvectors have no sign of their own
        scale = scale[:, None] * vectors / (values.clamp(min=0) + _WHITENING_FLOOR).sqrt()
    model.feature_mean.copy_(mean)
    model.feature_scale.copy_(scale)


def normalize(model: Any, x: Tensor) -> Tensor:
    """Normalise patch features [..., d_in] in the precision they have."""
    if model.config.feature_norm == "none":
        return x
    with torch.autocast(x.device.type, enabled=False):
        x = x - model.feature_mean
        scale = model.feature_scale
        out: Tensor = x @ scale if scale.ndim == 2 else x * scale
        return out
