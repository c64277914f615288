"""Configuration of the patch model MR-PLIP and its presets.

Sizes: d_in patch feature width (``feature_dim``), d joint space of patches and texts (``d``), h
width of the text tower and of the fusion encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pathflip.errors import ConfigError
from pathflip.models.config import Preset, TextConfig, check_heads, check_shares, check_sizes

LossName = Literal["itc", "itm", "mlm", "plm", "cvta", "mrtva"]
LOSSES: tuple[LossName, ...] = ("itc", "itm", "mlm", "plm", "cvta", "mrtva")


@dataclass(frozen=True, kw_only=True)
class MRPLIPConfig(TextConfig):
    """Settings of a :class:`pathflip.models.MRPLIP`; the defaults are the paper's, where it says.

    Attributes:
        feature_dim: d_in, width of a patch feature.
        d: Width of the joint space.
        feature_norm: Fixed normalisation of features: none, by mean and standard deviation
            (``standardise``), or PCA whitening (``whiten``).
        fusion_layers: Number of layers of the fusion encoder E_mm; its width is the text tower's.
        fusion_heads: Number of heads of its attention.
        fusion_ffn: Width inside its feed-forward blocks.
        keywords: k_o, most positive keywords of a patch; at most half of a tree's.
        keyword_cap: Most keywords of a tree, the best by TF-IDF.
        selection: Positive keywords of a patch: those of its own caption (``own``), the most
            similar (``current``), or first the one and then the other.
        selection_frozen_share: Share of the run in which ``frozen_then_current`` takes own ones.
        cvta_mean: Mean of the vision-text alignment over the patches of a tree, or of the means of
            its levels.
        tau_init: Initial temperature; it is learned, and used within [0.01, 0.5].
        losses: Losses that are summed; ``itc`` is one of them.
        edges: Pairs of patches of the cross-resolution alignment: parents with children, with all
            their descendants, or as many random pairs of the tree (an ablation).
        levels: Levels of a tree that are read, 0 the coarsest.
        projection: Width of the projector of the cross-resolution alignment.
        bottleneck: Width inside its predictor.
        mlm_share: Share of a caption's tokens that are masked.
        negatives: Negatives of the contrastive loss: pairs of this process, or of all.
        warm_start: Whether pretraining starts the model from patches and keywords of its data: see
            :func:`pathflip.models.data_init.warm_start_patches`.
    """

    feature_dim: int = 1024
    d: int = 256
    feature_norm: Literal["none", "standardise", "whiten"] = "none"
    text_pooling: Literal["cls", "mean"] = "mean"
    max_text_tokens: int = 256
    fusion_layers: int = 6
    fusion_heads: int = 12
    fusion_ffn: int = 3072
    keywords: int = 8
    keyword_cap: int = 255
    selection: Literal["own", "frozen_then_current", "current"] = "frozen_then_current"
    selection_frozen_share: float = 0.1
    cvta_mean: Literal["nodes", "levels"] = "nodes"
    tau_init: float = 0.07
    losses: tuple[LossName, ...] = LOSSES
    edges: Literal["hierarchy", "all_ancestors", "random"] = "hierarchy"
    levels: tuple[int, ...] = (0, 1, 2, 3)
    projection: int = 2048
    bottleneck: int = 512
    mlm_share: float = 0.15
    negatives: Literal["local", "gathered"] = "gathered"
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_sizes(
            self, "feature_dim", "d", "fusion_layers", "fusion_heads", "fusion_ffn", "keywords",
            "keyword_cap", "projection", "bottleneck", "text_hidden", "text_layers", "text_heads",
            "text_ffn", "max_text_tokens",
        )  # fmt: skip
        check_heads(self, "text_hidden", "text_heads")
        check_shares(self, "dropout", "mlm_share")
        if self.text_model is None:
            check_heads(self, "text_hidden", "fusion_heads")
        if not 0 <= self.selection_frozen_share <= 1:
            raise ConfigError(
                f"model.selection_frozen_share is {self.selection_frozen_share}.",
                hint="It must be from 0 to 1.",
            )
        if not TAU[0] <= self.tau_init <= TAU[1]:
            raise ConfigError(
                f"model.tau_init is {self.tau_init}.", hint=f"It must be from {TAU[0]} to {TAU[1]}."
            )
        unknown = sorted(set(self.losses) - set(LOSSES))
        if unknown or len(set(self.losses)) < len(self.losses) or "itc" not in self.losses:
            raise ConfigError(
                f"model.losses is {list(self.losses)}.",
                hint=f"Give itc and any of {', '.join(LOSSES[1:])}, each once.",
            )
        if not self.levels or sorted(set(self.levels) & {0, 1, 2, 3}) != sorted(self.levels):
            raise ConfigError(
                f"model.levels is {list(self.levels)}.", hint="Give any of 0 1 2 3, each once."
            )
        if self.has("mrtva") and len(self.levels) < 2:
            raise ConfigError(
                "model.losses has mrtva, which pairs patches of two levels, and model.levels is "
                f"{list(self.levels)}.",
                hint="Leave mrtva out of model.losses.",
            )

    def has(self, *names: LossName) -> bool:
        """Return whether any of these losses is on."""
        return any(name in self.losses for name in names)

    def takes_own(self, progress: float) -> bool:
        """Return whether positives are own keywords when so much of a run is done (0 to 1)."""
        return self.selection == "own" or (
            self.selection == "frozen_then_current" and progress < self.selection_frozen_share
        )


TAU = (0.01, 0.5)
"""Bounds of the temperature."""

MR_PRESETS: Mapping[str, Preset[MRPLIPConfig]] = MappingProxyType(
    {
        "mrplip/paper": Preset(
            model=MRPLIPConfig(),
            train={
                "epochs": 50,
                "batch_size": 4,
                "pairs": 16,
                "lr": 1e-4,
                "weight_decay": 0.02,
            },
        ),
        # Trains on two CPU cores in minutes on the synthetic cohort of trees.
        "mrplip/mini": Preset(
            model=MRPLIPConfig(
                feature_dim=131,
                d=128,
                feature_norm="whiten",
                text_model=None,
                text_layers=1,
                text_ffn=256,
                max_text_tokens=128,
                dropout=0.0,
                recompute=False,
                fusion_layers=1,
                fusion_heads=4,
                fusion_ffn=256,
                keywords=3,
                selection="own",
                cvta_mean="levels",
                projection=256,
                bottleneck=64,
                warm_start=True,
            ),
            train={
                "epochs": 8,
                "batch_size": 4,
                "pairs": 8,
                "lr": 2e-3,
                "min_lr": 2e-5,
                "weight_decay": 0.02,
                "val_every": 2,
                # Recall among a few captions is near chance, and its largest value is luck.
                "best": "last",
            },
        ),
    }
)
"""The named patch models."""


def mr_preset(name: str) -> Preset[MRPLIPConfig]:
    """Return a preset of the patch model.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in MR_PRESETS:
        raise ConfigError(f"There is no preset {name!r}.", hint=f"Known: {', '.join(MR_PRESETS)}.")
    return MR_PRESETS[name]
