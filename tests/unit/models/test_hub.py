"""Models on disk: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PathFLIP, hub
from pathflip.models.tokenizer import TextTokenizer
from tests.unit.models.tiny import CAPTIONS, SIZES, TOKENIZER, batch, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    tiny(feature_norm="whiten").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("pathflip/paper", {"feature_norm": "whiten"}),
        ("pathflip/official_v1", {}),
        ("pathflip/mini", {}),
        ("pathflip/paper", {"global_only": True, "region_encoder": "none"}),
    ],
)
def test_a_model_comes_back_bit_for_bit(name: str, overrides: dict, tmp_path: Path) -> None:
    model, given = tiny(name, **overrides), batch()
    model.fit_normalization(torch.randn(300, 12))
    model.save_pretrained(tmp_path / "m")
    again = PathFLIP.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert not again.training
    features, mask = given["features"], given["patch_mask"]
    first, second = (m.encode_slide(features, mask) for m in (model, again))
    assert torch.equal(first.slide, second.slide)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(model.encode_text(CAPTIONS), again.encode_text(CAPTIONS))
    again.save_pretrained(tmp_path / "n")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()
    assert not list((tmp_path / "m").glob("*.bin"))


def test_the_fingerprint_sees_weights_settings_and_words() -> None:
    model = tiny()
    first = model.fingerprint()
    assert tiny().fingerprint() == first
    assert tiny(seed=1).fingerprint() != first
    assert tiny(temperature=0.2).fingerprint() != first
    assert tiny(recompute=False).fingerprint() == first
    with torch.no_grad():
        model.region_scale += 1e-6
    assert model.fingerprint() != first


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_is_missing_is_named(file: str, copy: Path) -> None:
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=file) as error:
        PathFLIP.from_pretrained(copy)
    assert str(copy) in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_was_cut_is_named(file: str, copy: Path) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"config\.json|model\.safetensors|tokenizer"):
        PathFLIP.from_pretrained(copy)


def test_weights_of_another_model_are_refused_by_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["text_out.bias"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"text_out\.bias is \(3,\), not \(16,\)"):
        PathFLIP.from_pretrained(copy)
    del tensors["text_out.bias"]
    save_file(tensors | {"extra": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"text_out\.bias is missing \(and 1 more\)"):
        PathFLIP.from_pretrained(copy)


def test_settings_of_another_version_are_refused(copy: Path) -> None:
    about = json.loads((copy / "config.json").read_text())
    about["pathflip"]["warp"] = 9
    (copy / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="warp"):
        PathFLIP.from_pretrained(copy)
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="does not describe"):
        PathFLIP.from_pretrained(copy)


def test_a_folder_that_is_not_there_and_one_too_high(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        PathFLIP.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"lacks config\.json") as error:
        PathFLIP.from_pretrained(saved.parent)
    assert str(saved) in error.value.hint


def test_a_name_is_looked_up_on_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "owner/model":
            return str(saved)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert PathFLIP.from_pretrained("owner/model").config.d == 16
    with pytest.raises(CheckpointError, match="offline"):
        PathFLIP.from_pretrained("owner/other")
    assert asked == ["owner/model", "owner/other"]


def test_what_is_uploaded_is_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, object] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            seen.update(name=name, private=private)
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tiny().push_to_hub("owner/model", token="t") == "https://hub/owner/model"
    assert seen == {
        "token": "t", "name": "owner/model", "private": True,
        "files": ["README.md", "config.json", "model.safetensors", "tokenizer.json",
                  "tokenizer_config.json"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in a folder, as the hub would give it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=len(TOKENIZER), hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(str(folder))
    return folder


def test_a_bert_in_a_folder_is_the_tower_and_starts_the_qformer(bert: Path, tmp_path: Path) -> None:
    sizes = SIZES | {"text_model": str(bert), "qformer_from_text": True}
    model = PathFLIP.from_preset("pathflip/paper", **sizes)
    theirs = BertModel.from_pretrained(bert)
    weight = theirs.encoder.layer[1].attention.self.key.weight
    assert torch.equal(model.text_tower.bert.encoder.layer[1].attention.self.key.weight, weight)
    assert torch.equal(model.qformer.layers[1].attention.key.weight, weight)
    up = theirs.encoder.layer[2].intermediate.dense.weight
    assert torch.equal(model.qformer.layers[2].ffn_query.up.weight, up)
    model.train()(**batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.save_pretrained(tmp_path / "m")
    shutil.copytree(bert, tmp_path / "kept")
    # What was saved needs the folder no more.
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert about["text_config"]["model_type"] == "bert"
    again = PathFLIP.from_pretrained(tmp_path / "m")
    assert again.fingerprint() == model.fingerprint()


def test_a_bert_of_the_hub_is_cut_into_the_same_words_without_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "necrosis", "naive", "##s", "a", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    theirs.save_pretrained(tmp_path)
    ours = hub.read_tokenizer(tmp_path, texts=True)
    assert isinstance(ours, TextTokenizer)
    texts = ["Naïve, NECROSIS", "", "[MASK] necrosiss a", "中文 a"]
    for most in (3, 64):
        cut = {"truncation": True, "max_length": most}
        assert ours(texts, **cut)["input_ids"] == theirs(texts, **cut)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


def test_the_shared_branch_starts_from_the_bert_too(bert: Path) -> None:
    sizes = SIZES | {"text_model": str(bert), "qformer_from_text": True}
    model = PathFLIP.from_preset("pathflip/official_v1", **sizes)
    theirs = BertModel.from_pretrained(bert)
    layer, old = model.qformer.layers[0], theirs.encoder.layer[0]
    for block in (layer.ffn_text, layer.ffn_query):
        assert torch.equal(block.down.weight, old.output.dense.weight)
    words = theirs.embeddings.word_embeddings.weight
    assert torch.equal(model.qformer.words.weight, words)
    assert torch.equal(
        model.qformer.positions.weight[:64], theirs.embeddings.position_embeddings.weight
    )


def test_a_text_model_that_is_not_there_or_does_not_fit(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere") as error:
        PathFLIP.from_preset("pathflip/paper", text_model=str(tmp_path / "nowhere"))
    assert "safetensors" in error.value.hint
    sizes = SIZES | {"text_model": str(bert), "qformer_from_text": True}
    with pytest.raises(ConfigError, match="cannot be initialised"):
        PathFLIP.from_preset("pathflip/paper", **sizes | {"hidden": 30})


def test_the_card_names_the_fingerprint(saved: Path) -> None:
    model = PathFLIP.from_pretrained(saved)
    assert model.fingerprint() in (saved / "README.md").read_text()
    (saved / "README.md").write_text("mine")
    hub.save(model, saved)
    assert (saved / "README.md").read_text() == "mine"
