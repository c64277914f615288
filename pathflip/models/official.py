"""Conversion of the published code's weights to our names.

A published checkpoint is a pickle, which may run anything when it is read. Whoever has one turns
it into safetensors once (docs/concepts/models.md) and gives its tensors to
:func:`load_official_v1`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pathflip.errors import CheckpointError
from pathflip.models.pathflip import PathFLIP

logger = logging.getLogger(__name__)

_BERT = r"Qformer\.bert\."
_LAYER = _BERT + r"encoder\.layer\.(\d+)\."
NAMES: tuple[tuple[str, str], ...] = (
    (r"path_encoder\.(\w+)", r"patch_in.\1"),
    (r"query_tokens", r"queries"),
    (_BERT + r"embeddings\.LayerNorm\.(\w+)", r"qformer.norm.\1"),
    (_BERT + r"embeddings\.word_embeddings\.weight", r"qformer.words.weight"),
    (_BERT + r"embeddings\.position_embeddings\.weight", r"qformer.positions.weight"),
    (_LAYER + r"attention\.self\.(\w+)\.(\w+)", r"qformer.layers.\1.attention.\2.\3"),
    (_LAYER + r"attention\.output\.dense\.(\w+)", r"qformer.layers.\1.attention.out.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(\w+)", r"qformer.layers.\1.attention.norm.\2"),
    (_LAYER + r"crossattention\.self\.(\w+)\.(\w+)", r"qformer.layers.\1.cross.\2.\3"),
    (_LAYER + r"crossattention\.output\.dense\.(\w+)", r"qformer.layers.\1.cross.out.\2"),
    (_LAYER + r"crossattention\.output\.LayerNorm\.(\w+)", r"qformer.layers.\1.cross.norm.\2"),
    (_LAYER + r"intermediate_query\.dense\.(\w+)", r"qformer.layers.\1.ffn_query.up.\2"),
    (_LAYER + r"output_query\.dense\.(\w+)", r"qformer.layers.\1.ffn_query.down.\2"),
    (_LAYER + r"output_query\.LayerNorm\.(\w+)", r"qformer.layers.\1.ffn_query.norm.\2"),
    (_LAYER + r"intermediate\.dense\.(\w+)", r"qformer.layers.\1.ffn_text.up.\2"),
    (_LAYER + r"output\.dense\.(\w+)", r"qformer.layers.\1.ffn_text.down.\2"),
    (_LAYER + r"output\.LayerNorm\.(\w+)", r"qformer.layers.\1.ffn_text.norm.\2"),
    (r"path_proj\.(\w+)", r"token_out.\1"),
    (r"text_proj\.(\w+)", r"text_out.\1"),
    (r"path_trans\.(.+)", r"context.\1"),
    (r"fg_head\.attn\.(.+)", r"region_attention.attention.\1"),
    (r"fg_head\.w_q\.(\w+)", r"region_attention.query.\1"),
    (r"fg_head\.w_k\.(\w+)", r"region_attention.key.\1"),
    (r"fg_head\.w_v\.(\w+)", r"region_attention.value.\1"),
    (r"logit_scale", r"region_scale"),
)
"""Published name -> ours."""
_NOT_NEEDED = re.compile(
    # The language-model head is never used; the bias of a key never reaches a softmax.
    r"Qformer\.cls\..+|.+\.position_ids|.+\.crossattention\.self\.key\.bias"
)

_PREFIX = re.compile(r"(?:_forward_module\.|module\.|model\.|pathflip_align\.)+")
"""Before the names: the trainer's own, those of what it wraps a model in, and the model's."""
_INSIDE = ("state_dict", "module", "model")
"""Names under which a checkpoint keeps its tensors, beside the trainer's state."""


def load_official_v1(model: PathFLIP, tensors: Mapping[str, Any]) -> list[str]:
    """Fill a model of preset ``pathflip/official_v1`` with published weights.

    Args:
        model: Model with the tokenizer of the published weights (BioBERT's with ``[DEC]`` added).
        tensors: Published names and tensors, by themselves or under ``state_dict`` of a checkpoint;
            ``pathflip_align.``, ``_forward_module.``, ``module.`` and ``model.`` before a name are
            dropped.

    Returns:
        Names that were not needed, which are logged too: the language-model head of the Q-Former
        and what softmax makes void.

    Raises:
        CheckpointError: A tensor is missing, unknown, given twice or of another shape; or the
            weights are those of the published code's second stage.
    """
    for inside in _INSIDE:
        if isinstance(tensors.get(inside), Mapping):
            tensors = tensors[inside]
    found: dict[str, Tensor] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for name, value in tensors.items():
        plain = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
        if plain.startswith("pathflip_finetune."):
            raise CheckpointError(
                f"The published weights are of the second stage, tuning of the language model "
                f"({name}), which has no attention of texts to regions.",
                hint="Load the checkpoint of the alignment: its names begin with pathflip_align.",
            )
        if _NOT_NEEDED.fullmatch(plain):
            ignored.append(name)
            continue
        ours = next(
            (re.sub(old, new, plain) for old, new in NAMES if re.fullmatch(old, plain)), None
        )
        if ours is None or not isinstance(value, Tensor):
            unknown.append(name)
        elif ours in found:
            raise CheckpointError(
                f"The published weights have {plain} twice, once as {name}.",
                hint="Give the tensors of one model.",
            )
        else:
            found[ours] = value.squeeze(0) if ours == "queries" and value.ndim == 3 else value
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"The published weights have {', '.join(unknown[:5])}{more}, which "
            "pathflip/official_v1 does not have.",
            hint="Were they trained with other options?",
        )
    wanted = model.state_dict()
    for name, value in wanted.items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(value.shape):
            what = "missing" if shape is None else f"{shape}, not {tuple(value.shape)}"
            raise CheckpointError(
                f"In the published weights {name} is {what}.",
                hint="Sizes, layers and tokenizer must be those the weights were trained with.",
            )
    if surplus := sorted(set(found) - set(wanted)):
        raise CheckpointError(
            f"The published weights have {', '.join(surplus[:5])} (our names), which this model "
            "does not have.",
            hint="Build it with the number of layers the weights were trained with.",
        )
    model.load_state_dict({name: found[name] for name in wanted})
    if ignored:
        logger.info("Of the published weights %s are not needed.", ", ".join(ignored))
    return ignored
