from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pathflip.encoders import neural, zoo
from pathflip.encoders.musk import MuskTower, image_tower
from pathflip.errors import EncoderError

WIDTH, HEADS, DEPTH = 32, 2, 2
TINY = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "px": 32, "patch": 8}


def published(width=WIDTH, depth=DEPTH, tokens=17, patch=8):
    """Shapes of a whole MUSK's tensors by its names: both copies of each part, and both heads."""
    shapes = {
        "logit_scale": (),
        "language_head.weight": (width, width),
        "vision_head.weight": (width, width),
        "beit3.text_embed.weight": (64010, width),
        "beit3.vision_embed.mask_token": (1, 1, width),
        "beit3.vision_embed.cls_token": (1, 1, width),
        "beit3.vision_embed.proj.weight": (width, 3, patch, patch),
        "beit3.vision_embed.proj.bias": (width,),
        "beit3.encoder.embed_positions.A.weight": (tokens + 2, width),
        "beit3.encoder.embed_positions.B.weight": (1024, width),
    }
    norms = ["layer_norm"]
    for at in range(depth):
        block = f"layers.{at}"
        norms += [f"{block}.{name}" for name in ("self_attn_layer_norm", "final_layer_norm")]
        norms += [f"{block}.self_attn.inner_attn_ln"]
        for copy in "AB":
            for part in "qkv":
                name = f"beit3.encoder.{block}.self_attn.{part}_proj.{copy}"
                shapes |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
            name = f"beit3.encoder.{block}.self_attn.out_proj.{copy}"
            shapes |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
            ffn = f"beit3.encoder.{block}.ffn.{copy}"
            shapes |= {f"{ffn}.fc1.weight": (4 * width, width), f"{ffn}.fc1.bias": (4 * width,)}
            shapes |= {f"{ffn}.fc2.weight": (width, 4 * width), f"{ffn}.fc2.bias": (width,)}
            for kind in ("weight", "bias"):
                shapes[f"{ffn}.ffn_layernorm.{kind}"] = (4 * width,)
    for norm in norms:
        for copy in "AB":
            shapes |= {
                f"beit3.encoder.{norm}.{copy}.{kind}": (width,) for kind in ("weight", "bias")
            }
    return shapes


def drawn():
    torch.manual_seed(4)
    return {name: torch.randn(shape) * 0.2 for name, shape in published().items()}


def by_hand(state, images):
    """Class token [n, 32] of the image half of a BEiT-3, head by head."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], scale, shift, eps=1e-5)

    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = state["beit3.vision_embed.proj.weight"].flatten(1)
    patches = patches.flatten(1, 2) @ kernel.T + state["beit3.vision_embed.proj.bias"]
    x = torch.cat([state["beit3.vision_embed.cls_token"].expand(len(images), 1, -1), patches], 1)
    x = x + state["beit3.encoder.embed_positions.A.weight"][2:]
    for at in range(DEPTH):
        block = f"beit3.encoder.layers.{at}"
        y = norm(x, f"{block}.self_attn_layer_norm.A")
        q, k, v = (linear(y, f"{block}.self_attn.{part}_proj.A") for part in "qkv")
        mixed, size = [], WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weight = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / size**0.5, -1)
            mixed.append(weight @ v[..., part])
        y = norm(torch.cat(mixed, -1), f"{block}.self_attn.inner_attn_ln.A")
        x = x + linear(y, f"{block}.self_attn.out_proj.A")
        y = linear(norm(x, f"{block}.final_layer_norm.A"), f"{block}.ffn.A.fc1")
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + linear(norm(y, f"{block}.ffn.A.ffn_layernorm"), f"{block}.ffn.A.fc2")
    return norm(x, "beit3.encoder.layer_norm.A")[:, 0]


def test_the_image_half_of_the_published_tensors():
    state = drawn()
    tower = MuskTower(**TINY).eval()
    tower.load_state_dict(image_tower(state))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(tower(images), by_hand(state, images), rtol=1e-4, atol=1e-4)


def test_size_of_the_published_model():
    """Against the parameters of the whole model that lazyslide-models states, 675.2 million."""
    whole = published(width=1024, depth=24, tokens=577, patch=16)
    assert sum(torch.Size(shape).numel() for shape in whole.values()) / 1e6 == pytest.approx(
        675.2, abs=0.1
    )
    with torch.device("meta"):
        tower = MuskTower()
    wanted = image_tower({name: torch.empty(shape, device="meta") for name, shape in whole.items()})
    assert {k: v.shape for k, v in tower.state_dict().items()} == {
        name: x.shape for name, x in wanted.items()
    }


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(drawn(), tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match="do not fit") as refused:
        neural.build(zoo.card("musk"), tmp_path)
    assert refused.value.code == "bad_weights"
