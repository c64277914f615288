"""The batch of captions and answers before any engine starts: its settings and its requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.batch_vllm import AnswerConfig, check_settings, key_of
from pathflip.errors import CheckpointError, ConfigError
from pathflip.vllm_engine import EngineConfig


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return tmp_path


def test_a_gpu_is_looked_for_where_the_job_runs(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wanted = EngineConfig(device="cuda")
    with pytest.raises(ConfigError) as refused:
        check_settings(llm, wanted, address=None)
    assert refused.value.code == "no_gpu"
    check_settings(llm, wanted, address="ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_settings(llm, wanted, address=None)


def test_what_does_not_go_with_the_model_is_refused_anywhere(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="512"):
        check_settings(llm, EngineConfig(max_model_len=513), address="auto")
    with pytest.raises(CheckpointError):
        check_settings(tmp_path / "none", EngineConfig(), address="auto")


@pytest.mark.parametrize("name", ["actors", "slides_at_once", "max_new_tokens", "permute"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        AnswerConfig(**{name: 0})


def test_the_key_of_a_line_is_that_of_its_request() -> None:
    request = {"question": "Which?", "choices": ["a", "b"]}
    line = {"slide_id": "s", "model": "m", **request, "answer": "a", "choice": "A", "scores": {}}
    assert key_of("s", request) == key_of("s", json.loads(json.dumps(line)))
    assert key_of("s", {}) == key_of("s", {"caption": "c"})
    others = [request | {"choices": ["b", "a"]}, request | {"choices": []}, {}]
    assert len({key_of("s", one) for one in [request, *others]}) == 4
