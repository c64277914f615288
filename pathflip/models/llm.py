"""Base language model: loading a ``transformers`` folder, and its ``peft`` adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pathflip.errors import CheckpointError, ConfigError
from pathflip.models.prompt_encoder import InstructConfig

LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


_LONG_BYTES = 1 << 30
"""Bytes of weights that take more than a second or two to load."""


def fingerprint_of(folder: Path) -> str:
    """Return hex SHA-256 of a language model's config.json, weights and tokenizer.json.

    Raises:
        CheckpointError: It has no weights in safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(
            f"{folder} holds no *.safetensors.",
            hint="Give the folder of a language model, e.g. one of pathflip make-llm.",
        )
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weights, folder / "tokenizer.json"):
        if path.exists():
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {own}\n".encode())
    return digest.hexdigest()


def load_llm(folder: Path) -> Any:
    """Load a causal language model in float32 (safetensors only).

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    try:
        with shown_if_long(sum(path.stat().st_size for path in folder.glob("*.safetensors"))):
            return AutoModelForCausalLM.from_pretrained(
                str(folder), use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # safetensors and transformers raise many kinds on damaged files
        raise CheckpointError(
            f"The language model {folder} cannot be loaded: {str(error).splitlines()[0]}",
            hint="It needs config.json, *.safetensors and the tokenizer's files of a Qwen3.",
            code="llm",
        ) from error


@contextmanager
def shown_if_long(size: int) -> Iterator[None]:
    """Keep ``transformers`` from drawing a bar for weights that load or save in a moment.

    Args:
        size: Bytes of the weights.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # it has no types
    if size >= _LONG_BYTES or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def compile_layers(causal: Any) -> None:
    """Compile a language model's layers when they first run (``torch.compile``), in place.

    They are alike, so that they compile as one; names of weights stay, and hooks run outside.
    """
    for layer in causal.model.layers:
        layer.forward = torch.compile(layer.forward)


def recompute_layers(causal: Any) -> None:
    """Make a language model's layers compute their activations again in the backward pass."""
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def with_adapter(llm: Any, config: InstructConfig) -> Any:
    """Add a new LoRA adapter (B = 0, so without effect yet) to a language model's layers.

    Raises:
        ConfigError: It lacks Qwen's seven projections.
    """
    from peft import LoraConfig, get_peft_model

    about = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
    )
    try:
        return get_peft_model(llm, about)
    except ValueError as error:
        raise ConfigError(
            f"The language model cannot take an adapter: {str(error).splitlines()[0]}",
            hint="Take a Qwen3, or llm_tuning freeze or full.",
        ) from error


def read_adapter(llm: Any, folder: Path) -> Any:
    """Load a saved adapter into a language model's layers.

    Raises:
        CheckpointError: It is missing, damaged or of another model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(llm, str(folder))
    except Exception as error:  # peft and safetensors raise many kinds on damaged files
        raise CheckpointError(
            f"The adapter {folder} cannot be read: {str(error).splitlines()[0]}",
            hint="Copy it again.",
            code="damaged",
        ) from error
