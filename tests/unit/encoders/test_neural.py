from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from pathflip.encoders import EncoderInfo, encoder_info, load_encoder, neural, zoo
from pathflip.errors import EncoderError
from tests.faults import ROOT

HERE = Path(__file__).parent
PATCHES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
CARD = zoo.Card(
    name="probe",
    title="probe",
    hub="",
    loader="torchscript",
    dim=3,
    input_px=8,
    resize_px=8,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    mpp=None,
    patch_um=None,
    pooling="model",
    licence="none",
    gated=False,
)


def images(patches, mean, std):
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def probe(forward, *, batch=None, device="cpu", model=None, **changes):
    card = dataclasses.replace(CARD, **changes)
    info = EncoderInfo(
        name=card.name,
        revision="0",
        dim=card.dim,
        input_px=card.input_px,
        mpp=None,
        patch_um=None,
        licence=card.licence,
        gated=False,
    )
    return neural.NeuralEncoder(
        info=info,
        card=card,
        model=model or nn.Identity(),
        forward=forward,
        device=torch.device(device),
        batch=batch,
    )


def mean_colour(x):
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("Tiny ViT-1")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    return folder, model


def test_vit_of_transformers(vit):
    folder, model = vit
    info, encoder = encoder_info(f"hf:{folder}"), load_encoder(f"hf:{folder}", device="cpu")
    assert info.name == encoder.name
    assert info.name.startswith("tiny_vit_1")
    assert (info.dim, info.input_px, info.revision) == (32, 32, encoder.revision)
    with torch.inference_mode():
        expected = model(images(PATCHES, *zoo.IMAGENET)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(encoder(PATCHES), expected, rtol=1e-5, atol=1e-5)


def test_phikon_is_the_class_token(vit, tmp_path):
    """A ViT saved with the pooler that the published one is loaded without."""
    from transformers import ViTModel

    _, model = vit
    whole = ViTModel(model.config, add_pooling_layer=True)
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    card = zoo.card("phikon")
    network, forward = neural.build(dataclasses.replace(card, dim=32, input_px=32), tmp_path)
    x = images(PATCHES, card.mean, card.std)
    with torch.inference_mode():
        torch.testing.assert_close(
            network.eval() and forward(x), model(x).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5
        )


def test_clip_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 9},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}", device="cpu")
    assert encoder.dim == encoder_info(f"hf:{tmp_path}").dim == 16
    with torch.inference_mode():
        pooled = model.vision_model(images(PATCHES, *zoo.OPENAI)).pooler_output
        expected = model.visual_projection(pooled).numpy()
    np.testing.assert_allclose(encoder(PATCHES), expected, rtol=1e-5, atol=1e-5)


def test_revision_follows_the_weights(vit, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = vit
    before = encoder_info(f"hf:{folder}").revision
    for name in ("config.json",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same = encoder_info(f"hf:{tmp_path}").revision
    state["embeddings.cls_token"][0, 0, 0] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same == before != encoder_info(f"hf:{tmp_path}").revision


def test_missing_tensors_are_not_invented(vit, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = vit
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["embeddings.cls_token"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"first embeddings\.cls_token") as refused:
        load_encoder(f"hf:{tmp_path}", device="cpu")
    assert refused.value.code == "bad_weights"


def test_damaged_weights(vit, tmp_path):
    folder, _ = vit
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(EncoderError) as refused:
        load_encoder(f"hf:{tmp_path}", device="cpu")
    assert refused.value.code == "bad_weights"


def test_code_in_a_model_folder_is_not_run(vit, tmp_path):
    folder, _ = vit
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "hidden_size": 8, "auto_map": {"AutoConfig": "mine.Config",'
        ' "AutoModel": "mine.Model"}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(EncoderError) as refused:
        load_encoder(f"hf:{tmp_path}", device="cpu")
    assert refused.value.code == "remote_code"
    assert not (tmp_path / "ran").exists()


def test_torchscript(tmp_path):
    class Net(nn.Module):
        def forward(self, x):
            return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    spec = f"torchscript:{tmp_path / 'net.pt'}"
    assert encoder_info(spec).dim == 6
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    expected = Net()(images(patches, *zoo.IMAGENET)).numpy()
    np.testing.assert_allclose(load_encoder(spec, device="cpu")(patches), expected, atol=1e-5)
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(EncoderError, match="not a TorchScript file"):
        encoder_info(f"torchscript:{tmp_path / 'text.pt'}")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_timm_without_torchvision_says_so(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match="cannot be imported here") as refused:
        load_encoder(f"uni2={tmp_path}", device="cpu")
    assert refused.value.code == "missing_package"


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm_models():
    """In a process of its own, where timm finds the names of torchvision it imports."""
    fake = HERE / "fake_torchvision.py"
    start = [str(fake)] if find_spec("torchvision") is None else ["-m", "pytest"]
    run = subprocess.run(
        [sys.executable, *start, "-q", "-p", "no:cacheprovider", str(HERE / "timm_models.py")],
        cwd=HERE.parents[2],
        env={
            **os.environ,
            "PYTHONPATH": str(HERE.parents[2]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # none is of use there, and all cost imports
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_patches_of_the_input_size_are_only_normalised():
    card = dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3), input_px=32, resize_px=32)
    expected = images(PATCHES, card["mean"], card["std"]).mean((2, 3)).numpy()
    np.testing.assert_allclose(probe(mean_colour, **card)(PATCHES), expected, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize_px", "input_px"), [(None, 24), (32, 24), (28, 28), (48, 32)])
def test_preparation_in_whole_levels(resize_px, input_px, interpolation):
    """Against resizing and normalising in floats: equal bits, or within a level where resized."""
    mean, std = zoo.IMAGENET
    smooth = np.stack([cv2.GaussianBlur(patch, (0, 0), 1) for patch in PATCHES])
    floats = torch.from_numpy(smooth).permute(0, 3, 1, 2).float()
    side = resize_px or 32
    if side != 32:
        floats = torch.nn.functional.interpolate(
            floats, [side, side], mode=interpolation, antialias=True
        ).clamp(0, 255)
    at = (side - input_px) // 2
    floats = floats[:, :, at : at + input_px, at : at + input_px]
    std_levels = torch.tensor(std).view(3, 1, 1)
    expected = (floats / 255 - torch.tensor(mean).view(3, 1, 1)) / std_levels
    seen = []
    card = dict(input_px=input_px, resize_px=resize_px, interpolation=interpolation)
    probe(lambda x: seen.append(x.clone()) or mean_colour(x), mean=mean, std=std, **card)(smooth)
    found = torch.cat(seen)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if side == 32:
        assert torch.equal(found, expected)
        return
    off = (found - expected).abs() * std_levels * 255
    assert float(off.max()) < 1.6
    assert float(off.mean()) < 0.4


def test_shrinking_is_antialiased():
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::2] = 255
    out = probe(lambda x: x[:, :, 4, 4], interpolation="bilinear")(stripes)
    np.testing.assert_allclose(out, 0.5, atol=0.02)
    smooth = cv2.GaussianBlur(PATCHES[0], (0, 0), 3)[None]
    area = cv2.resize(smooth[0], (8, 8), interpolation=cv2.INTER_AREA) / 255
    seen = []
    probe(lambda x: seen.append(x.clone()) or mean_colour(x))(smooth)
    assert np.abs(seen[0][0].permute(1, 2, 0).numpy() - area).mean() < 0.02


@pytest.mark.parametrize(
    ("resize_px", "px", "corner"),
    [(None, 32, 12), (None, 8, 0), (16, 16, 4)],
    ids=["cropped only", "as it is", "resized, then cropped"],
)
def test_centre_crop(resize_px, px, corner):
    ramp = np.arange(px, dtype=np.uint8)
    patch = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(0)), -1)[None]
    out = probe(lambda x: x[:, :, 0, 0], resize_px=resize_px)(patch)
    np.testing.assert_allclose(out * 255, [[corner, corner, 0]], atol=1e-4)


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_smaller_batches_when_memory_is_short(limit):
    sizes = []

    def forward(x):
        sizes.append(len(x))
        if len(x) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return mean_colour(x)

    encoder = probe(forward, batch=16)
    patches = np.concatenate([PATCHES] * 4)
    np.testing.assert_array_equal(encoder(patches), probe(mean_colour, batch=24)(patches))
    assert encoder.batch == (2 if limit == 3 else limit)
    sizes.clear()
    encoder(patches)
    assert max(sizes) <= limit  # it does not try the large batch again


def test_out_of_memory_with_one_patch():
    def forward(x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EncoderError) as refused:
        probe(forward, batch=16)(PATCHES)
    assert refused.value.code == "out_of_memory"


def test_output_of_the_wrong_length():
    with pytest.raises(EncoderError, match=r"\[2\].*\[3\]"):
        probe(lambda x: mean_colour(x)[:, :2])(PATCHES)


def test_no_patches_and_wrong_arrays():
    encoder = probe(mean_colour)
    assert encoder(PATCHES[:0]).shape == (0, 3)
    for wrong in (PATCHES.astype(np.float32), PATCHES[0], PATCHES[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            encoder(wrong)


def test_devices():
    assert neural.pick_device("cpu").type == "cpu"
    with pytest.raises(EncoderError) as refused:
        neural.pick_device("cuda:99")
    assert refused.value.code == "no_gpu"
    with pytest.raises(EncoderError):
        neural.pick_device("toaster")


def test_positions_keep_their_layout():
    """A ramp across the grid is still a ramp after stretching; the class token is untouched."""
    grid = torch.linspace(0, 1, 14)
    ramp = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(1, 196, 2)
    out = neural.stretch_positions(torch.cat([torch.full((1, 1, 2), 7.0), ramp], 1), grid=28)
    assert out.shape == (1, 785, 2)
    assert (out[0, 0] == 7).all()
    image = out[0, 1:].reshape(28, 28, 2)
    fine = torch.linspace(0, 1, 28)
    assert (image[3:-3, 3:-3, 0] - fine[3:-3, None]).abs().max() < 0.03
    assert (image[3:-3, 3:-3, 1] - fine[None, 3:-3]).abs().max() < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_matches_cpu(vit):
    folder, _ = vit
    here, there = (load_encoder(f"hf:{folder}", device=d) for d in ("cpu", "cuda"))
    a, b = here(PATCHES), there(PATCHES)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.999


class Linear(nn.Module):
    """Three sums of all pixels, as a network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 192))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same():
    """In a process of its own: the compiler wants setuptools' distutils, tests import Python's."""
    code = """
import numpy as np, torch
from tests.unit.encoders.test_neural import PATCHES, Linear, probe

network = Linear()
encoder = probe(network, model=network)
expected = encoder(PATCHES)
encoder.compile()
np.testing.assert_allclose(encoder(PATCHES), expected, rtol=1e-4, atol=1e-5)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_begun_batches_keep_their_features_whatever_becomes_of_their_pixels(device):
    """Batches share one memory for pixels and are collected in another order."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    encoder = probe(mean_colour, batch=4, device=device)
    rng = np.random.default_rng(1)
    memory = np.empty((6, 8, 8, 3), np.uint8)
    given, waits = [], []
    for count in (6, 1, 4, 5):
        given.append(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
        memory[:count] = given[-1]
        waits.append(encoder.begin(memory[:count]))
        memory[:] = 0
    for at in (2, 0, 3, 1):
        expected = given[at].mean((1, 2)) / 255
        np.testing.assert_allclose(waits[at](), expected, rtol=2e-2 if device == "cuda" else 1e-5)
