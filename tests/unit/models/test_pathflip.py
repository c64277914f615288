"""The model as a whole: what must not matter, its switches, texts, grounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.errors import ConfigError
from pathflip.models import PRESETS, PathFLIP, PathFLIPConfig, pathflip, preset
from pathflip.models.packing import pack
from tests.unit.models.tiny import CAPTIONS, SIZES, SLOTS, TOKENIZER, batch, tiny

ABLATIONS: dict[str, dict[str, Any]] = {
    "no_region_qformer": {"region_encoder": "mean"},
    "no_regions": {"region_encoder": "none"},
    "no_slide_qformer": {"slide_encoder": "region_mean"},
    "no_qformer": {"region_encoder": "mean", "slide_encoder": "region_mean"},
    "no_tr_attention": {"tr_attention": "none"},
    "global_only": {"global_only": True},
    "global_only_means": {"global_only": True, "region_encoder": "mean"},
    "global_of_regions": {"global_only": True, "slide_encoder": "region_mean"},
    "mean_tokens": {"region_tokens": "mean"},
    "context": {"slide_context_layers": 2},
    "context_of_means": {"slide_context_layers": 1, "region_encoder": "mean"},
    "paper_ln": {"tr_attention": "paper_ln", "tr_identity_init": True},
    "mha_proj": {"tr_attention": "mha_proj"},
    "mha_ln": {"tr_attention": "mha_ln"},
    "shared": {"text_encoder": "shared_qformer"},
    "shared_mean": {"text_encoder": "shared_qformer", "text_pooling": "mean"},
    "mean_pooling": {"text_pooling": "mean"},
    "exp_bias": {"region_scale": "exp", "region_bias_init": -10.0, "region_scale_init": 1.0},
    "sum_smooth": {"region_reduction": "sum", "label_smoothing": 0.1},
    "biases": {"vector_biases": True},
    "biases_global": {"vector_biases": True, "global_only": True},
    "every_layer_crosses": {"cross_attention_freq": 1, "patch_dropout": 0.4},
    "local": {"negatives": "local"},
    "standardise": {"feature_norm": "standardise"},
    "raw_patches": {"patch_width": 0, "feature_norm": "whiten"},
}


@pytest.mark.parametrize("overrides", ABLATIONS.values(), ids=ABLATIONS)
def test_every_switch_trains_all_its_parameters(overrides: dict[str, Any]) -> None:
    model = tiny(**overrides).train()
    out = model(**batch())
    assert torch.isfinite(out.loss)
    assert out.loss.item() == pytest.approx((out.loss_slide + out.loss_region).item())
    out.loss.backward()
    # DDP without find_unused_parameters waits for the gradient of each.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    before = out.loss.item()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert model(**batch()).loss.item() < before
    if model.config.has_regions:
        grounded = model.ground(batch()["features"], batch()["patch_mask"], ["necrosis"])
        assert torch.allclose(grounded.heat.sum((2, 3)), torch.ones(4, 1), atol=1e-5)
    else:
        with pytest.raises(ConfigError, match="no region vectors"):
            model.ground(batch()["features"], batch()["patch_mask"], ["necrosis"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_constructs_and_trains(name: str) -> None:
    model = tiny(name).train()
    model(**batch()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_presets_are_those_of_the_method() -> None:
    paper, official = preset("pathflip/paper").model, preset("pathflip/official_v1").model
    for config in (paper, official):
        assert (config.hidden, config.layers, config.heads, config.ffn) == (768, 12, 12, 3072)
        assert (config.feature_dim, config.d, config.num_queries) == (512, 256, 8)
        assert config.cross_attention_freq == 2
        assert config.temperature == 0.1
        assert config.region_scale_init == pytest.approx(2.6593, abs=1e-4)
        assert config.region_bias_init is None
    assert paper == PathFLIPConfig()
    assert (official.region_reduction, official.label_smoothing) == ("sum", 0.1)


def test_nothing_masked_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny("pathflip/official_v1", dropout=0.0), batch()
    first = model(**given)
    noisy = torch.where(given["patch_mask"][..., None], given["features"], torch.full((), 100.0))
    more = F.pad(noisy, (0, 0, 0, 2, 0, 1), value=7.0)
    wider = F.pad(given["patch_mask"], (0, 2, 0, 1))
    order = torch.randperm(SLOTS)
    for features, mask in (
        (noisy, given["patch_mask"]),
        (more, wider),
        (noisy[:, :, order], given["patch_mask"][:, :, order]),
    ):
        other = model(**{**given, "features": features, "patch_mask": mask})
        for a, b in ((first.loss, other.loss), (first.slide, other.slide)):
            assert torch.allclose(a, b, atol=1e-5)
    # The same through evaluation, in parts.
    seen = model.encode_slide(given["features"], given["patch_mask"])
    monkeypatch.setattr(pathflip, "SEQUENCES_AT_ONCE", 5)
    parts = model.encode_slide(more, wider)
    assert torch.allclose(seen.slide, parts.slide, atol=1e-5)
    assert torch.allclose(seen.regions, parts.regions[:, :-1], atol=1e-5)
    assert not parts.regions[:, -1].any()
    assert not parts.region_mask[:, -1].any()
    heat = model.ground(given["features"], given["patch_mask"], ["necrosis"]).heat
    padded = model.ground(more, wider, ["necrosis"]).heat
    assert torch.allclose(heat, padded[:, :, :-1, :SLOTS], atol=1e-6)
    assert not padded[~wider[:, None]].any()


@pytest.mark.parametrize("shared", [False, True])
def test_company_does_not_change_a_text(shared: bool) -> None:
    model = tiny(text_encoder="shared_qformer" if shared else "separate")
    alone = torch.cat([model.encode_text([text]) for text in CAPTIONS])
    together = model.encode_text([CAPTIONS[1], *CAPTIONS], batch_size=3)
    assert torch.allclose(together, torch.cat([alone[1:2], alone]), atol=1e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(5))
    raw = model.encode_text(CAPTIONS, normalize=False)
    assert torch.allclose(F.normalize(raw, dim=-1), alone, atol=1e-6)
    ids = [TOKENIZER(text)["input_ids"] for text in CAPTIONS]
    assert torch.allclose(model.embed(ids), raw, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_text_tower_is_transformers_bert(pooling: str) -> None:
    model = tiny(text_pooling=pooling)
    bert = model.text_tower.bert
    given = TOKENIZER(CAPTIONS, padding=True, return_tensors="pt")
    states = bert(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"]
    ).last_hidden_state
    real = given["attention_mask"][..., None]
    pooled = states[:, 0] if pooling == "cls" else (states * real).sum(1) / real.sum(1)
    wanted = model.text_out(pooled)
    assert torch.allclose(model.embed(CAPTIONS), wanted, atol=1e-6)
    for packs in (True, False):  # False: the way of other families
        model.text_tower._packs = packs
        packed = pack([TOKENIZER(text)["input_ids"] for text in CAPTIONS], slack=1.5)
        assert packed.pad_index is not None
        vectors = model.text_out(model.text_tower(packed, pooling=pooling))[packed.inverse]
        assert torch.allclose(vectors, wanted, atol=1e-6)


def test_sub_captions_are_cut_at_half_the_length() -> None:
    model = tiny(max_text_tokens=8)
    ids = TOKENIZER(CAPTIONS[0], truncation=True, max_length=4)["input_ids"]
    both = model.embed([CAPTIONS[0]], [CAPTIONS[0]])
    assert torch.allclose(both[1], model.embed([ids])[0], atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@torch.no_grad()
def test_eq_5_is_its_equation() -> None:
    model, given = tiny(), batch(2)
    slides = model.encode_slide(given["features"], given["patch_mask"])
    texts = model.encode_text(CAPTIONS, normalize=False)
    scores = model.local_scores(slides, texts)
    attend = model.region_attention
    w_q, w_k, w_v = (part.weight for part in (attend.query, attend.key, attend.value))
    for b in range(2):
        tokens = slides.tokens[b][slides.token_mask[b]]
        for i, text in enumerate(texts):
            weights = torch.softmax(tokens @ w_k.T @ (w_q @ text) / math.sqrt(len(text)), 0)
            seen = w_v @ (weights[:, None] * tokens).sum(0)
            cosine = F.cosine_similarity(seen, text, dim=0)
            assert float(scores[b, i]) == pytest.approx(float(cosine), abs=1e-5)


def plain_heads(block: Any, texts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The published attention block, with PyTorch's own multi-head attention."""
    parts = (block.query(texts), block.key(tokens), block.value(tokens))
    return block.attention(*(part[None] for part in parts), need_weights=True)


@pytest.mark.parametrize("kind", ["mha_proj", "mha_ln"])
def test_several_heads_are_pytorchs(kind: str) -> None:
    block = tiny(tr_attention=kind).region_attention
    texts, tokens = torch.randn(1, 3, 16), torch.randn(1, 7, 16)
    mask = torch.tensor([[True] * 5 + [False] * 2])
    seen, weights = block(texts, tokens, mask)
    wanted = plain_heads(block, texts[0], tokens[0, :5])
    assert torch.allclose(seen, wanted[0], atol=1e-6)
    assert torch.allclose(weights[..., :5], wanted[1], atol=1e-6)
    alone, _ = block(texts[:, :1], tokens[:, :1], mask[:, :1])
    assert torch.allclose(block.values(tokens)[:, :1], alone, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["per_query", "mean"])
def test_heat_is_attention_times_attention(tokens: str) -> None:
    model, given = tiny(region_tokens=tokens), batch(2)
    features, mask = given["features"], given["patch_mask"]
    found = model.ground(features, mask, ["necrosis", "mucin"])
    raw = model.encode_text(["necrosis", "mucin"], normalize=False)
    sight = model.encode_regions(features, mask, regions=True, attention=True)
    flat, flat_mask = sight.flat()
    _, alpha = model.region_attention(raw[None].expand(2, -1, -1), flat, flat_mask)
    each = model.config.tokens_per_region
    for b in range(2):
        for i in range(2):
            for n in range(3):
                own = alpha[b, i, n * each : (n + 1) * each]
                assert float(found.region[b, i, n]) == pytest.approx(float(own.sum()), abs=1e-6)
                heat = sum(float(own[q]) * sight.attention[b, n, q] for q in range(each))
                assert torch.allclose(found.heat[b, i, n], heat, atol=1e-6)
    slides = model.encode_slide(features, mask)
    assert torch.allclose(found.score, model.local_scores(slides, raw), atol=1e-6)

    even = model.ground(features, mask, ["necrosis"], variant="region_only")
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    assert torch.allclose(even.heat, (even.region[..., None] / counts[:, None]) * mask[:, None])
    cosine = model.ground(features, mask, ["necrosis"], variant="cosine").heat
    assert float(cosine.abs().max()) <= 1 + 1e-6
    product = model.ground(features, mask, ["necrosis"], variant="product").heat
    assert torch.allclose(product, found.heat[:, :1] * cosine.clamp(min=0), atol=1e-6)
    contrast = model.ground(features, mask, ["necrosis"], contrast="mucin")
    assert torch.allclose(contrast.heat, found.heat[:, :1] - found.heat[:, 1:], atol=1e-6)
    assert contrast.score.shape == (2, 1)
    with pytest.raises(ConfigError, match="variant"):
        model.ground(features, mask, ["necrosis"], variant="best")  # type: ignore[arg-type]


def test_regions_for_search_live_where_texts_do() -> None:
    model, given = tiny(), batch(2)
    found = model.encode_slide(given["features"], given["patch_mask"])
    tokens = found.tokens.view(2, 3, 3, 16) @ model.region_attention.value.weight.T
    wanted = F.normalize(tokens.mean(2), dim=-1) * given["patch_mask"].any(-1)[..., None]
    assert torch.allclose(found.regions, wanted, atol=1e-6)
    assert torch.equal(found.region_mask, given["patch_mask"].any(-1))
    assert torch.allclose(found.slide.norm(dim=-1), torch.ones(2))


def test_evaluation_leaves_the_mode_and_draws_nothing() -> None:
    model, given = tiny().train(), batch(2)
    first = model.encode_slide(given["features"], given["patch_mask"])
    again = model.encode_slide(given["features"], given["patch_mask"])
    assert torch.equal(first.slide, again.slide)
    assert model.training
    assert not torch.equal(model(**given).slide, model(**given).slide)  # dropout, in training


def test_whitening_whitens_and_is_kept() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(4000, 12) @ torch.randn(12, 12) * 3 + 5
    model = tiny(patch_width=0, feature_norm="whiten")
    model.fit_normalization(mixed)
    seen = model.patches(mixed)
    assert torch.allclose(seen.mean(0), torch.zeros(12), atol=1e-3)
    covariance = torch.cov(seen.T)
    # Directions with little variance are left smaller than one by the floor.
    assert torch.allclose(covariance, torch.diag(covariance.diag()), atol=1e-3)
    assert float(covariance.diag().max()) < 1.0001
    assert float(covariance.diag().median()) > 0.5
    plain = tiny(patch_width=0, feature_norm="standardise")
    plain.fit_normalization(mixed)
    assert torch.allclose(plain.patches(mixed).std(0), torch.ones(12), atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_made_again_is_what_was_kept(dropout: float) -> None:
    found = []
    for again in (False, True):
        model = tiny("pathflip/official_v1", recompute=again, dropout=dropout).train()
        torch.manual_seed(3)  # the same dropout, also when cross-attention is made again
        with torch.autocast("cpu", torch.bfloat16, enabled=dropout == 0.0):
            model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max()) + 1e-6
        assert torch.allclose(gradient, found[1][name], atol=(1e-5 if dropout else 2e-2) * scale), (
            name
        )


def test_hidden_patches_never_empty_a_region() -> None:
    torch.manual_seed(0)
    mask = torch.rand(50, 4, 3) > 0.3
    hidden = pathflip._hide_patches(mask, 0.9)
    assert torch.equal(hidden.any(-1), mask.any(-1))
    assert not (hidden & ~mask).any()
    assert hidden.sum() < mask.sum()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden": 25}, "hidden 25"),
        ({"slide_encoder": "region_mean", "region_encoder": "none"}, "region_mean"),
        (
            {
                "text_encoder": "shared_qformer",
                "region_encoder": "mean",
                "slide_encoder": "region_mean",
            },
            "shared_qformer",
        ),
        ({"dropout": 1.0}, "dropout"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_queries": 0}, "num_queries"),
        ({"colour": 3}, "colour"),
    ],
)
def test_what_cannot_be_is_said(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PathFLIP.from_preset("pathflip/paper", tokenizer=TOKENIZER, **(SIZES | overrides))


def test_captions_are_needed_where_a_tokenizer_is_trained() -> None:
    with pytest.raises(ConfigError, match="captions"):
        PathFLIP.from_preset("pathflip/mini")
    with pytest.raises(ConfigError, match="no preset"):
        PathFLIP.from_preset("pathflip/maxi")
