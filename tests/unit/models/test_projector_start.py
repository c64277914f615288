"""Start of the projector: a region reads as the words of the sentence true of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pathflip.errors import ConfigError
from pathflip.models.data_init import start_projector
from pathflip.models.instruct import InstructConfig, PathFLIPInstruct
from pathflip.models.outputs import VisionOutput
from tests.serving import make_base
from tests.unit.models.tiny import CAPTIONS, batch, tiny

SENTENCES = sorted({text.strip() + "." for own in CAPTIONS for text in own.split(".") if text})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llm") / "base", CAPTIONS)


@pytest.mark.parametrize("prefix", ["queries", "mean", "joined"])
def test_a_planted_rotation_is_found(base: Path, prefix: Any) -> None:
    """Words that are a rotation of the slide model's texts: regions at a text become its words."""
    vision = tiny(tr_attention="paper_ln").eval()
    model = PathFLIPInstruct.from_parts(vision, base, InstructConfig(prefix=prefix))
    letters = list("abcdefghijklmnopqrstuvwxyz")
    texts = vision.encode_text(letters, normalize=False)
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(model.width, vision.config.d, generator=generator)
    rotation = torch.linalg.qr(square).Q.T  # [d, D]
    ids = [model.prompter.text_ids(letter)[0] for letter in letters]
    with torch.no_grad():
        model.embedding.weight[ids] = 0.3 + 2 * (texts @ rotation)
    words = model.embedding.weight[ids].detach()
    made = batch()
    start_projector(model, made["features"], made["patch_mask"], letters)
    # Region vectors that W_v' takes to where the texts are.
    at_texts = torch.linalg.lstsq(vision.region_attention.value.weight.detach(), texts.T).solution.T
    each = vision.config.tokens_per_region
    sight = VisionOutput(
        slide=torch.zeros(1, vision.config.d),
        tokens=at_texts[None, :, None].expand(1, -1, each, -1),
        attention=None,
        region_mask=torch.ones(1, len(letters), dtype=torch.bool),
        queries=torch.zeros(1, vision.config.num_queries, vision.config.d),
    )
    with torch.no_grad():
        (seen,) = model.project(sight)
    own = len(seen) - len(letters) * (each if prefix == "queries" else 1)
    regions = seen[own:].view(len(letters), -1, model.width).mean(1)
    found, wanted = regions - regions.mean(0), words - words.mean(0)
    scale = (found * wanted).sum() / found.square().sum()
    assert scale > 0
    torch.testing.assert_close(scale * found, wanted, atol=2e-3, rtol=1e-3)


def test_numbers_do_not_outvote_words(base: Path) -> None:
    model = PathFLIPInstruct.from_parts(tiny().eval(), base, InstructConfig(prefix="joined"))
    made = batch()
    start_projector(model, made["features"], made["patch_mask"], ["It is 3 cm.", *SENTENCES])
    once = model.projector.weight.clone()
    many = [f"It is {n} cm." for n in (5, 7, 9, 3)]
    start_projector(model, made["features"], made["patch_mask"], [*many, *SENTENCES])
    torch.testing.assert_close(model.projector.weight, once)


def test_regions_are_as_large_as_sentences_and_centred_on_them(base: Path) -> None:
    model = PathFLIPInstruct.from_parts(tiny().eval(), base, InstructConfig(prefix="joined"))
    made = batch()
    start_projector(model, made["features"], made["patch_mask"], SENTENCES)
    with torch.no_grad():
        seen = model.visual_prefix(made["features"], made["patch_mask"])
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
    with pytest.raises(ConfigError, match="no region vectors"):
        start_projector(model, made["features"], made["patch_mask"], SENTENCES)
