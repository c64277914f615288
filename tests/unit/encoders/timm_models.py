"""timm models through the real loading path; run by test_neural.py with torchvision's names faked.

Not collected on its own: timm does not import without torchvision.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pathflip.encoders import encoder_info, load_encoder, neural, zoo
from pathflip.errors import EncoderError

# Millions of parameters, as lazyslide-models states them for the published weights.
PARAMETERS = {"virchow": 631.2, "virchow2": 631.2, "h0_mini": 85.7}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PATCHES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def tiny(**more):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY, **more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def normalised(card_mean, card_std):
    x = torch.from_numpy(PATCHES).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(card_mean).view(3, 1, 1)) / torch.tensor(card_std).view(3, 1, 1)


def test_folder_as_timm_saves_it(tmp_path):
    model = tiny(num_classes=7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_features": 32,
        "model_args": TINY,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.3] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    info, encoder = encoder_info(f"timm:{tmp_path}"), load_encoder(f"timm:{tmp_path}", device="cpu")
    assert (info.dim, info.input_px, encoder.revision) == (32, 32, info.revision)
    model.reset_classifier(0)
    with torch.inference_mode():
        expected = model(normalised([0.4] * 3, [0.3] * 3)).numpy()
    np.testing.assert_allclose(encoder(PATCHES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_built_around_its_weights_has_the_bits_of_one_that_copies_them(
    tmp_path, monkeypatch, dtype
):
    import timm

    model = tiny(num_classes=0).to(dtype)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    card = dataclasses.replace(
        zoo.card("uni"), dim=32, input_px=32, architecture="vit_tiny_patch16_224", arguments=TINY
    )
    copied = timm.create_model("vit_tiny_patch16_224", **TINY, num_classes=0).eval()
    copied.load_state_dict(model.state_dict())
    drawn = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda x, *a, **k: drawn.append(x.device.type) or real(x, *a, **k)
    )
    network, _ = neural.build(card, tmp_path)
    assert "cpu" not in drawn
    images = normalised(*zoo.IMAGENET)
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, copied.state_dict()[name])
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), copied(images))


def test_class_token_and_mean_without_registers(tmp_path):
    model = tiny(num_classes=0, reg_tokens=4, global_pool="")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    virchow = zoo.card("virchow2")
    assert virchow is not None
    small = dataclasses.replace(
        virchow,
        dim=64,
        input_px=32,
        resize_px=32,
        architecture="vit_tiny_patch16_224",
        arguments={**TINY, "reg_tokens": 4, "global_pool": ""},
    )
    network, forward = neural.build(small, tmp_path)
    network.eval()
    with torch.inference_mode():
        tokens = model(normalised(*zoo.IMAGENET))
        out = forward(normalised(*zoo.IMAGENET))
    assert tokens.shape == (5, 1 + 4 + 16, 32)
    torch.testing.assert_close(out[:, :32], tokens[:, 0])
    torch.testing.assert_close(out[:, 32:], tokens[:, 5:].mean(1))


@pytest.fixture
def shallow(monkeypatch):
    """Models of the published shapes, but two blocks deep."""
    import timm

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: real(*a, **{**k, "depth": 2}))


@pytest.mark.usefixtures("shallow")
def test_weights_of_another_model_are_refused(tmp_path):
    save_file(tiny(num_classes=0).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(EncoderError) as refused:
        load_encoder(f"uni={tmp_path}", device="cpu")
    assert refused.value.code == "bad_weights"


@pytest.mark.parametrize("card", [c for c in zoo.CARDS if c.loader == "timm"], ids=lambda c: c.name)
def test_architecture_of_the_table(card):
    with torch.device("meta"):
        arguments = {**card.arguments, "num_classes": 0, "weight_init": "skip"}  # no values here
        model = neural._timm(card.architecture, arguments, card.name)
        out = neural.pool(
            model(torch.zeros(1, 3, card.input_px, card.input_px)),
            card.pooling,
            prefix=model.num_prefix_tokens,
        )
    assert out.shape == (1, card.dim)
    millions = PARAMETERS.get(card.name)
    if millions:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["conch", "conch_v1_5"])
def test_conch_towers(name, tmp_path):
    import timm

    card = zoo.card(name)
    assert card is not None
    trunk = "vit_base_patch16_224" if name == "conch" else "vit_large_patch16_224"
    width = 768 if name == "conch" else 1024
    more = {} if name == "conch" else {"init_values": 1.0}
    model = timm.create_model(trunk, img_size=448, num_classes=0, **more).eval()
    torch.manual_seed(1)
    state = {f"trunk.{k}": torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}
    d, head = card.dim, {}
    head["query"] = torch.randn(1, d)
    for ln, size in (("ln_q", d), ("ln_k", width)):
        head |= {f"{ln}.weight": torch.rand(size) + 0.5, f"{ln}.bias": torch.randn(size)}
    if name == "conch":
        for part, size in (("q", d), ("k", width), ("v", width)):
            head[f"attn.{part}_proj_weight"] = torch.randn(d, size) / size**0.5
        head["attn.in_proj_bias"] = torch.randn(3 * d)
        head |= {"attn.out_proj.weight": torch.randn(d, d) / d**0.5}
        head["attn.out_proj.bias"] = torch.randn(d)
    else:
        head |= {"to_q.weight": torch.randn(d, d) / d**0.5}
        head |= {"to_kv.weight": torch.randn(2 * d, width) / width**0.5}
        head |= {"to_out.weight": torch.randn(d, d) / d**0.5}
    state |= {f"attn_pool_contrast.{k}": v for k, v in head.items()}
    state |= {"ln_contrast.weight": torch.rand(d) + 0.5, "ln_contrast.bias": torch.randn(d)}
    if name == "conch":
        saved = {f"visual.{k}": v for k, v in state.items()}
        saved |= {"text.anything": torch.zeros(2), "visual.proj_contrast": torch.zeros(d, d)}
    else:
        saved = state
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "model.safetensors")
    encoder = load_encoder(f"{name}={tmp_path}", device="cpu")

    # Slow reference: attention of one query, head by head, on the trunk's tokens.
    positions = state["trunk.pos_embed"]
    if name == "conch_v1_5":
        positions = neural.stretch_positions(positions, grid=28)
    trunk_state = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    model.load_state_dict({**trunk_state, "pos_embed": positions})
    patches = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)

    def norm(y, ln):
        return torch.nn.functional.layer_norm(
            y, y.shape[-1:], head[f"{ln}.weight"], head[f"{ln}.bias"]
        )

    with torch.inference_mode():
        keys = norm(model.forward_features(x), "ln_k")
        query = norm(head["query"], "ln_q")
        if name == "conch":
            bq, bk, bv = head["attn.in_proj_bias"].chunk(3)
            q = query @ head["attn.q_proj_weight"].T + bq
            k = keys @ head["attn.k_proj_weight"].T + bk
            v = keys @ head["attn.v_proj_weight"].T + bv
        else:
            q = query @ head["to_q.weight"].T
            k, v = (keys @ head["to_kv.weight"].T).chunk(2, -1)
        parts, size = [], d // 8
        for h in range(8):
            part = slice(h * size, (h + 1) * size)
            weight = torch.softmax(q[:, part] @ k[..., part].transpose(1, 2) / size**0.5, -1)
            parts.append((weight @ v[..., part])[:, 0])
        mixed = torch.cat(parts, -1)
        if name == "conch":
            mixed = mixed @ head["attn.out_proj.weight"].T + head["attn.out_proj.bias"]
        else:
            mixed = mixed @ head["to_out.weight"].T
        expected = torch.nn.functional.layer_norm(
            mixed, (d,), state["ln_contrast.weight"], state["ln_contrast.bias"]
        )
    np.testing.assert_allclose(encoder(patches), expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("shallow")
def test_keep_tower(tmp_path):
    """The checkpoint holds both towers; the reference is timm's ViT and two matrices by hand."""
    import timm

    torch.manual_seed(1)
    model = timm.create_model("vit_large_patch16_224", num_classes=0, init_values=1e-5).eval()
    state = {f"visual.{k}": torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}
    shapes = {"0.weight": (768, 1024), "0.bias": (768,), "2.weight": (768, 768), "2.bias": (768,)}
    head = {k: torch.randn(shape) * 0.05 for k, shape in shapes.items()}
    saved = {**state, **{f"visual_head.{k}": v for k, v in head.items()}}
    saved |= {"text.embeddings.word_embeddings.weight": torch.zeros(3, 2)}
    saved |= {"logit_scale": torch.tensor(3.2)}
    save_file(saved, tmp_path / "model.safetensors")
    encoder = load_encoder(f"keep={tmp_path}", device="cpu")

    model.load_state_dict({k.removeprefix("visual."): v for k, v in state.items()})
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in zoo.IMAGENET)
    with torch.inference_mode():
        hidden = model((x - mean) / std) @ head["0.weight"].T + head["0.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        expected = (hidden @ head["2.weight"].T + head["2.bias"]).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder(patches), expected, rtol=1e-3, atol=1e-5)

    del saved["visual_head.2.bias"]
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=r"visual_head\.2\.bias") as refused:
        load_encoder(f"keep={tmp_path}", device="cpu")
    assert refused.value.code == "bad_weights"
