from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pathflip.encoders import EncoderInfo, neural, zoo
from pathflip.errors import EncoderError

WIDTH, HEADS, HIDDEN = 32, 2, 88  # 88: two thirds of 4 * 32, rounded up to eights


def hibou_state(depth):
    """Tensors named as in the published files of Hibou, which its own code saved."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.register_tokens": (1, 4, WIDTH),
        "embeddings.position_embeddings": (1, 257, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    linear = {
        "attention.attention.query": (WIDTH, WIDTH),
        "attention.attention.key": (WIDTH, WIDTH),
        "attention.attention.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "mlp.weights_in": (2 * HIDDEN, WIDTH),
        "mlp.weights_out": (WIDTH, HIDDEN),
    }
    for block in (f"encoder.layer.{n}." for n in range(depth)):
        shapes |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
        for vector in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + vector] = (WIDTH,)
        shapes |= {f"{block}layer_scale{n}.lambda1": (WIDTH,) for n in (1, 2)}
    torch.manual_seed(2)
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def hibou_by_hand(state, images):
    """Class token [n, 32] of DINOv2 with registers, written out for those names."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    n = len(images)
    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = state["embeddings.patch_embeddings.projection.weight"].flatten(1)
    patches = (
        patches.flatten(1, 2) @ kernel.T + state["embeddings.patch_embeddings.projection.bias"]
    )
    x = torch.cat([state["embeddings.cls_token"].expand(n, -1, -1), patches], 1)
    x = x + state["embeddings.position_embeddings"]
    registers = state["embeddings.register_tokens"].expand(n, -1, -1)
    x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
    depth = sum(name.endswith("norm1.weight") for name in state)
    for block in (f"encoder.layer.{number}." for number in range(depth)):
        y = norm(x, f"{block}norm1")
        q, k, v = (linear(y, f"{block}attention.attention.{s}") for s in ("query", "key", "value"))
        mixed, size = [], WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weight = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / size**0.5, -1)
            mixed.append(weight @ v[..., part])
        y = linear(torch.cat(mixed, -1), f"{block}attention.output.dense")
        x = x + y * state[f"{block}layer_scale1.lambda1"]
        gate, value = linear(norm(x, f"{block}norm2"), f"{block}mlp.weights_in").chunk(2, -1)
        y = linear(gate * torch.sigmoid(gate) * value, f"{block}mlp.weights_out")
        x = x + y * state[f"{block}layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


def small_hibou():
    card = zoo.card("hibou_b")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return dataclasses.replace(card, dim=WIDTH, arguments={**card.arguments, **shape})


def test_hibou_in_its_published_layout(tmp_path):
    """The configuration beside the weights names code of the hub, which is not asked for."""
    state = hibou_state(2)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        '{"model_type": "hibou", "auto_map": {"AutoModel": "mine.Model"}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    network, forward = neural.build(small_hibou(), tmp_path)
    network.eval()
    torch.manual_seed(3)
    images = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        found, expected = forward(images), hibou_by_hand(state, images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_hibou_are_refused(tmp_path):
    deeper = hibou_state(3)
    save_file(deeper, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"encoder\.layer\.2") as refused:
        neural.build(small_hibou(), tmp_path)
    assert refused.value.code == "bad_weights"
    shallower = hibou_state(1)
    save_file(shallower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"encoder\.layer\.1") as refused:
        neural.build(small_hibou(), tmp_path)
    assert refused.value.code == "bad_weights"


@pytest.mark.parametrize(("name", "millions"), [("hibou_b", 85.7), ("hibou_l", 303.7)])
def test_size_of_hibou(name, millions):
    """Against the parameters that lazyslide-models states for the published weights."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with torch.device("meta"):
        config = Dinov2WithRegistersConfig(**zoo.card(name).arguments)
        model = Dinov2WithRegistersModel(config)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=2e-3)


def test_midnight_is_class_token_and_mean(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,  # stored positions of another grid, as those of the published weights
            patch_size=8,
            use_swiglu_ffn=True,
        )
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    card = dataclasses.replace(zoo.card("midnight"), dim=64, input_px=32, resize_px=32)
    network, forward = neural.build(card, tmp_path)
    info = EncoderInfo(
        **{key: getattr(card, key) for key in ("name", "dim", "input_px", "mpp", "patch_um")},
        **{"revision": "0", "licence": card.licence, "gated": False},
    )
    encoder = neural.NeuralEncoder(
        info=info, card=card, model=network, forward=forward, device=torch.device("cpu")
    )
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        tokens = model(x).last_hidden_state.numpy()
    assert tokens.shape == (6, 1 + 16, 32)
    expected = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    np.testing.assert_allclose(encoder(patches), expected, rtol=1e-4, atol=1e-5)
