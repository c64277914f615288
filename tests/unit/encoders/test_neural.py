from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pathflip.encoders import EncoderInfo, encoder_info, load_encoder, neural, zoo
from pathflip.errors import EncoderError

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


def encoder(forward, card=CARD, **more):
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
        info=info, card=card, model=nn.Identity(), forward=forward, device=torch.device("cpu"), **more
    )


def mean_colour(x):
    return x.mean((2, 3))


def test_vit_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTModel

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
    model.save_pretrained(tmp_path)
    info, loaded = encoder_info(f"hf:{tmp_path}"), load_encoder(f"hf:{tmp_path}", device="cpu")
    assert (info.dim, info.input_px, info.revision) == (32, 32, loaded.revision)
    with torch.inference_mode():
        expected = model(images(PATCHES, *zoo.IMAGENET)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(loaded(PATCHES), expected, rtol=1e-5, atol=1e-5)
    # The same folder as a model of the table: right path, other size of feature.
    with pytest.raises(EncoderError, match=r"returns \[32\].*\[1024\]"):
        load_encoder(f"phikon_v2={tmp_path}", device="cpu")(
            np.zeros((1, 224, 224, 3), np.uint8)
        ) if False else neural.NeuralEncoder.__call__(
            encoder(lambda x: torch.zeros(len(x), 32), card=_resized(dim=1024)), PATCHES
        )


def _resized(**changes):
    import dataclasses

    return dataclasses.replace(CARD, **changes)
