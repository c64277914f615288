"""Small models and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathflip.models import PRESETS, PathFLIP
from pathflip.text import train_tokenizer

CAPTIONS = [
    "Sections show breast tissue. Necrosis is present. No mucin is identified.",
    "Sections show lung parenchyma. Keratin pearls are present.",
    "There is desmoplastic fibrosis. Mucin pools are present. Nuclei are enlarged.",
    "Colonic mucosa without tumour.",
]
SUBCAPTIONS = [
    ["Necrosis is present.", "Sections show breast tissue. Necrosis is present."],
    ["Keratin pearls are present.", "Keratin pearls are present."],
    ["Mucin pools are present.", "Nuclei are enlarged. There is desmoplastic fibrosis."],
    ["Colonic mucosa without tumour.", "Colonic mucosa."],
]
TOKENIZER = train_tokenizer(CAPTIONS, vocab_size=160)
FEATURE_DIM, REGIONS, SLOTS = 12, 3, 6

SIZES: dict[str, Any] = {
    "feature_dim": FEATURE_DIM,
    "d": 16,
    "patch_width": 10,
    "num_queries": 3,
    "hidden": 24,
    "layers": 3,
    "heads": 3,
    "ffn": 32,
    "tr_heads": 4,
    "text_model": None,
    "text_hidden": 12,
    "text_layers": 2,
    "text_heads": 2,
    "text_ffn": 16,
    "max_text_tokens": 48,
    "qformer_from_text": False,
}


def tiny(name: str = "pathflip/paper", *, seed: int = 0, **overrides: Any) -> PathFLIP:
    """A preset at a size that costs nothing, in evaluation mode."""
    torch.manual_seed(seed)
    assert name in PRESETS
    model = PathFLIP.from_preset(name, tokenizer=TOKENIZER, **(SIZES | overrides)).eval()
    # Weights as drawn make every text and region nearly the same; make them differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(slides: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``forward``: regions of several sizes, one slide with a region less."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(slides, REGIONS, SLOTS, generator=generator) > 0.25
    mask[:, :, 0] = True
    mask[1, 2] = False
    features: Tensor = torch.randn(slides, REGIONS, SLOTS, FEATURE_DIM, generator=generator)
    choice = torch.randint(2, (slides, slides), generator=generator)
    return {
        "features": features * mask[..., None],
        "patch_mask": mask,
        "captions": CAPTIONS[:slides],
        "subcaptions": SUBCAPTIONS[:slides],
        "negative_choice": choice,
    }
