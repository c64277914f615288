"""The text tower: a BERT-family encoder, or a small BERT from scratch.

A BERT is run on packed texts (:mod:`pathflip.models.packing`) with the weights of its
``transformers`` module; other families run as they are, on texts grouped by length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pathflip.errors import CheckpointError
from pathflip.models.config import PathFLIPConfig
from pathflip.models.packing import Packed
from pathflip.models.qformer import feed_forward


class TextTower(nn.Module):
    """BERT-family encoder of packed texts; see :func:`build_tower` for its weights.

    Args:
        bert: A ``transformers`` encoder.
        recompute: Whether GELU outputs of a BERT are recomputed for the gradient; see
            :func:`pathflip.models.qformer.feed_forward`.
    """

    def __init__(self, bert: Any, *, recompute: bool = False) -> None:
        super().__init__()
        self.bert = bert
        self.recompute = recompute
        if getattr(bert, "pooler", None) is not None:
            bert.pooler = None  # not used: it would be a parameter without a gradient
        self._packs = bert.config.model_type == "bert" and bert.config.hidden_act == "gelu"

    @property
    def width(self) -> int:
        """Width of the states."""
        return int(self.bert.config.hidden_size)

    @property
    def max_positions(self) -> int:
        """Maximum length of a text, in tokens."""
        about = self.bert.config
        most = int(getattr(about, "max_position_embeddings", 512))
        # The RoBERTas count positions from behind the padding's.
        return most - about.pad_token_id - 1 if "roberta" in about.model_type else most

    def forward(self, packed: Packed, *, pooling: str) -> Tensor:
        """Encode packed texts.

        Args:
            packed: Texts.
            pooling: ``cls`` or ``mean``.

        Returns:
            One state for each distinct text [n, H].
        """
        if self._packs:
            return self._packed(packed, pooling)
        states = self._grouped(packed)
        return states[packed.first] if pooling == "cls" else packed.mean(states)

    def _packed(self, packed: Packed, pooling: str) -> Tensor:
        embed = self.bert.embeddings
        x = embed.word_embeddings(packed.ids) + embed.position_embeddings(packed.positions)
        x = embed.dropout(embed.LayerNorm(x + embed.token_type_embeddings.weight[0]))
        layers = self.bert.encoder.layer
        for number, layer in enumerate(layers):
            # Of the last layer, first tokens are all that is asked for.
            first = pooling == "cls" and number == len(layers) - 1
            own, out = layer.attention.self, layer.attention.output
            asking = x[packed.first] if first else x
            seen = packed.attend(
                own.query(asking),
                own.key(x),
                own.value(x),
                heads=own.num_attention_heads,
                dropout=own.dropout.p if self.training else 0.0,
                first=first,
            )
            x = out.LayerNorm(out.dropout(out.dense(seen)) + asking)
            up, end = layer.intermediate.dense, layer.output
            inner = feed_forward(x, up, end.dense, recompute=self.recompute)
            x = end.LayerNorm(end.dropout(inner) + x)
        return x if pooling == "cls" else packed.mean(x)

    def _grouped(self, packed: Packed) -> Tensor:
        found = []
        ones = torch.ones_like(packed.ids)
        for ids, mask in zip(packed.padded(packed.ids), packed.padded(ones), strict=True):
            found.append(self.bert(input_ids=ids, attention_mask=mask)[0])
        return packed.unpadded(found)


def build_tower(
    config: PathFLIPConfig, *, vocab_size: int, text_config: dict[str, Any] | None
) -> TextTower:
    """Build the tower of a configuration.

    Args:
        config: Configuration of the model.
        vocab_size: Number of tokens of its tokenizer.
        text_config: Configuration of the ``transformers`` model, where its weights come later;
            None: they come from ``config.text_model``, or are drawn.
    """
    from transformers import AutoConfig, BertConfig

    auto, bert = _classes()

    if text_config is not None:
        kind = dict(text_config)
        about = AutoConfig.for_model(kind.pop("model_type"), **kind)
        return TextTower(auto.from_config(about), recompute=config.recompute)
    if config.text_model is not None:
        return TextTower(load_text_model(config.text_model), recompute=config.recompute)
    small = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.text_hidden,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_ffn,
        max_position_embeddings=config.max_text_tokens,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        type_vocab_size=1,
    )
    return TextTower(bert(small, add_pooling_layer=False), recompute=config.recompute)


def _classes() -> tuple[Any, Any]:
    from transformers import AutoModel, BertModel

    return AutoModel, BertModel


def load_text_model(source: str) -> Any:
    """Load a ``transformers`` encoder from the hub or a folder (safetensors only).

    Raises:
        CheckpointError: It cannot be had.
    """
    auto, _ = _classes()
    try:
        return auto.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _no_text_model(source, error) from error


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model on the hub or of a folder.

    Raises:
        CheckpointError: It cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_text_model(source, error) from error


def _no_text_model(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The text model {source} cannot be loaded: {str(error).splitlines()[0]}",
        hint="Give model.text_model a folder with config.json, model.safetensors and the "
        "tokenizer's files, or null for a small one trained from scratch.",
        code="text_model",
    )
