"""Configuration of the slide model and its presets; of the text tower every model has.

Sizes: d_in patch feature width (``feature_dim``), d_e projected patch width (``patch_width``), h
width inside the Q-Former (``hidden``), d joint space of slides and texts (``d``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

from pathflip.errors import ConfigError

BIOBERT = "dmis-lab/biobert-base-cased-v1.2"
SCALE = math.log(1 / 0.07)
"""Where the scale of the region loss begins (2.659), in paper and published code."""

C = TypeVar("C", bound="TextConfig")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Settings of a text tower, part of every model's.

    Attributes:
        text_model: BERT-family model to begin from: ``minilm``, where its package is installed,
            ``owner/name`` on the hub, or a folder; None for a small BERT from scratch with a
            tokenizer trained on the captions.
        text_hidden: Width of the small BERT.
        text_layers: Number of its layers.
        text_heads: Number of its attention heads.
        text_ffn: Width inside its feed-forward blocks.
        vocab_size: Maximum number of entries of its tokenizer.
        text_pooling: Vector of a text: its first token's state, or the mean over its tokens.
        max_text_tokens: Maximum length of a caption, in tokens; the rest is cut off.
        dropout: Dropout of a text tower built from scratch and of the model's other layers.
        recompute: Whether cross-attention and the outputs of GELUs are recomputed for the gradient
            rather than kept: a third less memory for activations.
    """

    text_model: str | None = BIOBERT
    text_hidden: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_ffn: int = 512
    vocab_size: int = 4096
    text_pooling: Literal["cls", "mean"] = "cls"
    max_text_tokens: int = 384
    dropout: float = 0.1
    recompute: bool = True


@dataclass(frozen=True, kw_only=True)
class PathFLIPConfig(TextConfig):
    """Settings of a :class:`pathflip.models.PathFLIP`; the defaults are the paper's.

    Attributes:
        feature_dim: d_in, width of a patch feature.
        d: Width of the joint space.
        feature_norm: Fixed normalisation of features: none, by mean and standard deviation
            (``standardise``), or PCA whitening (``whiten``). The statistics come
            from :meth:`PathFLIP.fit_normalization` and are saved with the model.
        patch_width: d_e, width patches are projected to; 0 for no projection.
        num_queries: Q, number of latent queries.
        hidden: h, width of the Q-Former.
        layers: Number of layers of the Q-Former.
        heads: Number of heads of its attention.
        ffn: Width inside its feed-forward blocks.
        cross_attention_freq: Cross-attention in every so many layers, from the first on.
        patch_dropout: Share of patches hidden in training, drawn anew each step.
        region_encoder: Encoder of regions: the Q-Former, the mean of its patches, or
            ``none``: no regions and no region loss.
        slide_encoder: Encoder of slides: the Q-Former, or the mean of their regions.
        region_tokens: Vectors of a region: one per query, or their mean.
        slide_context_layers: Number of transformer layers over slide and region vectors (published
            code: 2).
        tr_attention: Text-conditioned attention over regions: ``paper`` (one head, three
            matrices), ``paper_ln`` (the same with layer norm on queries and keys), ``mha_proj``
            (published code), ``mha_ln`` (its successor), or ``none``: the mean of all regions.
        tr_heads: Number of heads of mha_proj, mha_ln and context layers.
        tr_identity_init: Whether the matrices of paper and paper_ln start as identity.
        vector_biases: Learned offsets of region vectors, one for each of a region's, and of slide
            vectors.
        text_encoder: A tower of its own, or the Q-Former's text branch (published code).
        max_subcaption_tokens: The same of a sub-caption; None: half of max_text_tokens.
        qformer_from_text: Whether the Q-Former begins with the weights of text_model.
        temperature: τ of the slide loss.
        label_smoothing: Label smoothing of the slide loss (published code: 0.1).
        global_only: Whether the slide loss is the only one.
        negatives: Source of negatives: the slides of this process (``local``), those of all
            processes as if they were one batch (``gathered``), or those of all processes as in the
            published code (``exchanged``): slides and captions of all are compared without a
            gradient through the other side, and a slide's texts are negatives of the slide in the
            same place of every other process.
        region_reduction: Reduction of the region loss over slides: mean, or sum (published code).
        region_scale: Whether η multiplies as it is, or its exponential does.
        region_scale_init: Initial value of the learned scale.
        region_bias_init: Initial value of the learned bias; None for no bias.
        warm_start: Whether the pretraining job starts the model from patches and sentences of its
            training data: see :mod:`pathflip.models.data_init`.
    """

    feature_dim: int = 512
    d: int = 256
    feature_norm: Literal["none", "standardise", "whiten"] = "none"
    patch_width: int = 256
    num_queries: int = 8
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_attention_freq: int = 2
    patch_dropout: float = 0.0
    region_encoder: Literal["qformer", "mean", "none"] = "qformer"
    slide_encoder: Literal["qformer", "region_mean"] = "qformer"
    region_tokens: Literal["per_query", "mean"] = "per_query"
    slide_context_layers: int = 0
    tr_attention: Literal["paper", "paper_ln", "mha_proj", "mha_ln", "none"] = "paper"
    tr_heads: int = 8
    tr_identity_init: bool = False
    vector_biases: bool = False
    text_encoder: Literal["separate", "shared_qformer"] = "separate"
    max_subcaption_tokens: int | None = None
    qformer_from_text: bool = True
    temperature: float = 0.1
    label_smoothing: float = 0.0
    global_only: bool = False
    negatives: Literal["local", "gathered", "exchanged"] = "gathered"
    region_reduction: Literal["mean", "sum"] = "mean"
    region_scale: Literal["raw", "exp"] = "raw"
    region_scale_init: float = SCALE
    region_bias_init: float | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_sizes(
            self, "feature_dim", "d", "num_queries", "hidden", "layers", "heads", "ffn",
            "cross_attention_freq", "tr_heads", "text_hidden", "text_layers", "text_heads",
            "text_ffn", "max_text_tokens",
        )  # fmt: skip
        check_heads(self, "hidden", "heads")
        check_heads(self, "text_hidden", "text_heads")
        if self.tr_attention.startswith("mha") or self.slide_context_layers:
            check_heads(self, "d", "tr_heads")
        if self.slide_encoder == "region_mean" and self.region_encoder == "none":
            raise ConfigError(
                "model.slide_encoder region_mean needs regions; model.region_encoder is none.",
                hint="Choose qformer for one of them.",
            )
        if self.text_encoder == "shared_qformer" and not self.uses_qformer:
            raise ConfigError(
                "model.text_encoder shared_qformer needs a Q-Former, and neither regions nor slide "
                "use it.",
                hint="Choose model.text_encoder=separate.",
            )
        check_shares(self, "dropout", "patch_dropout", "label_smoothing")
        if self.temperature <= 0:
            raise ConfigError(
                f"model.temperature is {self.temperature}.", hint="It must be above 0."
            )

    @property
    def uses_qformer(self) -> bool:
        """Return whether there is a Q-Former at all."""
        return "qformer" in (self.region_encoder, self.slide_encoder)

    @property
    def has_region_loss(self) -> bool:
        """Return whether the region loss is part of the loss."""
        return not self.global_only and self.region_encoder != "none"

    @property
    def has_regions(self) -> bool:
        """Return whether the model has region vectors; means of patches only where used."""
        return self.region_encoder == "qformer" or (
            self.region_encoder == "mean" and self.trains_regions
        )

    @property
    def slide_needs_regions(self) -> bool:
        """Return whether a slide's vector depends on its regions'."""
        return self.slide_encoder == "region_mean" or bool(
            self.slide_context_layers and self.region_encoder != "none"
        )

    @property
    def trains_regions(self) -> bool:
        """Return whether the loss depends on region vectors."""
        return self.has_region_loss or self.slide_needs_regions

    @property
    def tokens_per_region(self) -> int:
        """T, number of vectors of a region."""
        per_query = self.region_encoder == "qformer" and self.region_tokens == "per_query"
        return self.num_queries if per_query else 1

    @property
    def subcaption_tokens(self) -> int:
        """Maximum length of a sub-caption, in tokens."""
        return self.max_subcaption_tokens or max(1, self.max_text_tokens // 2)


def check_sizes(config: Any, *names: str) -> None:
    """Refuse settings of a model below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(
                f"model.{name} is {getattr(config, name)}.", hint="It must be 1 or more."
            )


def check_heads(config: Any, width: str, heads: str) -> None:
    """Refuse a width that the heads of an attention do not divide."""
    if getattr(config, width) % getattr(config, heads):
        raise ConfigError(
            f"model.{width} {getattr(config, width)} is not a multiple of {heads} "
            f"{getattr(config, heads)}.",
            hint=f"Make {width} a multiple of {heads}.",
        )


def check_shares(config: Any, *names: str) -> None:
    """Refuse settings of a model that are not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(
                f"model.{name} is {getattr(config, name)}.", hint="It must be 0 or more, below 1."
            )


def changed(base: C, overrides: Mapping[str, Any]) -> C:
    """Return the configuration of a model with some settings changed.

    Raises:
        ConfigError: There is no such setting, or a value is not possible.
    """
    known = [each.name for each in fields(base)]
    if unknown := set(overrides) - set(known):
        raise ConfigError(
            f"There is no model setting {sorted(unknown)[0]!r}.",
            hint=f"Known: {', '.join(known)}.",
        )
    return replace(base, **overrides)


@dataclass(frozen=True, kw_only=True)
class Preset(Generic[C]):
    """A model configuration with its training settings.

    Attributes:
        model: Configuration of the model.
        train: Settings of the pretraining job that differ from its defaults, by name.
    """

    model: C
    train: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, Preset[PathFLIPConfig]] = MappingProxyType(
    {
        "pathflip/paper": Preset(model=PathFLIPConfig()),
        "pathflip/official_v1": Preset(
            model=PathFLIPConfig(
                region_tokens="mean",
                slide_context_layers=2,
                tr_attention="mha_proj",
                text_encoder="shared_qformer",
                label_smoothing=0.1,
                region_reduction="sum",
                negatives="exchanged",
            ),
            train={"v1_window_bug": True, "batch_size": 8},
        ),
        # Trains on two CPU cores in minutes on the synthetic cohort (docs/concepts/models.md).
        "pathflip/mini": Preset(
            model=PathFLIPConfig(
                feature_dim=131,
                d=128,
                feature_norm="whiten",
                patch_width=0,
                num_queries=16,
                hidden=128,
                layers=1,
                heads=4,
                ffn=512,
                cross_attention_freq=1,
                dropout=0.0,
                tr_attention="paper_ln",
                tr_identity_init=True,
                vector_biases=True,
                text_model=None,
                text_layers=1,
                text_ffn=256,
                text_pooling="mean",
                max_text_tokens=256,
                recompute=False,
                qformer_from_text=False,
                region_scale="exp",
                region_scale_init=math.log(10.0),
                region_bias_init=-0.65,
                warm_start=True,
            ),
            train={
                "epochs": 20,
                "batch_size": 16,
                "lr": 1e-3,
                "min_lr": 2e-5,
                "max_regions": 16,
                "max_merged": 1,
                "subcaption_source": "affirmed",
                "val_every": 4,
            },
        ),
    }
)
"""The named models; see docs/concepts/models.md."""


def preset(name: str) -> Preset[PathFLIPConfig]:
    """Return a preset.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}.", hint=f"Known: {', '.join(PRESETS)}.")
    return PRESETS[name]
