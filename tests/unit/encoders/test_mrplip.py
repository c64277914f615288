"""Patch models as encoders: their vectors, the level they choose, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathflip.checkpoints import load_run, write_whole
from pathflip.encoders import Encoder, encoder_info, load_encoder
from pathflip.encoders.mrplip import MRPLIPEncoder
from pathflip.errors import EncoderError
from tests.patch_runs import TEXTURE, make_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("encoders")
    make_run(home / "Trees-1", TEXTURE, parent_um=1024.0, node_px=512)
    return home


@pytest.fixture(scope="module")
def patches() -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    colours = rng.integers(90, 250, (40, 1, 1, 3))
    noise = rng.normal(0, 1, (40, 64, 64, 3)) * rng.integers(5, 60, (40, 1, 1, 1))
    return np.clip(colours + noise, 0, 255).astype(np.uint8)


def test_vectors_are_those_of_the_model(home: Path, patches: NDArray[np.uint8]) -> None:
    """By its weights, written out: projection and level embedding of the base's features."""
    run = load_run(home / "Trees-1", family="mrplip")
    base = load_encoder("texture")
    seen = base(patches)
    given = torch.from_numpy(seen)
    vectors = {}
    for level, name in enumerate(("5x", "10x", "20x", "40x")):
        encoder = load_encoder(f"mrplip:{home / 'Trees-1'}@{name}", device="cpu")
        assert isinstance(encoder, Encoder)
        assert isinstance(encoder, MRPLIPEncoder)
        found = vectors[name] = encoder(patches)
        np.testing.assert_array_equal(encoder.begin(patches)(), found)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        by_model = run.model.encode_patches(given, torch.full((40,), level)).numpy()
        np.testing.assert_allclose(found, by_model, atol=1e-6)
        weights = {key: value.numpy() for key, value in run.model.state_dict().items()}
        plain = seen @ weights["visual.weight"].T + weights["visual.bias"]
        plain = plain + weights["level.weight"][level]
        plain /= np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(found, plain, atol=1e-4)
        stored = found.astype(np.float16).astype(np.float64)
        cosine = (stored * found).sum(axis=1) / np.linalg.norm(stored, axis=1)
        assert cosine.min() > 0.9999
        np.testing.assert_allclose(encoder(patches[7:9]), found[7:9], atol=1e-6)
    assert np.abs(vectors["5x"] - vectors["40x"]).max() > 1e-4
    assert encoder(patches[:0]).shape == (0, 128)


LEVELS = [
    (128.0, "40x"), (112.0, "40x"), (160.0, "40x"), (256.0, "20x"), (224.0, "20x"),
    (512.0, "10x"), (1024.0, "5x"), (1280.0, "5x"),
    (100.0, None), (170.0, None), (64.0, None), (1300.0, None), (None, None),
]  # fmt: skip
"""Side of a patch, µm, and the level whose nodes show as much within a quarter."""


@pytest.mark.parametrize(("patch_um", "level"), LEVELS)
def test_the_level_is_that_of_the_field_of_view(
    home: Path, patch_um: float | None, level: str | None
) -> None:
    spec = f"mrplip:{home / 'Trees-1'}"
    if level is None:
        with pytest.raises(EncoderError, match=r"40x \(128 µm\)") as refused:
            encoder_info(spec, patch_um=patch_um)
        assert refused.value.code == "encoder_scale"
        assert encoder_info(f"{spec}@20x", patch_um=patch_um).name.endswith("_20x")
        return
    info = encoder_info(spec, patch_um=patch_um)
    assert info.name.endswith(f"_{level}")
    assert info.patch_um == {"40x": 128, "20x": 256, "10x": 512, "5x": 1024}[level]


def test_names_and_revisions_tell_models_apart(home: Path) -> None:
    run = load_run(home / "Trees-1", family="mrplip")
    spec = f"mrplip:{home / 'Trees-1'}"
    info = encoder_info(spec, patch_um=128)
    assert info.name == f"mrplip_trees_1_{run.fingerprint[:8]}_40x"
    assert info.revision == f"{run.fingerprint[:12]}-1"
    assert (info.dim, info.input_px, info.mpp) == (128, 256, None)
    encoder = load_encoder(spec, device="cpu", patch_um=128)
    assert isinstance(encoder, MRPLIPEncoder)
    for key in ("name", "revision", "dim", "input_px", "mpp", "licence"):
        assert getattr(info, key) == getattr(encoder, key)
    assert encoder_info(f"{spec}@40x=texture").name == info.name
    with pytest.raises(EncoderError, match="mrplip:RUN") as refused:
        load_encoder(info.name)  # as an archive calls it: the run could be anywhere
    assert refused.value.code == "unknown_encoder"


def test_what_is_no_patch_model_is_refused(home: Path, tmp_path: Path) -> None:
    slides = {"kind": "contrastive", "run": "slides", "encoder": TEXTURE}
    write_whole(
        tmp_path / "slides" / "model",
        lambda part: (part / "pathflip.json").write_text(json.dumps(slides)) and None,
    )
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    other = make_run(tmp_path / "other", TEXTURE | {"revision": "0"}, parent_um=1024.0, node_px=512)
    fine = make_run(
        tmp_path / "fine", TEXTURE, parent_um=1024.0, node_px=512, levels=(3,), losses=("itc",)
    )
    expected = {
        f"mrplip:{tmp_path / 'slides'}": "other_kind",
        f"mrplip:{tmp_path / 'nowhere'}": "missing",
        f"mrplip:{tmp_path / 'begun'}": "incomplete",
        f"mrplip:{other}": "other_encoder",
        f"mrplip:{home / 'Trees-1'}=uni": "missing_weights",
        f"mrplip:{home / 'Trees-1'}@80x": "encoder_scale",
        f"mrplip:{fine}@20x": "encoder_scale",
        "mrplip:": "unknown_encoder",
    }
    for spec, code in expected.items():
        for call in (encoder_info, load_encoder):
            with pytest.raises(EncoderError) as refused:
                call(spec, patch_um=128)
            assert (spec, refused.value.code) == (spec, code)
            assert refused.value.hint
    assert encoder_info(f"mrplip:{fine}", patch_um=128).name.endswith("_40x")
    with pytest.raises(EncoderError) as refused:  # 20x is nearest, and not trained
        encoder_info(f"mrplip:{fine}", patch_um=256)
    assert refused.value.code == "encoder_scale"
