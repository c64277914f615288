from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from pathflip.encoders import Encoder, encoder_info, load_encoder, table_name, zoo
from pathflip.errors import EncoderError

# px at magnification and length of feature as TRIDENT uses these models (interop.md 3a).
TRIDENT = {
    "uni": (128, 1024),
    "uni2": (128, 1536),
    "conch": (None, 512),  # 512 px there, 256 px in PathFLIP
    "conch_v1_5": (256, 768),
    "virchow": (112, 2560),
    "virchow2": (112, 2560),
    "h0_mini": (112, 1536),
    "midnight": (112, 3072),
    "hibou_b": (112, 768),
    "hibou_l": (112, 1024),
    "phikon": (112, 768),
    "phikon_v2": (112, 1024),
    "musk": (192, 1024),
    "keep": (None, 768),  # 256 px there; its authors state no resolution
    "gigapath": (128, 1536),
    "h_optimus_0": (112, 1536),
    "h_optimus_1": (112, 1536),
}


@pytest.mark.parametrize("card", zoo.CARDS, ids=lambda card: card.name)
def test_cards(card):
    assert table_name(card.name) == card.name
    assert card.hub.count("/") == 1
    assert card.licence
    assert card.title
    assert (
        card.input_px
        % {"conch": 16, "conch_v1_5": 16, "keep": 16, "musk": 16, "clip": 32}.get(card.loader, 14)
        == 0
    )
    assert card.resize_px is None or card.resize_px >= card.input_px
    assert all(0.2 < m < 0.8 for m in card.mean)
    assert all(0.1 < s <= 0.5 for s in card.std)
    assert (card.mpp is None) == (card.patch_um is None)
    assert bool(card.architecture) == (card.loader == "timm")
    patch_um, dim = TRIDENT.get(card.name, (card.patch_um, 512))
    assert card.dim == dim
    assert patch_um in (None, card.patch_um)


def test_the_table_is_complete():
    names = [card.name for card in zoo.CARDS]
    assert len(set(names)) == len(names)
    assert {*TRIDENT, "plip", "quiltnet"} == set(names)


def test_texture_needs_nothing():
    info, encoder = encoder_info("texture"), load_encoder("texture")
    assert isinstance(encoder, Encoder)
    for key in ("name", "revision", "dim", "input_px", "mpp", "licence"):
        assert getattr(info, key) == getattr(encoder, key)
    assert encoder(np.zeros((2, 256, 256, 3), np.uint8)).shape == (2, info.dim)


@pytest.mark.parametrize(("typo", "meant"), [("UNI-2", "uni2"), ("textur", "texture")])
def test_unknown_name(typo, meant):
    for call in (encoder_info, load_encoder):
        with pytest.raises(EncoderError, match=meant) as refused:
            call(typo)
        assert refused.value.code == "unknown_encoder"


def test_an_encoder_of_slides_is_sent_to_the_import() -> None:
    with pytest.raises(EncoderError, match="an encoder of slides") as refused:
        encoder_info("TITAN")
    assert "--slide-features" in refused.value.hint


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
    for call in (encoder_info, load_encoder):
        with pytest.raises(EncoderError, match="no pickles") as refused:
            call(f"uni2={tmp_path}")
        assert refused.value.code == "pickle_weights"
        assert "safetensors" in refused.value.hint


def test_missing_folder(tmp_path):
    for spec in (f"uni2={tmp_path / 'nowhere'}", f"uni2={tmp_path}", f"hf:{tmp_path}"):
        with pytest.raises(EncoderError) as refused:
            encoder_info(spec)
        assert refused.value.code == "missing_weights"


def test_folder_without_configuration(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for scheme in ("hf", "timm"):
        with pytest.raises(EncoderError, match=r"config\.json") as refused:
            encoder_info(f"{scheme}:{tmp_path}")
        assert refused.value.code == "bad_weights"


class Hub:
    """Stands in for the hub: an empty cache, and a repository that answers as told."""

    def __init__(self, monkeypatch, *, files=("model.safetensors",), error=None, gate=None):
        self.error, self.gate = error, gate
        self.files, self.downloads = files, 0
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def snapshot(self, repository, *, local_files_only, **_):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        self.downloads += 1
        raise self.gate

    def model_info(self, repository, *, revision):
        if self.error:
            raise self.error
        files = [type("File", (), {"rfilename": name}) for name in self.files]
        return type("Info", (), {"siblings": files, "sha": "abc123"})

    def auth_check(self, repository):
        if self.gate:
            raise self.gate


def answer(kind, status):
    import httpx2

    request = httpx2.Request("GET", "http://hub.invalid")
    return kind("refused", response=httpx2.Response(status, request=request))


def test_gated(monkeypatch):
    hub = Hub(monkeypatch, gate=answer(errors.GatedRepoError, 403))
    for call in (encoder_info, load_encoder):
        with pytest.raises(EncoderError, match="gated") as refused:
            call("uni2")
        assert refused.value.code == "gated_weights"
        assert "hf auth login" in refused.value.hint
        assert "uni2=/" in refused.value.hint
    assert hub.downloads == 1


def test_offline(monkeypatch):
    Hub(monkeypatch, error=errors.OfflineModeIsEnabled("offline"))
    for call in (encoder_info, load_encoder):
        with pytest.raises(EncoderError, match="cannot be reached") as refused:
            call("phikon_v2")
        assert refused.value.code == "missing_weights"


def test_no_such_repository(monkeypatch):
    Hub(monkeypatch, error=answer(errors.RepositoryNotFoundError, 404))
    with pytest.raises(EncoderError, match="no model someone/thing") as refused:
        encoder_info("hf:someone/thing")
    assert refused.value.code == "missing_weights"
    assert "models pull someone/thing" in refused.value.hint
    assert "own: hf:/path/to/folder." in refused.value.hint  # a hub's name takes no folder


def test_hub_with_pickles_only(monkeypatch):
    hub = Hub(monkeypatch, files=("pytorch_model.bin", "onnx/model.safetensors"))
    for call in (encoder_info, load_encoder):
        with pytest.raises(EncoderError, match="no pickles") as refused:
            call("uni")
        assert refused.value.code == "pickle_weights"
    assert hub.downloads == 0


def test_info_downloads_nothing(monkeypatch):
    hub = Hub(monkeypatch)
    info = encoder_info("virchow2")
    assert (info.dim, info.mpp, info.patch_um, info.revision) == (2560, 0.5, 112, "abc123-u8")
    assert hub.downloads == 0


def test_documentation():
    """Every row of the documented table is what the code says, and the examples run."""
    text = (Path(__file__).parents[3] / "docs" / "reference" / "encoders.md").read_text()
    for c in zoo.CARDS:
        patch = f"{c.patch_um:g}" if c.patch_um else "any"
        facts = (f"`{c.name}`", c.title, c.input_px, c.mpp or "any", patch, c.dim, c.licence)
        assert f"| {' | '.join(map(str, facts))} | {'yes' if c.gated else 'no'} |" in text
    assert f"| 256 | any | any | {encoder_info('texture').dim} |" in text
    scope = {"patches": np.zeros((2, 256, 256, 3), np.uint8)}
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(example, scope)
    assert scope["features"].shape == (len(scope["patches"]), encoder_info("texture").dim)


def test_import_is_light():
    code = (
        "import sys, pathflip.encoders; bad = {'torch', 'cv2', 'timm', 'transformers', "
        "'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
