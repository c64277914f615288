"""Preset official_v1 against a plain reading of the published code, from its own tensors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pathflip.errors import CheckpointError
from pathflip.models.official import load_official_v1
from tests.unit.models.published import E_IN, H, K, M, N, Reference, build
from tests.unit.models.tiny import CAPTIONS, SUBCAPTIONS


def test_losses_and_gradients_are_the_published_codes() -> None:
    model, tensors = build()
    torch.manual_seed(5)
    path, choice = torch.randn(3, N, M, E_IN), torch.randint(K, (3, 3))
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value.clone().requires_grad_()
    slide, region = Reference(tensors, heads=4).losses(path, CAPTIONS[:3], SUBCAPTIONS[:3], choice)
    (slide + region).backward()
    out = model(
        path, torch.ones(3, N, M).bool(), CAPTIONS[:3], SUBCAPTIONS[:3], negative_choice=choice
    )
    out.loss.backward()
    assert float(out.loss_slide.detach()) == pytest.approx(float(slide.detach()), abs=1e-5)
    assert float(out.loss_region.detach()) == pytest.approx(float(region.detach()), abs=1e-5)
    gradients = {f: v.grad for f, v in tensors.items() if v.grad is not None}
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    pairs = {
        "queries": "query_tokens",
        "patch_in.weight": "path_encoder.weight",
        "qformer.words.weight": "Qformer.bert.embeddings.word_embeddings.weight",
        "qformer.layers.2.cross.key.weight": "Qformer.bert.encoder.layer.2.crossattention.self.key"
        ".weight",
        "context.layers.0.linear1.weight": "path_trans.layers.0.linear1.weight",
        "region_attention.query.weight": "fg_head.w_q.weight",
        "region_scale": "logit_scale",
    }
    for mine, theirs in pairs.items():
        wanted = gradients[theirs].view(own[mine].shape)
        assert torch.allclose(own[mine], wanted, rtol=1e-4, atol=1e-5), mine


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("", None),
        ("pathflip_align.", None),
        ("pathflip_align.", "state_dict"),
        ("_forward_module.pathflip_align.", "state_dict"),
        ("module.pathflip_align.", "module"),
        ("module.model.", "model"),
    ],
)
def test_a_checkpoint_of_the_published_trainer_loads(
    before: str, inside: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, tensors = build()
    wanted = model.fingerprint()
    given: dict[str, Any] = {before + name: value for name, value in tensors.items()}
    if inside is not None:
        given = {"epoch": 3, "pytorch-lightning_version": "2.5", inside: given}
    other, _ = build(seed=1)
    assert other.fingerprint() != wanted
    with caplog.at_level(logging.INFO):
        ignored = load_official_v1(other, given)
    assert other.fingerprint() == wanted
    assert before + "Qformer.cls.predictions.transform.dense.weight" in ignored
    assert all(name in caplog.text for name in ignored)
    assert len(ignored) == 2 + 1 + 2  # the head, the places, a key's bias of each second layer


def test_half_precision_weights_load_into_single() -> None:
    model, tensors = build()
    halved = {f"pathflip_align.{name}": value.bfloat16() for name, value in tensors.items()}
    load_official_v1(model, halved)
    assert model.queries.dtype == torch.float32
    assert torch.equal(model.queries, tensors["query_tokens"][0].bfloat16().float())


def test_published_weights_that_do_not_fit_are_refused_by_name() -> None:
    model, tensors = build()
    lacking = {name: value for name, value in tensors.items() if name != "text_proj.bias"}
    with pytest.raises(CheckpointError, match=r"text_out\.bias is missing"):
        load_official_v1(model, lacking)
    with pytest.raises(CheckpointError, match="gate"):
        load_official_v1(model, {**tensors, "fg_head.gate.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"queries is \(4, 24\), not \(3, 24\)"):
        load_official_v1(model, {**tensors, "query_tokens": torch.ones(1, 4, H)})
    with pytest.raises(CheckpointError, match=r"a\.b, fg_head\.gate\.weight, which"):
        load_official_v1(model, {"a.b": torch.ones(1), "fg_head.gate.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="second stage"):
        load_official_v1(model, {f"pathflip_finetune.{name}": v for name, v in tensors.items()})
    with pytest.raises(CheckpointError, match=r"text_proj\.bias twice"):
        load_official_v1(model, tensors | {"pathflip_align.text_proj.bias": torch.ones(16)})
    deeper = "Qformer.bert.encoder.layer.4.attention.self.query.bias"
    with pytest.raises(CheckpointError, match=r"qformer\.layers\.4.*does not have"):
        load_official_v1(model, tensors | {deeper: torch.ones(H)})
