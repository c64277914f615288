"""Vision-language models that describe patches: their prompts, and which answers are no captions.

vLLM runs them (:mod:`pathflip.vllm_engine`), one image a prompt. The instruction is that of
MR-PLIP's captioning script (:data:`~pathflip.interop.tree_captions.PROMPT`); what stands around it
is what a family of models was trained with.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip.errors import CheckpointError, ConfigError
from pathflip.interop.tree_captions import PROMPT
from pathflip.vllm_engine import EngineConfig, offline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)
_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATES = {
    "blip-2": "Question: {} Answer:",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>{}<end_of_turn>\n<start_of_turn>model\n",
    "idefics3": "<|begin_of_text|>User:<image>{}<end_of_utterance>\nAssistant:",
    "llava": _VICUNA,
    "llava_next": _VICUNA,
    "llava_onevision": "<|im_start|>user <image>\n{}<|im_end|><|im_start|>assistant\n",
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "smolvlm": "<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:",
}
"""{model_type: prompt around the instruction}. ``llava`` is Vicuna's, as Quilt-LLaVA has it."""
WITHOUT_TORCHVISION = frozenset({"blip-2", "idefics3", "smolvlm"})
"""Families that vLLM 0.29 imports where torchvision is not installed, as with the CPU lock."""
_REPEATED, _FEW_WORDS = 0.5, 8
_DISTINCT, _MANY_WORDS = 0.2, 40


def model_type(folder: str | Path) -> str:
    """Return the family of a vision-language model.

    Raises:
        CheckpointError: There is no model in the folder.
        ConfigError: Its family has no prompt here (``unknown_captioner``).
    """
    try:
        settings = json.loads((Path(folder) / "config.json").read_bytes())
        kind = str(settings["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"There is no vision-language model at {folder}.",
            hint="Give the folder of one in transformers' format, with its config.json.",
            code="missing",
        ) from error
    if kind not in TEMPLATES:
        raise ConfigError(
            f"The model at {folder} is a {kind}, for which no prompt is known.",
            hint=f"Known are {', '.join(sorted(TEMPLATES))}. Captions of any other program come in "
            "by: pathflip trees export, then pathflip archive import --tree-captions.",
            code="unknown_captioner",
        )
    return kind


def check_torchvision(folder: str | Path) -> None:
    """Refuse a model whose code needs torchvision where it is not installed.

    Raises:
        CheckpointError, ConfigError: See :func:`model_type`; ``no_torchvision``.
    """
    kind = model_type(folder)
    if kind not in WITHOUT_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            f"Models of the family {kind} need torchvision, which the lock for CPUs leaves out.",
            hint="Run it on a machine set up with the lock for GPUs (docs/howto/install.md), or "
            f"caption with one of these: {', '.join(sorted(WITHOUT_TORCHVISION))}.",
            code="no_torchvision",
        )


class Captioner:
    """Vision-language model in a vLLM engine of this process.

    Args:
        folder: The model, in transformers' format.
        config: Settings of the engine.
        max_new_tokens: Tokens of a caption at most.

    Raises:
        CheckpointError: There is no model in the folder.
        ConfigError: vLLM cannot run it here: see :func:`check_torchvision` and
            :func:`pathflip.vllm_engine.offline`.
    """

    def __init__(
        self, folder: str | Path, config: EngineConfig | None = None, *, max_new_tokens: int = 1024
    ) -> None:
        check_torchvision(folder)
        self._prompt = TEMPLATES[model_type(folder)].format(PROMPT)
        self._max_new_tokens = max_new_tokens
        self._engine = offline(folder, config, images=True)

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[str]:
        """Return what the model says to images [h, w, 3], all of them in the engine together."""
        from PIL import Image
        from vllm import SamplingParams

        prompts: list[Any] = [
            {"prompt": self._prompt, "multi_modal_data": {"image": Image.fromarray(image)}}
            for image in images
        ]
        params = SamplingParams(temperature=0.0, max_tokens=self._max_new_tokens)
        outputs = self._engine.generate(prompts, params, use_tqdm=False) if prompts else []
        return [output.outputs[0].text.strip() for output in outputs]


def why_no_caption(text: str) -> str | None:
    """Return why an answer is no caption; None if it may be one.

    Returns:
        ``empty``: there is no letter in it. ``not_text``: less than two thirds of it are letters
        and spaces, or characters could not be decoded. ``repeated``: one word is over half of eight
        words or more, or less than a fifth of forty words or more are different.
    """
    if not any(char.isalpha() for char in text):
        return "empty"
    written = sum(char.isalpha() or char.isspace() for char in text)
    if 3 * written < 2 * len(text) or "\ufffd" in text:
        return "not_text"
    words = text.lower().split()
    most = Counter(words).most_common(1)[0][1]
    if len(words) >= _FEW_WORDS and most > _REPEATED * len(words):
        return "repeated"
    if len(words) >= _MANY_WORDS and len(set(words)) < _DISTINCT * len(words):
        return "repeated"
    return None
