"""The small language model: its tokenizer, what it learns, what it writes."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pathflip.errors import ConfigError
from pathflip.models import small_lessons, small_llm
from pathflip.models.chat_template import Example, Prompter, caption_example
from pathflip.models.small_lessons import Lessons, as_regions, lesson, turned_to_words
from pathflip.models.small_llm import SmallLLMConfig, make, train_bpe
from pathflip.text import split_sentences
from tests.unit.models.tiny import tiny

TEXTS = [
    "Sections show lung parenchyma. Necrosis is noted.",
    "Keratin pearls are present. Sections show breast tissue.",
    "Sections show colonic mucosa. Mucin pools are present. No necrosis is identified.",
    "Sections show smooth muscle.",
    "Necrosis is noted. Sections show breast tissue. Dr. Lee measured 2.5 cm.",
]
SMALL = SmallLLMConfig(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=32, vocab_size=320, epochs=2,
    batch_size=2,
)  # fmt: skip
QWEN = {
    "thinking": "<|im_start|>assistant\n",
    "none": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
}


@dataclass
class Asked:
    question: str
    choices: tuple[str, ...]
    answer: str


ASKED = [[Asked("Which tissue?", ("lung", "breast"), "lung")], [], [], [],
         [Asked("Is there necrosis?", (), "yes")]]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    folder = tmp_path_factory.mktemp("made") / "llm"
    seen: list[Any] = []
    return folder, make(TEXTS, folder, SMALL, questions=ASKED, progress=seen.append), seen


def test_it_is_an_ordinary_qwen3(made: tuple[Path, dict[str, Any], list[Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, about, seen = made
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    table: Any = model.get_input_embeddings()
    assert table.num_embeddings >= len(tokenizer)
    assert about["parameters"] == sum(own.numel() for own in model.parameters())
    assert about["made"] is True
    assert (about["texts"], about["questions"]) == (5, 2)
    assert [one.done for one in seen] == list(range(1, about["steps"] + 1))
    assert seen[-1].fraction == 1.0
    asked = [{"role": "user", "content": "Which tissue is shown?"}]
    for thinking, ending in ((True, QWEN["thinking"]), (False, QWEN["none"])):
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert text == f"<|im_start|>user\nWhich tissue is shown?<|im_end|>\n{ending}"
    Prompter(tokenizer, "qwen3")  # takes it


def test_the_tokenizer_writes_anything_and_reads_it_back() -> None:
    tokenizer = train_bpe(TEXTS, vocab_size=400)
    assert tokenizer.get_vocab() == train_bpe(TEXTS[::-1], vocab_size=400).get_vocab()
    for text in (*TEXTS, "Größe: 3 µm², 汉字 🙂\n\tend", " lead and trail "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("B. breast tissue")["input_ids"]) < len("B. breast tissue")
    assert (
        tokenizer("B. x")["input_ids"][0] == tokenizer("B")["input_ids"][0]
    )  # letters stand alone
    ends = tokenizer("<|im_start|>user\nhi<|im_end|><think>")["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ends)
    assert [name for name in names if "|" in name or "<" in name] == [
        "<|im_start|>", "<|im_end|>", "<think>",
    ]  # fmt: skip


def test_the_same_again_is_not_made_again(
    made: tuple[Path, dict[str, Any], list[Any]], tmp_path: Path
) -> None:
    folder, about, _ = made
    again = make(TEXTS, folder, SMALL, questions=ASKED)
    assert again["made"] is False
    assert again["loss"] == about["loss"]
    twin = make(TEXTS, tmp_path / "twin", SMALL, questions=ASKED)
    assert twin["loss"] == about["loss"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "twin" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ConfigError, match="other texts, with other settings"):
        make(TEXTS, folder, replace(SMALL, seed=1), questions=ASKED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a small language model"):
        make(TEXTS, tmp_path / "full", SMALL)
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_every_sentence_is_in_a_region_and_some_regions_show_several() -> None:
    """With sentences at right angles, what a region shows of each can be read off it."""
    said, centre = torch.eye(6), torch.full((6,), 3.0)
    shown, sizes = [], set()
    for seed in range(200):
        regions = as_regions(said + centre, centre, 0.0, np.random.default_rng(seed))
        share = (regions - centre) @ said.T
        assert 3 <= len(regions) <= 9
        assert (share.max(0).values > 0).all()
        lengths = share.norm(dim=1)
        assert (((lengths - 1).abs() < 1e-5) | (lengths < 1e-5)).all()
        sizes.add(len(regions))
        shown += (share > 0).sum(1).tolist()
    assert sizes == set(range(3, 10))
    assert {0, 1, 2, 3} <= set(shown)


def test_noise_is_measured_in_what_tells_sentences_apart() -> None:
    said, centre = torch.eye(64) * 5, torch.zeros(64)
    spread = []
    for seed in range(100):
        one, other = (
            as_regions(said, centre, noise, np.random.default_rng(seed)) for noise in (0.0, 2.0)
        )
        spread.append(float((other - one).std() / said.std(correction=0)))
    assert 0 <= min(spread) < 0.2
    assert 1.8 < max(spread) < 2.1


def test_sentences_are_turned_to_where_their_words_are() -> None:
    """Vectors of texts that are a rotation of the words' means, moved and shrunk, come back."""
    tokenizer = train_bpe(TEXTS, vocab_size=320)
    prompter = Prompter(tokenizer, "qwen3")
    every = sorted({sentence for text in TEXTS for sentence in split_sentences(text)})
    table = torch.nn.Embedding(len(tokenizer), 16)
    llm: Any = SimpleNamespace(get_input_embeddings=lambda: table)
    with torch.no_grad():
        words = torch.stack([table(torch.tensor(prompter.text_ids(t))).mean(0) for t in every])
    turn = torch.linalg.qr(torch.randn(24, 16, generator=torch.Generator().manual_seed(0))).Q
    found, centre = turned_to_words(llm, prompter, every, 0.1 * words @ turn.T - 7)
    assert list(found) == every
    torch.testing.assert_close(torch.stack(list(found.values())), words, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(centre, words.mean(0), atol=1e-4, rtol=1e-4)


def test_examples_that_were_drawn_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed descriptions are new in every epoch: what is kept of them must not grow with steps."""
    monkeypatch.setattr(small_lessons, "_KEPT", 8)
    texts = [f"Gland {chr(97 + n)} is seen. Duct {chr(97 + n)} is wide." for n in range(12)]
    tokenizer = train_bpe(texts, vocab_size=320)
    table = torch.nn.Embedding(len(tokenizer), 16)
    llm: Any = SimpleNamespace(get_input_embeddings=lambda: table)
    lessons = Lessons(
        llm, Prompter(tokenizer, "qwen3"), texts=texts, asked=[[] for _ in texts], vision=None,
        turns=1, mixed=2, noise=1.0, longest=512,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    gc.collect()
    before = sum(type(held) is Example for held in gc.get_objects())
    drawn = [len(lessons.rows(text, rng)) for _ in range(4) for text in range(12)]
    gc.collect()
    after = sum(type(held) is Example for held in gc.get_objects())
    assert sum(drawn) == 4 * 12 * 3
    assert after - before <= 8


def test_a_model_that_reads_a_slide_model_is_another_than_one_that_does_not(tmp_path: Path) -> None:
    about = make(TEXTS, tmp_path / "llm", SMALL, questions=ASKED, vision=tiny())
    assert about["made"]
    assert not make(TEXTS, tmp_path / "llm", SMALL, questions=ASKED, vision=tiny())["made"]
    with pytest.raises(ConfigError, match="other texts"):
        make(TEXTS, tmp_path / "llm", SMALL, questions=ASKED)


def test_sentences_that_end_with_their_line_stay_sentences() -> None:
    """Captions of synoptic reports as tuning has them: denials left out, the rest sorted."""
    own = ["Size 3 cm", "No necrosis", "FINAL DIAGNOSIS", "Invasive carcinoma"]
    (example,) = lesson(own, (), 0, np.random.default_rng(0))
    assert example == caption_example("\n".join(reversed(own)), "affirmed")
    assert example.answer == "FINAL DIAGNOSIS Invasive carcinoma Size 3 cm"


@pytest.mark.parametrize("texts", [[*TEXTS, "---"], [*TEXTS, "", " \n"]])
def test_texts_without_a_sentence_are_left_out(tmp_path: Path, texts: list[str]) -> None:
    config = replace(SMALL, batch_size=1, epochs=1)
    about = make(texts, tmp_path / "llm", config, questions=None)
    assert about["texts"] == about["steps"] == len(TEXTS)


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 different texts"):
        make(["Same."] * 9, tmp_path / "llm", SMALL)
    assert not (tmp_path / "llm").exists()


def test_it_learns(tmp_path: Path) -> None:
    few = replace(SMALL, epochs=8, lr=1e-2)
    found = make(TEXTS, tmp_path / "llm", few)
    assert found["loss"] < 4.5  # ln(320) = 5.8 at first


@pytest.mark.parametrize("vision", [False, True])
def test_two_cores_learn_what_one_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vision: bool
) -> None:
    """Halves of a batch on two cores add up to the batch: weights are the same up to rounding."""
    monkeypatch.setattr(small_llm, "product_dtype", lambda: torch.float32)
    read = tiny() if vision else None
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        make(TEXTS, tmp_path / str(cores), SMALL, questions=ASKED, vision=read)
        found.append(load_file(tmp_path / str(cores) / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, atol=2e-4, rtol=0)


def test_caller_s_random_numbers_are_its_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    make(TEXTS, tmp_path / "llm", replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(3), wanted)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="layers is 0"):
        SmallLLMConfig(layers=0)
    with pytest.raises(ConfigError, match="kv_heads"):
        SmallLLMConfig(heads=4, kv_heads=3)
    with pytest.raises(ConfigError, match="noise"):
        SmallLLMConfig(noise=-0.1)
    with pytest.raises(ConfigError, match="mixed"):
        SmallLLMConfig(mixed=-1)
