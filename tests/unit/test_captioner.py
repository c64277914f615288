"""Captioners: prompts by family, what needs torchvision, and answers that are no captions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pathflip.captioner import (
    TEMPLATES,
    WITHOUT_TORCHVISION,
    check_torchvision,
    model_type,
    why_no_caption,
)
from pathflip.errors import CheckpointError, ConfigError
from pathflip.interop.tree_captions import PROMPT


def folder(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_prompt_of_quilt_llava_is_that_of_its_script() -> None:
    assert PROMPT == "Can you describe the main features visible in this histopathology image?"
    prompt = TEMPLATES["llava"].format(PROMPT)
    assert prompt.startswith("A chat between a curious user and an artificial intelligence")
    assert prompt.endswith(f"USER: <image>\n{PROMPT} ASSISTANT:")
    for kind, template in TEMPLATES.items():
        assert template.count("{}") == 1, kind
        assert ("image" in template) == (kind != "blip-2"), "BLIP-2 puts its image in front"


def test_families(tmp_path: Path) -> None:
    assert model_type(folder(tmp_path, model_type="llava")) == "llava"
    with pytest.raises(ConfigError, match="is a bert, for which no prompt") as error:
        model_type(folder(tmp_path, model_type="bert"))
    assert error.value.code == "unknown_captioner"
    for wrong in ({}, {"model_type": []}):
        with pytest.raises((CheckpointError, ConfigError)):
            model_type(folder(tmp_path, **wrong))
    with pytest.raises(CheckpointError, match="no vision-language model"):
        model_type(tmp_path / "none")


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_models_that_need_torchvision_are_refused_without_it(tmp_path: Path, kind: str) -> None:
    there = importlib.util.find_spec("torchvision") is not None
    folder(tmp_path, model_type=kind)
    if there or kind in WITHOUT_TORCHVISION:
        check_torchvision(tmp_path)
        return
    with pytest.raises(ConfigError, match=f"family {kind} need torchvision") as error:
        check_torchvision(tmp_path)
    assert error.value.code == "no_torchvision"
    assert "lock for GPUs" in str(error.value.hint)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Nests of cells with grooved nuclei.", None),
        ("Necrosis.", None),
        ("H&E stain at 40x shows 3 mitoses in 10 HPF (2.5 mm).", None),
        ("the the the cells the nuclei the stroma the", "repeated"),
        ("the the the", None),
        ("The image shows a gland. " * 12, "repeated"),
        ("", "empty"),
        (" 12 ... !? \n", "empty"),
        ("a) 12:33 [[[ 5 ]]] ### 9", "not_text"),
        ("nuclei \ufffd\ufffd are seen", "not_text"),
        ("核が大きい細胞", None),
    ],
)
def test_answers_that_are_no_captions(text: str, reason: str | None) -> None:
    assert why_no_caption(text) == reason


def test_a_long_caption_of_many_words_is_one() -> None:
    words = " ".join(f"word{n % 37}" for n in range(150))
    assert why_no_caption(words.replace("0", "o").replace("1", "l")) is None
