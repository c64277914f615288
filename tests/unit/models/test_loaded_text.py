"""Tokenizer and BERT of a loaded model against those of ``transformers``, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from pathflip.models.bert import Bert
from pathflip.models.packing import pack
from pathflip.models.text_tower import TextTower
from pathflip.models.tokenizer import TextTokenizer
from pathflip.text import train_tokenizer

TEXTS = [
    "Sections show colon. There is necrosis.",
    "",
    "  NÉCROSE,\tξ [MASK] of the [CLS] kind; 中文 and  a-very-long-word-" + "x" * 120,
    "mucin " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer as ``transformers`` writes it."""
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*TEXTS, "kind mucin words of the mask"], vocab_size=120).save_pretrained(made)
    return made


@pytest.mark.parametrize("most", [None, 2, 3, 7, 64])
def test_texts_become_the_same_ids(folder: Path, most: int | None) -> None:
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = TextTokenizer(folder)
    cut: dict[str, Any] = {"truncation": True, "max_length": most} if most else {}
    assert ours(TEXTS, **cut)["input_ids"] == theirs(TEXTS, **cut)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.mask_token_id == theirs.mask_token_id


def test_a_tokenizer_that_was_read_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    ours = TextTokenizer(folder)
    ours(TEXTS, truncation=True, max_length=5)
    ours(TEXTS)
    ours.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())


def test_one_text_is_not_taken_for_its_letters(folder: Path) -> None:
    with pytest.raises(TypeError, match="list of strings"):
        TextTokenizer(folder)("necrosis")


@pytest.mark.parametrize("types", [1, 2])
def test_a_bert_has_the_weights_names_and_vectors_of_transformers(types: int) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, type_vocab_size=types,
    )  # fmt: skip
    theirs = BertModel(config, add_pooling_layer=False).eval()
    told = config.to_diff_dict() | {"model_type": "bert"}
    ours = Bert(told).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    packed = pack([[2, 5, 6, 3], [2, 9, 3], [2, *range(10, 30), 3]], device=torch.device("cpu"))
    mine, their = TextTower(ours).eval(), TextTower(theirs).eval()
    for pooling in ("cls", "mean"):
        assert torch.equal(mine(packed, pooling=pooling), their(packed, pooling=pooling))
    assert (mine.width, mine.max_positions) == (their.width, their.max_positions)
    assert mine.text_config() == told
    assert ours.embeddings.word_embeddings.padding_idx == 0


def test_a_bert_of_few_settings_has_those_of_transformers_for_the_rest() -> None:
    theirs = BertConfig()
    for name, value in Bert({"model_type": "bert", "num_hidden_layers": 1}).config.__dict__.items():
        if name not in ("model_type", "num_hidden_layers"):
            assert getattr(theirs, name) == value
