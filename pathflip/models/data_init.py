"""Data-driven initialisation of models trained from scratch; the small preset needs it to learn.

At random weights 97 % of the energy of a region's vectors is the same for every region: the latent
query passes through, and what it gathered is an average over patches that hardly differs. Texts
differ as little. Cosines of such vectors say nothing, the region loss stays at the entropy of its
labels, and rare findings are never found (figures: docs/notes/mini.md). :func:`warm_start`
removes that, from patches and texts alone, without a label:

* features are whitened (``PathFLIP.fit_normalization``);
* every query and head of the first cross-attention starts at a prototype of the patches, a k-means
  centre, some sharp and some nearly an average, so that what is rare in a region is gathered by
  somebody;
* what is gathered weighs as much as the query itself;
* region vectors and texts are centred by the biases that a model can learn anyway.

:func:`start_projector` does the like for the instruction head: what the slide model has learned of
texts tells which words a region's vectors stand for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.errors import ConfigError
from pathflip.models.outputs import VisionOutput

if TYPE_CHECKING:
    from pathflip.models.chat_template import Prompter
    from pathflip.models.instruct import PathFLIPInstruct
    from pathflip.models.mrplip import MRPLIP
    from pathflip.models.pathflip import PathFLIP

SHARPEST, FLATTEST = 2.0, 0.2
"""Standard deviation over patches of the first scores of a query's heads, first to last query."""
GATHERED = 2.0
"""Standard deviation over patches of what cross-attention adds to a query of unit variance."""
_PATCHES = 100_000
_SLIDES = 16


@torch.no_grad()
def warm_start(
    model: PathFLIP, features: Tensor, mask: Tensor, sentences: Sequence[str], *, seed: int
) -> None:
    """Initialise a model from some slides and sentences of its training data.

    Args:
        model: Untrained model; changed in place.
        features: Patch features of about a hundred slides [B, N, M, d_in].
        mask: bool [B, N, M].
        sentences: Sentences of captions.
        seed: Seed of k-means and of the assignment of prototypes.
    """
    training = model.training
    model.eval()
    patches = features[mask].float()
    patches = patches[:: max(1, len(patches) // _PATCHES)]
    model.fit_normalization(patches)
    if model.config.uses_qformer:
        keys = model.patches(patches)
        _start_queries(model, keys, seed=seed)
    _centre(model, features, mask, sentences)
    model.train(training)


@torch.no_grad()
def warm_start_patches(model: MRPLIP, features: Tensor, keywords: Sequence[str]) -> None:
    """Initialise a patch model from some patches and keywords of its training data.

    Features are whitened and texts centred, as :func:`warm_start` does. The head that scores words
    by their embeddings is scaled against them, so that its first guess stays an even one.

    Args:
        model: Untrained model; changed in place.
        features: Patch features of all levels [n, d_in].
        keywords: Keywords; none where the data has none.
    """
    training = model.training
    model.eval()
    model.fit_normalization(features[:: max(1, len(features) // _PATCHES)].float())
    if keywords:
        before = model.text_tower.words.std()
        _centre_texts(model, keywords)
        if model.config.has("mlm", "plm"):
            model.words_out.norm.weight.mul_(before / model.text_tower.words.std())
    model.train(training)


def _start_queries(model: PathFLIP, keys: Tensor, *, seed: int) -> None:
    """Point every query and head of the first cross-attention at a prototype."""
    from sklearn.cluster import MiniBatchKMeans

    layer = model.qformer.layers[0]
    cross = layer.cross
    if cross is None:
        raise TypeError("the first layer attends to patches")
    heads, width = cross.heads, cross.key.in_features
    queries = len(model.queries)
    size = cross.key.out_features // heads
    state = layer.attention(model.qformer.norm(model.queries)[None])[0]  # [Q, H]
    if queries <= size:  # otherwise a head cannot hold a prototype for each query
        wanted = queries * heads
        # A few patches are fewer prototypes; a handful of queries start alike then.
        count = wanted if len(keys) > wanted else min(wanted, len(torch.unique(keys, dim=0)))
        found = MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=3).fit(
            keys.numpy()
        )
        centres = torch.from_numpy(found.cluster_centers_.astype(np.float32))
        centres = centres[torch.arange(wanted) % count]
        some = keys[::5] if len(keys) > 5 else keys
        spread = (some @ F.normalize(centres, dim=-1).T).std(0, correction=len(some) > 1)
        centres = F.normalize(centres, dim=-1) / spread.clamp(min=1e-6)[:, None]
        order = torch.randperm(len(centres), generator=torch.Generator().manual_seed(seed))
        sharpness = torch.logspace(math.log10(FLATTEST), math.log10(SHARPEST), queries)
        centres = centres[order].view(heads, queries, width) * sharpness[:, None]
        # Scores are (W_q x)·(W_k key)/√size: unit vectors on the side of the queries, one a query.
        pointing = torch.linalg.pinv(state).T * size**0.25  # [Q, H]
        query = torch.zeros(heads, size, pointing.shape[1])
        query[:, :queries] = pointing
        key = cross.key.weight.view(heads, size, width) * 0.05
        key[:, :queries] = centres * size**0.25
        cross.query.weight.copy_(query.flatten(0, 1))
        cross.query.bias.zero_()
        cross.key.weight.copy_(key.flatten(0, 1))
    gathered = cross.out(cross.value(keys)).std(0, correction=len(keys) > 1).mean()
    cross.out.weight.mul_(GATHERED / gathered.clamp(min=1e-6))


def _centre(model: PathFLIP, features: Tensor, mask: Tensor, sentences: Sequence[str]) -> None:
    """Make region vectors, slides and texts average to zero."""
    _centre_texts(model, sentences)
    found = _see(model, features, mask)
    if found.tokens is not None and model.token_bias is not None:
        kept = found.tokens[found.region_mask]
        model.token_bias.sub_(kept.mean(0))
        found = _see(model, features, mask)  # slides may be made of regions
    if model.slide_bias is not None:
        model.slide_bias.sub_(found.slide.mean(0))


def _centre_texts(model: PathFLIP | MRPLIP, texts: Sequence[str]) -> None:
    """Make vectors of texts average to zero."""
    tower = model.text_tower
    if tower is not None and model.config.text_model is None:
        # A word says more than its place, and a mean over words keeps only what is large in them.
        tower.words.mul_(1 / tower.words.std())
    vectors = model.encode_text(list(texts), normalize=False)
    model.text_out.bias.sub_(vectors.mean(0))


def _see(model: PathFLIP, features: Tensor, mask: Tensor) -> VisionOutput:
    parts = [
        model.encode_regions(
            features[start : start + _SLIDES].float(), mask[start : start + _SLIDES], regions=True
        )
        for start in range(0, len(features), _SLIDES)
    ]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return VisionOutput(
        slide=torch.cat([part.slide for part in parts]),
        tokens=torch.cat(tokens) if tokens else None,
        attention=None,
        region_mask=torch.cat([part.region_mask for part in parts]),
    )


@torch.no_grad()
def start_projector(
    model: PathFLIPInstruct, features: Tensor, mask: Tensor, sentences: Sequence[str]
) -> None:
    """Initialise σ so that a region's vectors read as the words of the sentences true of it.

    Region vectors live in the space of texts once W_v' is applied (Eq. 5). The rotation that takes
    the slide model's vectors of sentences nearest to the mean embeddings of their words (orthogonal
    Procrustes, Schönemann 1966) takes regions there as well, centred and as large as sentences are.
    A rotation, because what tells findings apart must stay apart: least squares fits sentences
    better and loses it (docs/notes/instruct.md).

    Args:
        model: Untrained model; its projector is changed in place.
        features: Patch features of a sample of slides [B, N, M, d_in].
        mask: bool [B, N, M].
        sentences: Sentences of captions.

    Raises:
        ConfigError: The slide model has no vectors of regions.
    """
    vision, table = model.vision, model.embedding.weight
    if not vision.config.has_regions:
        raise ConfigError(
            "The projector cannot start from text: the slide model has no region vectors.",
            hint="Set instruct.projector_start=random.",
        )
    sentences = distinct(sentences)
    texts = vision.encode_text(sentences, normalize=False)
    words = words_of(table, model.prompter, sentences)
    to_words, centre = rotation(texts, words)  # [d, D]
    one = torch.eye(vision.config.d, dtype=vision.text_out.weight.dtype)
    values = vision.region_attention.values
    into_text = (values(one) - values(torch.zeros_like(one))).double()  # [d, d]
    found = []
    for start in range(0, len(features), _SLIDES):
        part = slice(start, start + _SLIDES)
        sight = vision.encode_regions(features[part].float(), mask[part], regions=True)
        assert sight.tokens is not None
        found.append(sight.tokens[sight.region_mask])
    tokens = torch.cat(found).double()  # [R, T, d]
    if model.config.prefix == "mean":
        tokens = tokens.mean(1, keepdim=True)
    per_vector = into_text @ to_words
    if model.config.prefix == "joined":
        per_vector = per_vector.repeat(tokens.shape[1], 1)
        tokens = tokens.flatten(1)
    else:
        tokens = tokens.flatten(0, 1)
    mean = tokens.mean(0)
    said = (tokens - mean) @ per_vector
    spread = (words - centre).square().mean().sqrt()
    per_vector *= spread / said.square().mean().sqrt().clamp(min=1e-12)
    model.projector.weight.copy_(per_vector.T)
    model.projector.bias.copy_(centre - mean @ per_vector)


def distinct(sentences: Sequence[str]) -> list[str]:
    """Return one of each group of texts that differ in numbers alone, so that none dominates."""
    return list({re.sub(r"\d+", "0", text): text for text in sentences}.values())


def words_of(table: Tensor, prompter: Prompter, sentences: Sequence[str]) -> Tensor:
    """Return the mean of each sentence's word embeddings [n, D]."""
    return torch.stack([table[prompter.text_ids(text)].mean(0) for text in sentences])


def rotation(texts: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotation that takes sentence vectors nearest to the means of their words.

    Args:
        texts: Sentence vectors of the slide model [n, d].
        words: Mean word embeddings of a language model [n, D].

    Returns:
        The rotation [d, D] between the two, each taken from its centre, and the words' centre [D];
        float64.
    """
    texts, words = texts.double(), words.double()
    centre = words.mean(0)
    left, _, right = torch.linalg.svd(
        (texts - texts.mean(0)).T @ (words - centre), full_matrices=False
    )
    return left @ right, centre
