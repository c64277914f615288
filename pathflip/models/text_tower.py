"""The text tower: a BERT-family encoder, or a small BERT from scratch.

A BERT is run on packed texts (:mod:`pathflip.models.packing`) with the weights of its
``transformers`` module; other families run as they are, on texts grouped by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from pathflip.errors import CheckpointError, ConfigError
from pathflip.models.bert import Bert, runs_packed
from pathflip.models.config import TextConfig
from pathflip.models.packing import Packed, pack
from pathflip.models.qformer import feed_forward
from pathflip.packaged import text_model

REMEMBERED = 65_536
"""Texts whose vector a frozen tower keeps: 200 MB at a width of 768."""


class TextTower(nn.Module):
    """BERT-family encoder of packed texts; see :func:`build_tower` for its weights.

    Args:
        bert: A ``transformers`` encoder, or a :class:`~pathflip.models.bert.Bert`.
        recompute: Whether GELU outputs of a BERT are recomputed for the gradient; see
            :func:`pathflip.models.qformer.feed_forward`.
    """

    def __init__(self, bert: Any, *, recompute: bool = False) -> None:
        super().__init__()
        self.bert = bert
        self.recompute = recompute
        self._known: dict[tuple[int, ...], Tensor] | None = None
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

    def text_config(self) -> dict[str, Any]:
        """Return the configuration to build the tower from; see :func:`build_tower`."""
        if isinstance(self.bert, Bert):
            return dict(self.bert.text_config)
        kept: dict[str, Any] = self.bert.config.to_diff_dict()
        kept.pop("_name_or_path", None)
        return kept | {"model_type": self.bert.config.model_type}

    def freeze(self) -> None:
        """Keep the weights as they are: no gradient, no dropout, and a text is encoded once."""
        self.requires_grad_(False)
        self._known = {}
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as of any module; a frozen tower stays in that of evaluation."""
        return super().train(mode and self._known is None)

    def forward(self, packed: Packed, *, pooling: str) -> Tensor:
        """Encode packed texts.

        Args:
            packed: Texts.
            pooling: ``cls`` or ``mean``.

        Returns:
            One state for each distinct text [n, H].
        """
        if self._known is None:
            return self._pooled(packed, pooling)
        return self._recalled(packed, pooling, self._known)

    def _pooled(self, packed: Packed, pooling: str) -> Tensor:
        if pooling == "mean":
            return packed.mean(self.states(packed))
        return (
            self._packed(packed, first=True) if self._packs else self.states(packed)[packed.first]
        )

    @torch.no_grad()
    def _recalled(
        self, packed: Packed, pooling: str, known: dict[tuple[int, ...], Tensor]
    ) -> Tensor:
        """Return the vectors of texts, computing those not met before; in fp32 on any device."""
        ids, ends = packed.ids.tolist(), [0, *accumulate(packed.lengths.tolist())]
        texts = [tuple(ids[start:end]) for start, end in pairwise(ends)]
        found = {text: known[text] for text in texts if text in known}
        if new := [text for text in texts if text not in known]:
            device = packed.ids.device
            again = pack(new, device=device)
            with torch.autocast(device.type, enabled=False):
                made = self._pooled(again, pooling)[again.inverse]
            found |= dict(zip(new, made, strict=True))
            known.update(islice(((text, found[text]) for text in new), REMEMBERED - len(known)))
        return torch.stack([found[text] for text in texts])

    def states(self, packed: Packed) -> Tensor:
        """Encode packed texts and return the states of all their tokens [T, H]."""
        return self._packed(packed, first=False) if self._packs else self._grouped(packed)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return what the layers of a BERT get of tokens at their positions [T] -> [T, H]."""
        embed = self.bert.embeddings
        x = embed.word_embeddings(ids) + embed.position_embeddings(positions)
        out: Tensor = embed.dropout(embed.LayerNorm(x + embed.token_type_embeddings.weight[0]))
        return out

    @property
    def packs(self) -> bool:
        """True for a BERT, which is run on packed texts."""
        return bool(self._packs)

    @property
    def words(self) -> nn.Parameter:
        """Word embeddings [vocabulary, H]."""
        table: nn.Parameter = self.bert.get_input_embeddings().weight
        return table

    def _packed(self, packed: Packed, *, first: bool) -> Tensor:
        """Run the layers; with ``first``, the last gives the states of first tokens alone."""
        x = self.embed(packed.ids, packed.positions)
        layers = self.bert.encoder.layer
        for number, layer in enumerate(layers):
            first_only = first and number == len(layers) - 1
            own, out = layer.attention.self, layer.attention.output
            asking = x[packed.first] if first_only else x
            seen = packed.attend(
                own.query(asking),
                own.key(x),
                own.value(x),
                heads=own.num_attention_heads,
                dropout=own.dropout.p if self.training else 0.0,
                first=first_only,
            )
            x = out.LayerNorm(out.dropout(out.dense(seen)) + asking)
            up, end = layer.intermediate.dense, layer.output
            inner = feed_forward(x, up, end.dense, recompute=self.recompute)
            x = end.LayerNorm(end.dropout(inner) + x)
        return x

    def _grouped(self, packed: Packed) -> Tensor:
        found = []
        ones = torch.ones_like(packed.ids)
        for ids, mask in zip(packed.padded(packed.ids), packed.padded(ones), strict=True):
            found.append(self.bert(input_ids=ids, attention_mask=mask)[0])
        return packed.unpadded(found)


def build_tower(
    config: TextConfig, *, vocab_size: int, text_config: dict[str, Any] | None
) -> TextTower:
    """Build the tower of a configuration.

    Args:
        config: Configuration of the model.
        vocab_size: Number of tokens of its tokenizer.
        text_config: Configuration of the ``transformers`` model, where its weights come later;
            None: they come from ``config.text_model``, or are drawn.
    """
    if text_config is not None and runs_packed(text_config):
        return TextTower(Bert(text_config), recompute=config.recompute)
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
    """Load a ``transformers`` encoder by its name, or from a folder (safetensors only).

    Args:
        source: Name of a packaged model (:mod:`pathflip.packaged`), ``owner/name`` on the hub, or a
            folder.

    Raises:
        CheckpointError: It cannot be had.
    """
    auto, _ = _classes()
    folder = text_model(source)
    try:
        return auto.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _no_text_model(source, error) from error


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a text model; see :func:`load_text_model`.

    Raises:
        CheckpointError: It cannot be had.
    """
    from transformers import AutoTokenizer

    folder = text_model(source)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_text_model(source, error) from error


def tokenizer_of(config: TextConfig, tokenizer: Any, texts: Sequence[str] | None, name: str) -> Any:
    """Return the tokenizer of a new model: the one given, its text model's, or one trained.

    Args:
        config: Configuration of the model.
        tokenizer: The one given, or None.
        texts: Captions to train one on.
        name: Name of the preset, for the error.

    Raises:
        ConfigError: Captions are needed and not given.
        CheckpointError: That of ``config.text_model`` cannot be had.
    """
    from pathflip.text import train_tokenizer

    if tokenizer is not None:
        return tokenizer
    if config.text_model is not None:
        return load_tokenizer(config.text_model)
    if not texts:
        raise ConfigError(
            f"{name} trains its tokenizer on captions, and none were given.",
            hint="Give texts or a tokenizer.",
        )
    return train_tokenizer(texts, vocab_size=config.vocab_size)


def token_ids(
    tokenizer: Any, texts: Sequence[str] | Sequence[Sequence[int]], *, most: int
) -> list[list[int]]:
    """Return token ids of texts, cut to ``most``; those already tokenised are only cut."""
    strings = [text for text in texts if isinstance(text, str)]
    if strings and len(strings) < len(texts):
        raise ValueError("texts are strings or token ids, not some of each")
    if len(strings) < len(texts):
        return [[*text][:most] for text in texts if not isinstance(text, str)]
    if not strings:
        return []
    distinct = list(dict.fromkeys(strings))
    found = tokenizer(distinct, truncation=True, max_length=most)["input_ids"]
    ids = dict(zip(distinct, found, strict=True))
    return [ids[text] for text in strings]


def by_length(
    texts: Sequence[str],
    embed: Callable[[list[str]], Tensor],
    *,
    width: int,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Embed texts some at a time, short ones together, and return them in order [n, width].

    Args:
        texts: Texts.
        embed: Function of some of them, to [m, width].
        width: Width of a vector.
        batch_size: Number of texts at a time.
        device: Device of the vectors.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), width, device=device)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found[part] = embed([texts[i] for i in part]).float()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while."""
    was = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was)


def _no_text_model(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The text model {source} cannot be loaded: {str(error).splitlines()[0]}",
        hint="Give model.text_model a folder with config.json, model.safetensors and the "
        "tokenizer's files, or null for a small one trained from scratch.",
        code="text_model",
    )
