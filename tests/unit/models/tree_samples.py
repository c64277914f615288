"""Small patch models and batches of trees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pathflip.models import MRPLIP, TreeBatch
from pathflip.text import train_tokenizer

WORDS = ["nested", "solid", "grooved", "stippled", "granular", "stroma", "oedema", "vessel"]
KEYWORDS = [*WORDS, "nested growth", "pale stroma", "grooved nuclei", "solid growth of cells"]
TOKENIZER = train_tokenizer(
    [*KEYWORDS, "the architecture is nested with nuclei . image shows"], vocab_size=200
)
WIDTH = 10

SIZES: dict[str, Any] = {
    "feature_dim": WIDTH, "d": 16, "text_model": None, "text_hidden": 12, "text_layers": 2,
    "text_heads": 2, "text_ffn": 16, "max_text_tokens": 24, "dropout": 0.0, "fusion_layers": 2,
    "fusion_heads": 3, "fusion_ffn": 20, "keywords": 3, "projection": 14, "bottleneck": 5,
}  # fmt: skip


def patch_model(name: str = "mrplip/paper", *, seed: int = 0, **overrides: Any) -> MRPLIP:
    """A preset at a size that costs nothing, in evaluation mode, with weights that tell texts."""
    torch.manual_seed(seed)
    model = MRPLIP.from_preset(name, tokenizer=TOKENIZER, **(SIZES | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tree_batch(trees: int = 2, *, pairs: int = 4, seed: int = 0, **given: Any) -> TreeBatch:
    """Trees with some patches missing, the second without its finest level, and their pairs."""
    rng = np.random.default_rng(seed)
    mask = rng.random((trees, 85)) > 0.1
    mask[:, :5] = True
    mask[1::2, 21:] = False
    sizes = [7 + 2 * (tree % 2) for tree in range(trees)]
    index = np.full((trees, max(sizes)), -1)
    for tree, size in enumerate(sizes):
        index[tree, :size] = rng.permutation(len(KEYWORDS))[:size]
    own = (rng.random((trees, 85, max(sizes))) < 0.25) & (index >= 0)[:, None]
    bag = np.repeat(np.arange(trees), pairs)
    node = np.concatenate([rng.permutation(np.flatnonzero(there))[:pairs] for there in mask])
    captions = [
        "image shows " + " . ".join(rng.choice(KEYWORDS, 1 + i % 3).tolist())
        for i in range(len(bag))
    ]
    captions[-1] = captions[0]  # equal captions are no negatives of each other
    numbers = {text: 1000 + i for i, text in enumerate(captions)}
    features = torch.from_numpy(rng.normal(size=(trees, 85, WIDTH)) * mask[..., None]).float()
    made = TreeBatch(
        trees=list(range(trees)),
        features=features,
        node_mask=torch.from_numpy(mask),
        keywords=list(KEYWORDS),
        keyword_index=torch.from_numpy(index),
        own=torch.from_numpy(own),
        pair_bag=torch.from_numpy(bag),
        pair_node=torch.from_numpy(node),
        captions=captions,
        caption_id=torch.tensor([numbers[text] for text in captions]),
        draw=torch.from_numpy(rng.integers(-(2**62), 2**62, len(bag))),
        edge_draw=torch.from_numpy(rng.integers(2**62, size=trees)),
    )
    return replace(made, **given)
