"""The patch model against the plain reference, and properties it must have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import MR_PRESETS, MRPLIP, PathFLIP, TreeBatch, mr_preset
from tests.bench import mr_plain
from tests.unit.models.tiny import tiny
from tests.unit.models.tree_samples import KEYWORDS, SIZES, TOKENIZER, patch_model, tree_batch

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mini": {"selection": "own", "cvta_mean": "levels", "feature_norm": "whiten"},
    "random edges, first tokens": {"edges": "random", "text_pooling": "cls", "recompute": False},
    "two levels": {"levels": (0, 1), "edges": "all_ancestors", "selection": "own"},
    "baseline": {"losses": ("itc", "itm", "mlm", "plm")},
    "alignment alone": {"losses": ("itc", "cvta")},
}


def given(name: str) -> TreeBatch:
    batch = tree_batch()
    if name == "two levels":
        batch = replace(batch, pair_node=torch.arange(8) % 5)
    return batch


# -- against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "style"), [("paper", "edges"), *((name, "bags") for name in VARIANTS)]
)
def test_losses_and_gradients_are_those_of_the_plain_reference(name: str, style: str) -> None:
    model, batch = patch_model(**VARIANTS[name]).train(), given(name)
    padding = {"texts": 24, "words": 12} if style == "edges" else {}
    torch.manual_seed(3)
    out = model(batch)
    out.loss.backward()
    ours = {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    plain = mr_plain.losses(model, batch, style=style, **padding)
    sum(plain.values()).backward()
    for loss, value in plain.items():
        mean = getattr(out, f"loss_{loss}")
        assert float(mean.detach()) == pytest.approx(float(value.detach()), abs=2e-6), loss
        assert torch.allclose(out.totals[loss] / out.counts[loss], mean)
    for key, value in model.named_parameters():
        if value.grad is None:
            assert key.startswith("keyword_in")
            assert not value.requires_grad
        else:
            assert torch.allclose(ours[key], value.grad, atol=3e-5), key
    off = set(("itm", "mlm", "plm", "cvta", "mrtva")) - set(plain)
    assert all(getattr(out, f"loss_{loss}") is None for loss in off)


def test_word_losses_are_those_of_transformers() -> None:
    model, batch = patch_model(), tree_batch()
    plan, out, width = model.plan(batch), model(batch), 12
    head = BertOnlyMLMHead(BertConfig(vocab_size=len(TOKENIZER), hidden_size=width))
    mine = model.words_out
    words = model.text_tower.bert.embeddings.word_embeddings.weight
    about = head.predictions
    about.transform.dense.load_state_dict(mine.dense.state_dict())
    about.transform.LayerNorm.load_state_dict(mine.norm.state_dict())
    with torch.no_grad():
        about.decoder.weight.copy_(words)
        about.decoder.bias.copy_(mine.bias)
    v = model.encode_patches(
        batch.features[batch.pair_bag, batch.pair_node], model.levels[batch.pair_node]
    )
    hidden, mask = mr_plain.tower(model, plan.masked, 0)
    logits = head(mr_plain.fuse(model, v, hidden, mask)[:, 1:])
    labels, _ = mr_plain.padded(plan.captions, 0)
    masked = torch.zeros_like(mask)
    for i, places in enumerate(plan.places):
        masked[i, places] = True
    loss = ForMaskedLMLoss(logits, labels.where(masked, -100), len(TOKENIZER))
    assert out.loss_mlm is not None
    assert float(out.loss_mlm.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)

    ids, mask = mr_plain.padded(plan.captions, 0)
    before = [own[:n] for own, n in zip(plan.captions, plan.prefixes, strict=True)]
    prefix, prefix_mask = mr_plain.tower(model, before, ids.shape[1])
    line = prefix.where(prefix_mask[..., None], model.text_tower.bert.embeddings(input_ids=ids))
    sizes = torch.tensor(plan.prefixes)
    logits = head(mr_plain.fuse(model, v, line, mask, prefix=sizes)[:, 1:])
    labels = ids.where(mask & (torch.arange(ids.shape[1]) >= sizes[:, None]), -100)
    loss = ForCausalLMLoss(logits, labels, len(TOKENIZER))  # shifts by itself
    assert out.loss_plm is not None
    assert float(out.loss_plm.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


# -- what must change nothing ---------------------------------------------------------------------


def means(model: MRPLIP, batch: TreeBatch, *, but: tuple[str, ...] = ()) -> dict[str, float]:
    torch.manual_seed(5)
    out = model(batch)
    return {
        name: float(total.detach()) / (out.counts[name] or 1)
        for name, total in out.totals.items()
        if name not in but
    }


def test_a_masked_patch_changes_nothing() -> None:
    model, batch = patch_model(), tree_batch()
    first = means(model, batch)
    wild = torch.where(batch.node_mask[..., None], batch.features, torch.tensor(1e3))
    assert means(model, replace(batch, features=wild)) == first
    assert means(model, replace(batch, own=batch.own | ~batch.node_mask[..., None])) == first
    own = patch_model(selection="own")
    assert means(own, replace(batch, own=batch.own | ~batch.node_mask[..., None])) == means(
        own, batch
    )


@pytest.mark.parametrize("selection", ["own", "current"])
def test_a_masked_keyword_changes_nothing(selection: str) -> None:
    model, batch = patch_model(selection=selection), tree_batch()
    first = means(model, batch)
    index = F.pad(batch.keyword_index, (0, 3), value=-1)
    own = F.pad(batch.own, (0, 3), value=True)
    more = replace(batch, keyword_index=index, own=own, keywords=[*batch.keywords, "unused word"])
    assert means(model, more) == pytest.approx(first, abs=1e-5)


def subtree(node: int) -> list[int]:
    """Nodes below a node of the second level and itself, level by level, row by row."""
    row, column = divmod(node - 1, 2)
    found = [node]
    for level, start in ((2, 5), (3, 21)):
        half = 2 ** (level - 1)
        for r in range(row * half, row * half + half):
            found += [start + r * 2**level + c for c in range(column * half, column * half + half)]
    return found


def test_the_order_of_children_and_of_trees_changes_nothing() -> None:
    model = patch_model(selection="own", cvta_mean="levels")
    batch = tree_batch()
    places = torch.arange(85)
    for old, new in zip(subtree(1), subtree(4), strict=True):
        places[old], places[new] = new, old
    moved = replace(
        batch,
        features=batch.features[:, places],
        node_mask=batch.node_mask[:, places],
        own=batch.own[:, places],
        pair_node=places[batch.pair_node],  # an exchange is its own inverse
    )
    first = means(model, batch)
    assert means(model, moved) == pytest.approx(first, abs=1e-5)
    turned = replace(
        batch,
        features=batch.features.flip(0),
        node_mask=batch.node_mask.flip(0),
        own=batch.own.flip(0),
        keyword_index=batch.keyword_index.flip(0),
        edge_draw=batch.edge_draw.flip(0),
        pair_bag=1 - batch.pair_bag,
    )
    assert means(model, turned) == pytest.approx(first, abs=1e-5)
    # Children of another parent are another tree.
    mixed = torch.arange(85)
    mixed[5], mixed[20] = 20, 5
    other = replace(batch, features=batch.features[:, mixed], node_mask=batch.node_mask[:, mixed])
    assert means(model, other)["mrtva"] != pytest.approx(first["mrtva"], abs=1e-5)


def test_a_pair_of_equal_caption_is_no_negative() -> None:
    model, batch = patch_model(), tree_batch()
    one = replace(batch, captions=[batch.captions[0]] * 8, caption_id=torch.full((8,), 3))
    out = model(one)
    assert float(out.loss_itc.detach()) == 0
    assert out.counts["itm"] == 8, "no mismatched pair can be made"
    found = means(model, batch, but=("itm",))
    distinct = replace(batch, caption_id=torch.arange(8))
    assert means(model, distinct, but=("itm",))["itc"] > found["itc"]


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_that_trains_has_a_gradient(name: str) -> None:
    model = patch_model(**VARIANTS[name]).train()
    model(given(name)).loss.backward()
    for key, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, key


@pytest.mark.parametrize("selection", ["own", "current"])
def test_a_step_without_a_keyword_is_finite_and_uses_every_weight(selection: str) -> None:
    model, batch = patch_model(selection=selection).train(), tree_batch()
    bare = replace(
        batch, keywords=[], keyword_index=torch.zeros(2, 0).long(), own=torch.zeros(2, 85, 0).bool()
    )
    out = model(bare)
    out.loss.backward()
    assert out.counts["cvta"] == 0
    assert float(out.totals["cvta"].detach()) == 0
    assert out.alarms["cvta_floor"].isnan()
    assert out.alarms["cvta_skipped"] == 1
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_positives_are_own_ones_first_and_then_the_most_similar() -> None:
    batch = tree_batch()
    own, current = (patch_model(selection=kind) for kind in ("own", "current"))
    both = patch_model()
    for progress, like in ((0.0, own), (0.09, own), (0.1, current), (1.0, current)):
        now = replace(batch, progress=progress)
        assert means(both, now)["cvta"] == means(like, now)["cvta"]
    assert means(own, batch)["cvta"] != means(current, batch)["cvta"]


@pytest.mark.parametrize("selection", ["own", "current"])
def test_similarities_are_not_rounded_under_autocast(selection: str) -> None:
    """Vectors so much alike that bfloat16 does not tell their cosines apart."""
    model, batch = patch_model(losses=("itc", "cvta"), selection=selection), tree_batch()
    with torch.no_grad():
        model.level.weight.zero_()
    near = F.normalize(torch.ones(16) + 0.05 * torch.randn(85, 16), dim=-1)
    model.visual.register_forward_hook(lambda *_: near.expand(2, 85, 16))
    model.text_out.register_forward_hook(lambda module, given, out: near.flip(0)[: len(out)])
    plain = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(batch)
    for name in ("itc", "cvta"):
        found, expected = (float(out.totals[name].detach()) for out in (cast, plain))
        assert found == pytest.approx(expected, rel=1e-6), name
    assert torch.equal(cast.alarms["keyword_entropy"], plain.alarms["keyword_entropy"])


def test_the_temperature_stays_within_its_bounds_and_comes_back() -> None:
    model, batch = patch_model(losses=("itc",)), tree_batch()
    with torch.no_grad():
        model.temperature.fill_(0.002)
    assert float(model.tau.detach()) == pytest.approx(0.01)
    model(batch).loss.backward()
    assert model.temperature.grad < 0, "pairs of random vectors want it larger"


def test_matching_is_learned_where_it_can_be() -> None:
    torch.manual_seed(0)
    model = patch_model(losses=("itc", "itm"), text_layers=1, fusion_layers=1).train()
    draw = torch.Generator().manual_seed(0)
    classes = torch.eye(8, SIZES["feature_dim"]) * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tree_batch(own=torch.zeros(2, 85, 9).bool())
    accuracy = []
    for step in range(60):
        kinds = torch.randperm(8, generator=draw)
        features = torch.zeros_like(batch.features)
        features[batch.pair_bag, batch.pair_node] = classes[kinds]
        captions = [f"image shows {KEYWORDS[kind]}" for kind in kinds.tolist()]
        out = model(replace(batch, features=features, captions=captions, caption_id=kinds))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step >= 48:
            accuracy.append(float(out.alarms["match_accuracy"]))
    assert sum(accuracy) / len(accuracy) > 0.9


def test_alarms() -> None:
    model, batch = patch_model(), tree_batch()
    found = model(batch).alarms
    assert set(found) == {
        "keyword_entropy", "cvta_floor", "cvta_skipped", "z_std", "match_accuracy",
    }  # fmt: skip
    assert not any(value.requires_grad for value in found.values())
    few = batch.keyword_index.clone()
    few[1, 3:] = -1
    assert found["cvta_skipped"] == 0
    assert model(replace(batch, keyword_index=few)).alarms["cvta_skipped"] == 0.5
    with torch.no_grad():  # every keyword alike: the same ones are chosen everywhere
        model.visual.weight.zero_()
        model.level.weight.zero_()
        model.visual.bias.copy_(torch.ones(16))
    collapsed = model(replace(batch, keyword_index=batch.keyword_index[:1].repeat(2, 1))).alarms
    assert collapsed["keyword_entropy"] < 0.6 < found["keyword_entropy"]
    assert set(patch_model(losses=("itc",))(batch).alarms) == set()


# -- vectors --------------------------------------------------------------------------------------


def test_patches_and_texts_are_encoded_as_in_training() -> None:
    model, batch = patch_model(feature_norm="standardise"), tree_batch()
    model.fit_normalization(batch.features[batch.node_mask])
    out = model(batch)
    image = model.encode_patches(
        batch.features[batch.pair_bag, batch.pair_node], model.levels[batch.pair_node]
    )
    assert torch.allclose(image, out.image, atol=1e-6)
    assert torch.allclose(model.encode_text(batch.captions, batch_size=3), out.text, atol=1e-6)
    assert torch.allclose(image.norm(dim=-1), torch.ones(8))
    coarse = model.encode_patches(batch.features[0], torch.zeros(85).long())
    assert not torch.allclose(coarse, model.encode_patches(batch.features[0], model.levels))
    assert model.encode_text([]).shape == (0, 16)


def guided(model: MRPLIP, v: Tensor, bank: Tensor) -> Tensor:
    near = (v @ bank.T).topk(3, -1).indices
    return mr_plain.guide(model, v, bank[near], torch.ones(near.shape).bool())


def test_text_guided_vectors() -> None:
    model, batch = patch_model(), tree_batch()
    v = model.encode_patches(batch.features[0], model.levels)
    bank = model.encode_text(KEYWORDS)
    z = model.text_guided(v, bank)
    assert torch.allclose(z, guided(model, v, bank), atol=1e-5)
    assert torch.allclose(z, model.text_guided(v, bank.flip(0)), atol=1e-5)
    assert model.text_guided(v, bank[:2]).shape == (85, 12), "a bank of fewer than k_o"
    assert model.text_guided(v[:0], bank).shape == (0, 12)
    assert patch_model(losses=("itc", "plm")).text_guided(v, bank).shape == (85, 12)
    with pytest.raises(ConfigError, match="no fusion encoder"):
        patch_model(losses=("itc", "cvta")).text_guided(v, bank)


# -- making and keeping ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MR_PRESETS)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, batch = patch_model(name, feature_norm="whiten"), tree_batch()
    model.fit_normalization(torch.randn(200, SIZES["feature_dim"]))
    model.save_pretrained(tmp_path / "m")
    again = MRPLIP.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert means(again, batch) == means(model, batch)
    again.save_pretrained(tmp_path / "n")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()
    assert "MRPLIP.from_pretrained" in (tmp_path / "m" / "README.md").read_text()


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    patch_model().save_pretrained(tmp_path / "patches")
    tiny().save_pretrained(tmp_path / "slides")
    for kind, folder, other in ((PathFLIP, "patches", "MRPLIP"), (MRPLIP, "slides", "PathFLIP")):
        with pytest.raises(CheckpointError, match="holds a model of") as error:
            kind.from_pretrained(tmp_path / folder)
        assert error.value.code == "model_type"
        assert other in error.value.hint
    (tmp_path / "slides" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model folder"):
        MRPLIP.from_pretrained(tmp_path / "nothing")


def test_the_fingerprint_sees_weights_and_settings() -> None:
    first = patch_model().fingerprint()
    assert patch_model().fingerprint() == first
    assert patch_model(seed=1).fingerprint() != first
    assert patch_model(keywords=2).fingerprint() != first
    assert patch_model(recompute=False).fingerprint() == first


def test_presets() -> None:
    paper, mini = (mr_preset(f"mrplip/{name}").model for name in ("paper", "mini"))
    assert (paper.keywords, paper.d, paper.fusion_layers, paper.projection) == (8, 256, 6, 2048)
    assert (paper.selection, paper.cvta_mean, paper.feature_norm) == (
        "frozen_then_current", "nodes", "none",
    )  # fmt: skip
    assert (mini.keywords, mini.selection, mini.cvta_mean) == (3, "own", "levels")
    with pytest.raises(ConfigError, match="no preset"):
        mr_preset("mrplip/huge")
    with pytest.raises(ConfigError, match="no model setting 'kewords'"):
        MRPLIP.from_preset("mrplip/mini", texts=KEYWORDS, kewords=2)
    with pytest.raises(ConfigError, match="were given"):
        MRPLIP.from_preset("mrplip/mini")


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"losses": ("itm",)}, "losses"),
        ({"losses": ("itc", "itc")}, "losses"),
        ({"levels": ()}, "levels"),
        ({"levels": (0, 4)}, "levels"),
        ({"levels": (2,)}, "mrtva"),
        ({"tau_init": 0.7}, "tau_init"),
        ({"selection_frozen_share": 1.5}, "selection_frozen_share"),
        ({"keywords": 0}, "keywords"),
        ({"mlm_share": 1.0}, "mlm_share"),
        ({"fusion_heads": 5}, "fusion_heads"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], about: str) -> None:
    with pytest.raises(ConfigError, match=about):
        patch_model(**settings)
