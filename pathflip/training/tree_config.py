"""Settings of a training on patch trees: a preset, a file over it, ``-o key=value``, flags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pathflip.config import check_positive
from pathflip.errors import ConfigError
from pathflip.models import MR_PRESETS, MRPLIPConfig
from pathflip.training.loop_config import LoopConfig, from_preset, recall_or_loss
from pathflip.training.tree_dataset import TreeSampling

FAMILY = "mrplip/"
"""Prefix of the names of this family's presets."""
DEFAULT_MR_PRESET = "mrplip/paper"


@dataclass(frozen=True, kw_only=True)
class MRPretrainConfig(LoopConfig):
    """Settings of ``pathflip pretrain`` with a preset ``mrplip/…``.

    Attributes:
        preset: The preset these settings started from, for the record.
        model: The model, see :class:`pathflip.models.MRPLIPConfig`.
        pairs: Patch-caption pairs of a tree in a step, spread over its levels; fewer where a tree
            has fewer captions.
        trees_per_patient: Largest number of a patient's trees in a step.
        text_rate: Learning rate of the text tower, times ``lr``; 0 leaves its weights as they are.
        steps: Number of optimisation steps; overrides ``epochs`` where given.
        best: Criterion for the exported weights: the mean of R@1/5/10 both ways on validation
            pairs (``recall``), their loss (``loss``), or the last (``last``).
    """

    kind: Literal["multiresolution"] = "multiresolution"
    family: Literal["mrplip"] = "mrplip"
    preset: str = DEFAULT_MR_PRESET
    model: MRPLIPConfig = field(default_factory=MRPLIPConfig)
    batch_size: int = 4
    weight_decay: float = 0.02
    pairs: int = 16
    trees_per_patient: int = 1
    text_rate: float = 1.0
    steps: int | None = None
    best: Literal["recall", "loss", "last"] = "recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pairs", "trees_per_patient", "steps")
        self._check_within(text_rate=math.inf)
        share = self.batch_size // self.accumulate
        if share < 2 and self.model.has("mrtva"):
            raise ConfigError(
                f"A micro-batch has {share} tree, and the loss mrtva needs two: its batch norm "
                "tells nothing within one.",
                hint="Make batch_size / accumulate 2 or more, or leave mrtva out of model.losses.",
                code="one_tree",
            )
        if share * self.pairs < 2:
            raise ConfigError(
                "A micro-batch has a single pair, which has nothing to be told from.",
                hint="Use more pairs or a larger batch_size.",
                code="one_tree",
            )

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rate of the text tower."""
        return {"text_tower": self.text_rate}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many optimisation steps the run has."""
        return self.steps or self.epochs * steps_per_epoch

    def sampling(self) -> TreeSampling:
        """Return what is drawn from each tree."""
        return TreeSampling(
            seed=self.seed,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            pairs=self.pairs,
            trees_per_patient=self.trees_per_patient,
            epochs=self.epochs,
            steps=self.steps,
            levels=self.model.levels,
            keyword_cap=self.model.keyword_cap,
        )

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Return the checkpoint-selection metric of a validation; higher is better."""
        return recall_or_loss(self.best, val)


def single_level(config: MRPretrainConfig) -> MRPretrainConfig:
    """Return settings with as many pairs in a step from one level as there were from all.

    A tree has one node of 5x and four of 10x: steps have more trees then, with fewer pairs of each,
    and there are as many steps in all. Patients may have as many more trees in a step.

    Args:
        config: Settings whose model reads one level.
    """
    (level,) = config.model.levels
    times = -(-config.pairs // 4**level)
    return replace(
        config,
        batch_size=config.batch_size * times,
        pairs=config.pairs // times,
        trees_per_patient=config.trees_per_patient * times,
        epochs=config.epochs * times,
        val_every=config.val_every * times,
    )


def resolve_trees(
    preset: str | None = None,
    *,
    base: MRPretrainConfig | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> MRPretrainConfig:
    """Return settings of a pretraining on patch trees; see :func:`loop_config.from_preset`."""
    return from_preset(
        MRPretrainConfig, MR_PRESETS, DEFAULT_MR_PRESET,
        preset=preset, base=base, file=file, overrides=overrides, given=given,
    )  # fmt: skip
