"""A BERT whose weights come from a file: its layers alone, under the names of ``transformers``.

:mod:`pathflip.models.text_tower` runs these layers on packed texts by itself, so a model that is
loaded needs nothing else of ``transformers``, whose import takes two CPU seconds. A BERT that is
drawn, or taken from the hub, is built by ``transformers``; both have the same state dict.

Shapes: H width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
"""Settings of a BERT that its configuration may leave out, with the values ``transformers`` gives
them."""


def runs_packed(text_config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of a BERT whose layers run on packed texts."""
    kind = text_config["model_type"], text_config.get("hidden_act", DEFAULTS["hidden_act"])
    return kind == ("bert", "gelu")


class Bert(nn.Module):
    """Embeddings and layers of a BERT, their weights still to be loaded.

    Args:
        text_config: Configuration as ``transformers`` writes it.
    """

    def __init__(self, text_config: Mapping[str, Any]) -> None:
        super().__init__()
        given = DEFAULTS | dict(text_config)
        self.text_config = dict(text_config)
        self.config = SimpleNamespace(**given)
        width, eps = int(given["hidden_size"]), float(given["layer_norm_eps"])
        self.embeddings = _named(
            word_embeddings=_Embedding(
                given["vocab_size"], width, padding_idx=given["pad_token_id"]
            ),
            position_embeddings=_Embedding(given["max_position_embeddings"], width),
            token_type_embeddings=_Embedding(given["type_vocab_size"], width),
            LayerNorm=nn.LayerNorm(width, eps=eps),
            dropout=nn.Dropout(given["hidden_dropout_prob"]),
        )
        layers = (_layer(given, width, eps) for _ in range(given["num_hidden_layers"]))
        self.encoder = _named(layer=nn.ModuleList(layers))

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings [vocabulary, H]."""
        words: nn.Module = self.embeddings.get_submodule("word_embeddings")
        return words


class _Linear(nn.Linear):
    """Linear layer whose weights are loaded: none are drawn that would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class _Embedding(nn.Embedding):
    """Embedding table whose weights are loaded: none are drawn that would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def _layer(given: Mapping[str, Any], width: int, eps: float) -> Any:
    inner = int(given["intermediate_size"])
    own = _named(
        query=_Linear(width, width),
        key=_Linear(width, width),
        value=_Linear(width, width),
        dropout=nn.Dropout(given["attention_probs_dropout_prob"]),
    )
    own.num_attention_heads = given["num_attention_heads"]
    dropout = given["hidden_dropout_prob"]
    return _named(
        attention=_named(self=own, output=_output(width, width, eps, dropout)),
        intermediate=_named(dense=_Linear(width, inner)),
        output=_output(inner, width, eps, dropout),
    )


def _output(width: int, out: int, eps: float, dropout: float) -> Any:
    return _named(
        dense=_Linear(width, out),
        LayerNorm=nn.LayerNorm(out, eps=eps),
        dropout=nn.Dropout(dropout),
    )


def _named(**modules: nn.Module) -> Any:
    group = nn.Module()
    for name, module in modules.items():
        group.add_module(name, module)
    return group
