"""Properties of a start from data: centred vectors, queries on prototypes, no randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pathflip.models import PathFLIP
from pathflip.models.data_init import warm_start, warm_start_patches
from tests.unit.models.tree_samples import KEYWORDS, WIDTH, patch_model, tree_batch

SENTENCES = ["Necrosis is present.", "Mucin pools are seen.", "Sections show colonic mucosa."]
TISSUES = 6


def cohort(*, slides: int = 12, regions: int = 4, patches: int = 16, dim: int = 10) -> Any:
    """Patches of a few tissues, told apart by the first features: slides, mask, tissue of each."""
    draw = torch.Generator().manual_seed(0)
    tissue = torch.randint(TISSUES, (slides, regions, patches), generator=draw)
    features = torch.randn(slides, regions, patches, dim, generator=draw)
    features[..., :TISSUES] += 8 * torch.nn.functional.one_hot(tissue, TISSUES)
    mask = torch.rand(slides, regions, patches, generator=draw) < 0.9
    return (features * mask[..., None]).half(), mask, tissue


def build(**settings: Any) -> PathFLIP:
    torch.manual_seed(0)
    return PathFLIP.from_preset(
        "pathflip/mini", feature_dim=10, texts=SENTENCES, **({"num_queries": 4} | settings)
    )


def test_vectors_of_regions_slides_and_sentences_average_to_zero() -> None:
    features, mask, _ = cohort()
    model = build()
    before = model.encode_slide(features.float(), mask).tokens
    assert before.mean(0).mean(0).norm() > 0.1 * before.norm(dim=-1).mean()
    warm_start(model, features, mask, SENTENCES, seed=0)
    seen = model.encode_regions(features.float(), mask, regions=True)
    assert seen.tokens is not None
    torch.testing.assert_close(seen.tokens.mean((0, 1)), torch.zeros(4, 128), atol=2e-5, rtol=0)
    torch.testing.assert_close(seen.slide.mean(0), torch.zeros(128), atol=2e-5, rtol=0)
    texts = model.encode_text(SENTENCES, normalize=False)
    torch.testing.assert_close(texts.mean(0), torch.zeros(128), atol=2e-5, rtol=0)


def test_a_sharp_query_attends_to_one_tissue() -> None:
    features, mask, tissue = cohort()
    model = build(num_queries=8, heads=1)
    warm_start(model, features, mask, SENTENCES, seed=0)
    model.eval()
    seen = model.encode_regions(features.float(), mask, regions=True, attention=True)
    assert seen.attention is not None
    spread = []
    for query in (0, 7):  # the flattest and the sharpest
        share = torch.zeros(TISSUES)
        share.index_add_(0, tissue[mask], seen.attention.detach()[:, :, query][mask])
        spread.append(float((share / share.sum()).max()))
    assert spread[1] > 0.6 > 1.5 * spread[0]


def test_the_same_seed_gives_the_same_model() -> None:
    features, mask, _ = cohort()
    prints = []
    for seed in (0, 0, 1):
        model = build()
        warm_start(model, features, mask, SENTENCES, seed=seed)
        prints.append(model.fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"region_encoder": "mean"},
        {"slide_encoder": "region_mean"},
        {"tr_attention": "none"},
        {"global_only": True},
        {"region_encoder": "none"},
        {"region_tokens": "mean"},
        {"num_queries": 40},  # more than a head is wide: prototypes do not fit
    ],
)
def test_every_ablation_starts_and_trains(settings: dict[str, Any]) -> None:
    features, mask, _ = cohort(slides=4)
    model = build(**settings)
    warm_start(model, features, mask, SENTENCES, seed=0)
    model.train()
    texts = [SENTENCES[i % 3] for i in range(4)]
    loss = model(features.float(), mask, texts, [[text, text] for text in texts]).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_what_masked_slots_hold_does_not_matter() -> None:
    features, mask, _ = cohort()
    prints = []
    for junk in (0.0, 7.0):
        model = build()
        filled = torch.where(mask[..., None], features, torch.tensor(junk).half())
        warm_start(model, filled, mask, SENTENCES, seed=0)
        prints.append(model.fingerprint())
    assert prints[0] == prints[1]


def test_a_patch_model_starts_centred_and_says_words_no_surer_than_before() -> None:
    model, batch = patch_model("mrplip/mini"), tree_batch()
    before = model.words_out(torch.eye(12), model.text_tower.words)
    patches = torch.randn(400, WIDTH) @ torch.randn(WIDTH, WIDTH) + 3
    warm_start_patches(model, patches, KEYWORDS)
    white = (patches - model.feature_mean) @ model.feature_scale
    assert torch.allclose(white.mean(0), torch.zeros(WIDTH), atol=1e-2)
    covariance = torch.cov(white.T)
    assert torch.allclose(covariance, torch.diag(covariance.diag()), atol=1e-4)
    assert float(model.text_tower.words.detach().std()) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(model.words_out(torch.eye(12), model.text_tower.words), before, atol=1e-4)
    vectors = model.encode_text(KEYWORDS, normalize=False)
    assert vectors.mean(0).norm() < 1e-4 * vectors.norm(dim=-1).mean()
    assert model(batch).loss.isfinite()


@pytest.mark.parametrize("patches", [1, 3, 7, 63, 64])
def test_few_patches_are_enough_for_a_start(patches: int) -> None:
    """Fewer patches than queries times heads, down to one, and all of them the same."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(1, 1, 64, 10, generator=draw)
    mask = (torch.arange(64) < patches)[None, None]
    for values in (features, torch.ones_like(features)):
        model = build()
        assert len(model.queries) * model.config.heads >= 8
        warm_start(model, values, mask, SENTENCES, seed=0)
        assert all(bool(one.isfinite().all()) for one in model.state_dict().values())
        assert bool(model.encode_slide(values, mask).slide.isfinite().all())
