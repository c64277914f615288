"""Settings of vLLM, without vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pathflip.errors import CheckpointError, ConfigError
from pathflip.vllm_engine import (
    EngineConfig,
    engine_arguments,
    engine_environment,
    offline,
    set_environment,
    uses_gpu,
)


def folder(path: Path, **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    about = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 4096} | settings
    (path / "config.json").write_text(json.dumps(about))
    return path


def test_arguments_on_a_cpu(tmp_path: Path) -> None:
    found = engine_arguments(folder(tmp_path / "llm"), EngineConfig(device="cpu", max_num_seqs=3))
    assert found["dtype"] == "float32"
    assert found["enforce_eager"]
    assert found["enable_prompt_embeds"]
    assert found["max_num_seqs"] == 3
    assert found["max_model_len"] == 2048
    assert "gpu_memory_utilization" not in found
    assert engine_arguments(tmp_path / "llm", EngineConfig(device="cpu"))["max_num_seqs"] == 32


def test_no_more_blocks_on_a_cpu_than_can_be_filled(tmp_path: Path) -> None:
    size = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    small = folder(tmp_path / "small", **size)
    config = EngineConfig(device="cpu", max_num_seqs=3, max_model_len=200)
    found = engine_arguments(small, config)
    # 3 sequences of 200 tokens take 2 blocks of 128 each; twice that.
    assert (found["block_size"], found["num_gpu_blocks_override"]) == (128, 12)
    # 2 (keys, values) x 28 x 8 x 128 x 4 bytes a token: 32 of 2,048 do not fit twice in a GiB.
    qwen = {"num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128}
    large = folder(tmp_path / "large", **qwen)
    assert "num_gpu_blocks_override" not in engine_arguments(large, EngineConfig(device="cpu"))
    assert "block_size" not in engine_arguments(folder(tmp_path / "unsaid"), config)


def test_context_is_the_models_where_that_is_less(tmp_path: Path) -> None:
    small = folder(tmp_path / "llm", max_position_embeddings=512)
    assert engine_arguments(small)["max_model_len"] == 512
    assert engine_arguments(small, EngineConfig(max_model_len=300))["max_model_len"] == 300
    with pytest.raises(ConfigError, match=r"max_model_len is 1,024.* 512 tokens"):
        engine_arguments(small, EngineConfig(max_model_len=1024))


def test_a_folder_that_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no language model") as missing:
        engine_arguments(tmp_path / "nothing")
    assert missing.value.code == "missing"
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError) as damaged:
        offline(tmp_path)
    assert damaged.value.code == "damaged"
    assert "vllm" not in sys.modules, "the engine must be refused before vllm is imported"


def test_a_gpu_that_is_not_there() -> None:
    import torch

    if torch.cuda.is_available():
        assert uses_gpu(EngineConfig(device="cuda"))
        return
    assert not uses_gpu(EngineConfig())
    with pytest.raises(ConfigError) as refused:
        uses_gpu(EngineConfig(device="cuda"))
    assert refused.value.code == "no_gpu"


def test_environment_keeps_what_the_user_set() -> None:
    with mock.patch.dict(os.environ):
        for name in engine_environment():
            os.environ.pop(name, None)
        os.environ |= {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "7"}
        set_environment(EngineConfig(device="cpu", threads=2, kv_gib=3))
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ["OMP_NUM_THREADS"] == "2"
        assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        os.environ["TORCHDYNAMO_DISABLE"] = "0"
        set_environment(EngineConfig(device="cpu"))
        assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


def test_only_a_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for there in (False, True):
        with mock.patch.dict(os.environ), monkeypatch.context() as patch:
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
            patch.setattr(torch.cuda, "is_available", lambda there=there: there)
            set_environment(EngineConfig())
            assert ("TORCHDYNAMO_DISABLE" in os.environ) is not there


def test_importing_the_module_does_not_import_vllm() -> None:
    code = "import sys, pathflip.vllm_engine; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
