"""The Q-Former against transformers' of BLIP-2, under equal weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from pathflip.models import qformer as module
from pathflip.models.packing import pack
from pathflip.models.qformer import QFormer

H, LAYERS, HEADS, FFN, E, Q, VOCAB = 24, 5, 3, 40, 10, 4, 50
TOLERANCE = 1e-5


def names(theirs: str) -> str | None:
    """Their parameter's name under ours; None for the bias of a cross-attention key."""
    if re.search(r"crossattention\.attention\.key\.bias", theirs):
        return None
    name = theirs.replace("encoder.layer.", "layers.").replace("layernorm.", "norm.")
    for old, new in (
        ("crossattention.attention.", "cross."), ("crossattention.output.dense", "cross.out"),
        ("crossattention.output.LayerNorm", "cross.norm"),
        ("attention.attention.", "attention."), ("attention.output.dense", "attention.out"),
        ("attention.output.LayerNorm", "attention.norm"),
        ("intermediate_query.dense", "ffn_query.up"), ("output_query.dense", "ffn_query.down"),
        ("output_query.LayerNorm", "ffn_query.norm"), ("intermediate.dense", "ffn_text.up"),
        ("output.dense", "ffn_text.down"), ("output.LayerNorm", "ffn_text.norm"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "again"])
def pair(request: pytest.FixtureRequest) -> tuple[QFormer, Blip2QFormerModel, Blip2TextEmbeddings]:
    """Ours and theirs with the same weights, all of them random."""
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        vocab_size=VOCAB, hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN, encoder_hidden_size=E, cross_attention_frequency=2,
        use_qformer_text_input=True, max_position_embeddings=32, layer_norm_eps=1e-12,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    theirs, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config)
    for parameter in [*theirs.parameters(), *embeddings.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    ours = QFormer(
        hidden=H, layers=LAYERS, heads=HEADS, ffn=FFN, patch_width=E, cross_every=2, dropout=0.1,
        vocab_size=VOCAB, max_positions=32, recompute=request.param,
    ).eval()  # fmt: skip
    weights = {names(name): value for name, value in theirs.state_dict().items()}
    weights.pop(None)
    weights["words.weight"] = embeddings.word_embeddings.weight
    weights["positions.weight"] = embeddings.position_embeddings.weight
    ours.load_state_dict({name: value for name, value in weights.items() if name is not None})
    return ours, theirs, embeddings


@pytest.fixture
def patches() -> tuple[Tensor, Tensor, Tensor]:
    """Queries [Q, H], patches [2, 3, 7, E], mask: some masked, one region without any."""
    torch.manual_seed(1)
    mask = torch.rand(2, 3, 7) > 0.3
    mask[1, 2] = False
    return torch.randn(Q, H), torch.randn(2, 3, 7, E), mask


def theirs_of(model: Blip2QFormerModel, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return model(
        query_embeds=queries[None].expand(len(keys), -1, -1),
        encoder_hidden_states=keys,
        encoder_attention_mask=mask.long(),
    ).last_hidden_state


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_regions_and_slides_are_what_blip2_makes_of_them_forward_and_backward(pair, patches):
    ours, theirs, _ = pair
    queries, keys, mask = patches
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        if model is ours:
            seen = ours(q, k, mask)
            regions, slide = seen.regions, seen.slide
        else:
            regions = torch.stack(
                [
                    torch.stack([theirs_of(theirs, q, k[b : b + 1, n], mask[b : b + 1, n])[0]
                                 if mask[b, n].any() else torch.zeros(Q, H) for n in range(3)])
                    for b in range(2)
                ]
            )  # fmt: skip
            slide = theirs_of(theirs, q, k.flatten(1, 2), mask.flatten(1))
        real = mask.any(-1)[..., None, None]
        loss = (regions * real).sin().sum() + (slide.cos() * slide).sum()
        loss.backward()
        parameters = {
            name if model is ours else names(name): parameter.grad
            for name, parameter in model.named_parameters()
        }
        results.append((regions * real, slide, q.grad, k.grad, parameters))
    mine, other = results
    for a, b in zip(mine[:4], other[:4], strict=True):
        assert close(a, b)
    largest = max(float(g.abs().max()) for g in mine[4].values() if g is not None)
    compared = 0
    for name, gradient in mine[4].items():
        if gradient is not None:
            assert torch.allclose(gradient, other[4][name], rtol=TOLERANCE, atol=1e-6 * largest)
            compared += 1
    assert compared >= 10 * LAYERS


@pytest.mark.parametrize("slack", [1.0, 1.5, 9.0])
def test_text_is_what_blip2_makes_of_it_forward_and_backward(pair, slack):
    ours, theirs, embeddings = pair
    texts = [[2, 7, 9, 11, 3], [2, 30, 3], [2, 4, 8, 3], [2, 30, 3], [2, *range(20, 40), 3]]
    for pooling in ("cls", "mean"):
        packed = pack(texts, slack=slack)
        ours.zero_grad(), theirs.zero_grad(), embeddings.zero_grad()
        mine = ours.text(packed, pooling=pooling)[packed.inverse]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        mask = (torch.arange(longest)[None] < torch.tensor([[len(t)] for t in texts])).long()
        states = theirs(
            query_embeds=embeddings(ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        real = mask[..., None]
        other = states[:, 0] if pooling == "cls" else (states * real).sum(1) / real.sum(1)
        assert close(mine, other)
        weights = torch.linspace(-1, 1, mine.numel()).view(mine.shape)
        (mine * weights).sum().backward()
        (other * weights).sum().backward()
        gradients = {names(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        gradients["positions.weight"] = embeddings.position_embeddings.weight.grad
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, parameter in ours.named_parameters():
            if parameter.grad is not None and name in gradients:
                wanted = gradients[name]
                assert torch.allclose(parameter.grad, wanted, rtol=1e-5, atol=1e-6 * largest), name
        used = embeddings.word_embeddings.weight.grad[1:]  # theirs drops padding's
        assert torch.allclose(ours.words.weight.grad[1:], used, rtol=1e-5, atol=1e-6 * largest)


def test_attention_of_the_last_cross_layer_is_theirs_averaged_over_heads(pair, patches):
    ours, theirs, _ = pair
    queries, keys, mask = patches
    seen = ours(queries, keys, mask, attention=True)
    out = theirs(
        query_embeds=queries[None],
        encoder_hidden_states=keys[0, 1][None],
        encoder_attention_mask=mask[0, 1][None].long(),
        output_attentions=True,
    )
    last = [weights for weights in out.cross_attentions if weights is not None][-1]
    assert close(seen.attention[0, 1], last[0].mean(0))
    assert torch.allclose(seen.attention.sum(-1), mask.any(-1)[..., None].float())
    assert not seen.attention[~mask[:, :, None].expand_as(seen.attention)].any()


def test_what_is_masked_changes_nothing_and_order_neither(pair, patches):
    ours, _, _ = pair
    queries, keys, mask = patches
    first = ours(queries, keys, mask)
    noisy = torch.where(mask[..., None], keys, torch.full_like(keys, 1e3))
    order = torch.randperm(7)
    for other in (ours(queries, noisy, mask), ours(queries, keys[:, :, order], mask[:, :, order])):
        real = mask.any(-1)
        assert close(first.regions[real], other.regions[real])
        assert close(first.slide, other.slide)
    turned = ours(queries, keys.flip(1), mask.flip(1))
    assert close(first.regions[0], turned.regions[0].flip(0))
    assert close(first.slide, turned.slide)


def test_a_large_slide_is_attended_to_in_parts(pair, patches, monkeypatch):
    ours, _, _ = pair
    queries, keys, mask = patches
    with torch.no_grad():
        whole = ours(queries, keys, mask).slide
        for size in (1, 4, 5):
            monkeypatch.setattr(module, "KEYS_AT_ONCE", size)
            assert close(ours(queries, keys, mask).slide, whole)


@torch.no_grad()
def test_dropout_keeps_the_mean_of_what_is_gathered():
    torch.manual_seed(0)
    cross = module.CrossAttention(H, heads=HEADS, patch_width=E, dropout=0.4, eps=1e-12)
    torch.nn.init.normal_(cross.value.bias)
    cross.norm, cross.dropout = torch.nn.Identity(), torch.nn.Identity()
    keys, x = torch.randn(1, 1, 30, E), torch.randn(1, Q, H)
    reader = module._Reader(keys, torch.ones(1, 1, 30).bool(), regions=True, slide=False)
    exact = cross.eval()(x, reader)
    drawn = torch.stack([cross.train()(x, reader) for _ in range(3000)])
    assert torch.allclose(drawn.mean(0), exact, atol=5 * float(drawn.std(0).max()) / 3000**0.5)


def test_packing_puts_each_distinct_text_once():
    packed = pack([[5, 6, 7], [8], [5, 6, 7], [9, 9]])
    assert packed.ids.tolist() == [8, 9, 9, 5, 6, 7]
    assert packed.positions.tolist() == [0, 0, 1, 0, 1, 2]
    assert packed.first.tolist() == [0, 1, 3]
    assert packed.inverse.tolist() == [2, 0, 2, 1]
    assert [(group.texts, group.longest) for group in packed.groups] == [(1, 1), (1, 2), (1, 3)]
    assert packed.pad_index is None
    loose = pack([[5, 6, 7], [8], [5, 6, 7], [9, 9]], slack=2.0)
    assert [(group.texts, group.longest) for group in loose.groups] == [(2, 2), (1, 3)]
    assert [block.tolist() for block in loose.padded(loose.ids)] == [[[8, 0], [9, 9]], [[5, 6, 7]]]
    assert packed.mean(torch.arange(6.0)[:, None])[:, 0].tolist() == [0.0, 1.5, 4.0]
