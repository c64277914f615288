"""Where the projector starts: a region reads as the words of the sentence that is true of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pathflip.errors import ConfigError
from pathflip.models.instruct import InstructConfig, PathFLIPInstruct
from pathflip.models.outputs import Sight
from pathflip.models.warm_start import start_projector
from tests.serving import make_base
from tests.unit.models.tiny import CAPTIONS, batch, tiny

SENTENCES = sorted({text.strip() + "." for own in CAPTIONS for text in own.split(".") if text})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llm") / "base", CAPTIONS)


@pytest.mark.parametrize("prefix", ["queries", "mean", "joined"])
def test_a_region_at_a_sentence_s_place_reads_as_its_words(base: Path, prefix: Any) -> None:
    """Planted: region vectors that W_v' takes exactly to where the sentences are."""
    vision = tiny(tr_attention="paper_ln", tr_identity_init=True).eval()
    model = PathFLIPInstruct.from_parts(vision, base, InstructConfig(prefix=prefix))
    before = model.projector.weight.clone()
    made = batch()
    start_projector(model, made["features"], made["patch_mask"], SENTENCES)
    assert not torch.equal(before, model.projector.weight)
    texts = vision.encode_text(SENTENCES, normalize=False)
    words = torch.stack(
        [model.embedding.weight[model.prompter.text_ids(text)].mean(0) for text in SENTENCES]
    ).detach()
    each = vision.config.tokens_per_region
    tokens = texts[None, :, None].expand(1, -1, each, -1)
    there = torch.ones(1, len(SENTENCES), dtype=torch.bool)
    slide = torch.zeros(1, vision.config.d)
    queries = torch.zeros(1, vision.config.num_queries, vision.config.d)
    sight = Sight(slide=slide, tokens=tokens, attention=None, region_mask=there, queries=queries)
    with torch.no_grad():
        (seen,) = model.project(sight)
    own = len(seen) - len(SENTENCES) * (each if prefix == "queries" else 1)
    regions = seen[own:].view(len(SENTENCES), -1, model.width).mean(1)
    apart = torch.nn.functional.normalize
    cosines = apart(regions - regions.mean(0), dim=-1) @ apart(words - words.mean(0), dim=-1).T
    assert cosines.argmax(1).tolist() == list(range(len(SENTENCES)))
    assert cosines.diagonal().min() > 0.9


def test_regions_are_as_large_as_sentences_and_centred_on_them(base: Path) -> None:
    model = PathFLIPInstruct.from_parts(tiny().eval(), base, InstructConfig(prefix="joined"))
    made = batch()
    start_projector(model, made["features"], made["patch_mask"], SENTENCES)
    with torch.no_grad():
        seen = model.see(made["features"], made["patch_mask"])
    words = torch.stack(
        [model.embedding.weight[model.prompter.text_ids(text)].mean(0) for text in SENTENCES]
    ).detach()
    regions = torch.cat([own[1:] for own in seen])  # the first is the slide's
    torch.testing.assert_close(regions.mean(0), words.mean(0), atol=1e-4, rtol=1e-3)
    spread = (regions - regions.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(
        spread, (words - words.mean(0)).square().mean().sqrt(), atol=1e-5, rtol=1e-3
    )


def test_a_slide_model_without_regions_is_refused(base: Path) -> None:
    vision = tiny(region_encoder="none", slide_encoder="qformer").eval()
    model = PathFLIPInstruct.from_parts(vision, base)
    made = batch()
    with pytest.raises(ConfigError, match="no vectors of regions"):
        start_projector(model, made["features"], made["patch_mask"], SENTENCES)
