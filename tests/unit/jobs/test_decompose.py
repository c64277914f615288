"""Statements of a language model about a caption are kept only where the caption says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.decompose import decompose, grounded
from pathflip.errors import CheckpointError
from tests.archives import make_archive
from tests.hub import put_in_cache

SENTENCES = [
    "Sections show colonic mucosa.",
    "Pools of extracellular mucin are identified in the submucosa.",
    "No necrosis is identified.",
    "The specimen measures 2.5 x 1.8 cm.",
]


def line(text: Any, number: Any) -> str:
    return json.dumps({"visual_description": text, "source_sentence": number})


GOOD = line("Extracellular mucin pools in the submucosa", 2)


def test_what_the_caption_says_is_kept_in_order() -> None:
    said = "\n".join(["```json", GOOD + ",", "", line("Colonic  mucosa.", 1), "```"])
    kept, dropped = grounded(said, SENTENCES)
    assert kept == ["Extracellular mucin pools in the submucosa", "Colonic mucosa."]
    assert not dropped


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("Here are the statements:", "not_json"),
        ('{"visual_description": "Colonic mucosa"', "not_json"),
        ('{"visual_description": "Colonic mucosa"}', "not_json"),
        ("[1]", "not_json"),
        ("3", "not_json"),
        ("null", "not_json"),
        ("[" * 100_000, "not_json"),
        (line(7, 1), "not_json"),
        (line("Colonic mucosa", "1"), "not_json"),
        (line("Colonic mucosa", True), "not_json"),
        (line("Colonic mucosa", 1.0), "not_json"),
        (line("Colonic mucosa", 0), "no_source"),
        (line("Colonic mucosa", -1), "no_source"),
        (line("Colonic mucosa", 5), "no_source"),
        (line("Invasive carcinoma with lymphovascular invasion", 2), "not_grounded"),
        (line("Colonic mucosa", 2), "not_grounded"),
        (line("", 1), "not_grounded"),
        (line("The is of", 1), "not_grounded"),
        (line("Mucin with necrosis, keratin and calcification", 2), "not_grounded"),
        (line("Necrosis is present", 3), "denial"),
        (line("No extracellular mucin pools are identified", 2), "denial"),
        (line("extracellular mucin pools", 2), None),
        (line("No necrosis", 3), None),
    ],
)
def test_what_it_does_not_say_is_dropped_and_counted(bad: str, reason: str | None) -> None:
    kept, dropped = grounded(f"{bad}\n{GOOD}", SENTENCES)
    assert len(kept) == (2 if reason is None else 1)
    assert dict(dropped) == ({} if reason is None else {reason: 1})


def test_six_words_of_ten_are_enough_and_five_of_nine_are_not() -> None:
    sentence = ["alpha beta gamma delta epsilon zeta"]
    six = "alpha beta gamma delta epsilon zeta one two three four"
    assert grounded(line(six, 1), sentence)[0] == [six]
    five = "alpha beta gamma delta epsilon one two three four"
    assert grounded(line(five, 1), sentence)[1]["not_grounded"] == 1


def test_the_same_statement_twice_is_there_once() -> None:
    kept, dropped = grounded(f"{GOOD}\n{GOOD}\n{GOOD}", SENTENCES)
    assert len(kept) == 1
    assert dropped["duplicate"] == 2


def test_a_caption_that_did_not_fit_the_model() -> None:
    assert grounded(None, SENTENCES) == ([], {"too_long": 1})
    assert grounded("", SENTENCES) == ([], {})


def test_a_model_of_the_hubs_cache_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chat = tmp_path / "chat"
    chat.mkdir()
    (chat / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 64}')
    (chat / "model.safetensors").write_bytes(b"weights")
    put_in_cache(tmp_path / "cache", "owner/chat", chat)
    uri = str(make_archive(tmp_path / "archive", slides=3))
    found = [decompose(uri, one, dry_run=True) for one in ("owner/chat", str(chat))]
    assert found[0].model == found[1].model
    assert found[0].model.startswith("chat_")
    with pytest.raises(CheckpointError, match="hub lookup failed"):
        decompose(uri, "owner/other", dry_run=True)
