"""A patch–text model of known geometry: it sees mean colours, and words name colours.

The encoder gives the mean red, green and blue of a picture; a patch's vector is the unit vector of
how far each is from grey. A text's vector is the unit sum of the axes of the colours it names. So
which class a picture of known colour is given can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip.evaluation.patch_text import PatchReader

GREY = 128.0
AXES = {"red": 0, "green": 1, "blue": 2}


class ColourEncoder:
    name, revision, dim, input_px = "colour", "1", 3, 32
    mpp: float | None = None
    licence = "Apache-2.0"

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        return patches.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)


class ColourModel:
    """The model; ``blind`` names axes that a level cannot see."""

    def __init__(self, *, tau: float = 0.1, blind: Mapping[int, tuple[int, ...]] | None = None):
        self.tau = torch.tensor(tau)
        self.blind = dict(blind or {})
        self.levels: list[int] = []

    def encode_patches(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        self.levels += level.tolist()
        vectors = torch.cat([features - GREY, torch.full((len(features), 1), 1.0)], dim=1)
        for one, axes in self.blind.items():
            for axis in axes:
                vectors[level == one, axis] = 0
        return torch.nn.functional.normalize(vectors, dim=-1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        vectors = torch.zeros(len(texts), 4)
        vectors[:, 3] = 1e-3
        for i, text in enumerate(texts):
            for word, axis in AXES.items():
                vectors[i, axis] += word in text
        return torch.nn.functional.normalize(vectors, dim=-1)


def colour_reader(model: ColourModel | None = None, **changed: object) -> PatchReader:
    fields: dict[str, object] = {
        "name": "planted",
        "model": model or ColourModel(),
        "encoder": ColourEncoder(),
        "level_mpp": (2.0, 1.0, 0.5, 0.25),
        "node_px": 32,
        "levels": (0, 1, 2, 3),
    }
    return PatchReader(**(fields | changed))  # type: ignore[arg-type]
