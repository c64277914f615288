"""Settings of a training on slides: a preset, with a file, ``-o key=value`` and flags over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pathflip.config import check_positive, load_config
from pathflip.errors import ConfigError
from pathflip.models import PRESETS, InstructConfig, PathFLIPConfig
from pathflip.training.examples import Examples
from pathflip.training.loop_config import LoopConfig, from_preset, preset_name, recall_or_loss
from pathflip.training.slide_batches import Sampling

DEFAULT_PRESET, DEFAULT_TUNE_PRESET = "pathflip/paper", "instruct/paper"
TUNE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Sizes and rates of the instruction stage are not published: SlideChat's and the code's.
    "instruct/paper": {},
    "instruct/official_v1": {
        "instruct": {"prefix": "mean", "template": "official_v1"},
        "projector_epochs": 0,
        "batch_size": 8,
    },
    "instruct/mini": {
        "instruct": {
            "prefix": "joined",
            "choice_answer": "text",
            "projector_start": "text",
            "lora_r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.1,
            "train_vision": False,
        },
        "projector_epochs": 0,
        "epochs": 5,
        "batch_size": 8,
        "lr": 2e-3,
        "min_lr": 1e-5,
        "projector_rate": 0.5,
        "max_regions": 16,
        "examples_per_slide": 5,
        "caption_share": 0.7,
        "captions": "affirmed",
        "subcaption_source": "affirmed",
        "drop_options_prob": 1.0,
        "weight_decay": 0.01,
        # The loss of whole captions does not measure the findings read
        # (docs/notes/instruct.md).
        "best": "last",
    },
}
"""Settings that differ from the defaults, by preset; see docs/howto/tune.md."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Settings of a training on slides.

    Attributes:
        subcaption_source: Units that sub-captions are drawn from (formerly ``pieces``):
            sentences; sentences that affirm something
            (no region shows "No necrosis."); or the statements a language model made of them
            (slides without any use their sentences).
        num_subcaptions: K, number of sub-captions of a slide in a step.
        max_merged: Maximum number of sentences merged into one sub-caption.
        v1_window_bug: Draw windows of sentences as the published code does: never the last
            (formerly ``contig_off_by_one``).
        max_regions: Maximum number of regions of a slide in a training step; None for all.
            Validation always uses all.
    """

    subcaption_source: Literal["sentences", "affirmed", "statements"] = field(
        default="sentences", metadata={"formerly": "pieces"}
    )
    num_subcaptions: int = 8
    max_merged: int = 3
    v1_window_bug: bool = field(default=False, metadata={"formerly": "contig_off_by_one"})
    max_regions: int | None = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_subcaptions", "max_merged", "max_regions")

    def sampling(self) -> Sampling:
        """Return what is drawn from each slide."""
        return Sampling(
            seed=self.seed,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            num_subcaptions=self.num_subcaptions,
            max_regions=self.max_regions,
            max_merged=self.max_merged,
            statements=self.subcaption_source == "statements",
            v1_window_bug=self.v1_window_bug,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Settings of ``pathflip pretrain``; a preset fills in model and training.

    Attributes:
        preset: The preset these settings started from, for the record.
        model: The model, see :class:`pathflip.models.PathFLIPConfig`.
        text_rate: Learning rate of the text tower, times ``lr``; 0 leaves its weights as they are
            and trains the projection of its vectors alone.
        steps: Number of optimisation steps; overrides ``epochs`` where given.
        best: Criterion for the exported weights: the mean of R@1/5/10 both ways on the
            validation slides (``recall``), their loss (``loss``), or the last (``last``).
    """

    kind: Literal["contrastive"] = "contrastive"
    family: Literal["pathflip"] = "pathflip"
    preset: str = DEFAULT_PRESET
    model: PathFLIPConfig = field(default_factory=PathFLIPConfig)
    text_rate: float = 1.0
    steps: int | None = None
    best: Literal["recall", "loss", "last"] = "recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps")
        self._check_within(text_rate=math.inf)
        if self.text_rate != 1.0 and self.model.text_encoder == "shared_qformer":
            raise ConfigError(
                f"text_rate is {self.text_rate}, and this model has no text tower of its own.",
                hint="Choose model.text_encoder=separate, or leave text_rate at 1.",
            )

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rate of the text tower."""
        return {"text_tower": self.text_rate}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many optimisation steps the run has."""
        return self.steps or self.epochs * steps_per_epoch

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Return the checkpoint-selection metric of a validation; higher is better."""
        return recall_or_loss(self.best, val)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Settings of ``pathflip tune``; a preset fills them in.

    Attributes:
        preset: The preset these settings started from, for the record.
        run: Pretraining run whose model encodes the slides.
        llm: The language model: a folder, or ``owner/name`` on the hub.
        instruct: The instruction model, see :class:`pathflip.models.InstructConfig`.
        projector_epochs: Passes of the first stage, in which the projector alone trains, on
            captions; 0 for a single stage. The second stage has ``epochs``, ``lr``,
            ``weight_decay``.
        projector_lr: Peak learning rate of the first stage, which has no weight decay.
        projector_rate: Learning rate of the projector in the second stage, times ``lr``.
        vision_rate: Learning rate of the slide model in the second stage, times ``lr``.
        examples_per_slide: Maximum number of examples (caption, questions) of a slide in an epoch.
        caption_share: Probability that a slide with questions shows its caption, too.
        drop_options_prob: Probability that a question with options is asked without them
            (formerly ``open_share``).
        abstain_share: Probability that a question with options shows that the slide cannot tell as
            a further one, where training slides are asked what they cannot answer.
        groundable: Whether caption targets are the sentences that a slide can show, see
            :mod:`pathflip.training.targets`; otherwise whole reports. Statements instead of
            sentences where ``subcaption_source`` names them.
        captions: Style of caption targets: ``whole``, unchanged; ``shuffled``, their sentences in
            a random order, for reports whose order means nothing; ``affirmed``, what they affirm,
            in the order of the alphabet.
        align: Weight of the vision model's own losses, which train along in the second stage.
        shard: Whether the language model's layers are cut over the workers (FSDP): ``auto``, on
            GPUs where its weights would take more than a quarter of one's memory.
        recompute: Whether its layers compute their activations again in the backward pass: less
            memory for a third more computing.
        compile: Whether its layers are compiled (``torch.compile``) when they first run.
        best: Criterion for the exported weights: the loss of the answers about the
            validation slides (``loss``), or the last (``last``).
    """

    kind: Literal["instruct"] = "instruct"
    family: Literal["pathflip"] = "pathflip"
    preset: str = DEFAULT_TUNE_PRESET
    run: str = ""
    llm: str = ""
    instruct: InstructConfig = field(default_factory=InstructConfig)
    batch_size: int = 16
    projector_epochs: int = 5
    projector_lr: float = 1e-3
    projector_rate: float = 1.0
    vision_rate: float = 1.0
    epochs: int = 2
    examples_per_slide: int = 4
    caption_share: float = 0.5
    drop_options_prob: float = field(default=0.25, metadata={"formerly": "open_share"})
    abstain_share: float = 0.5
    groundable: bool = True
    captions: Literal["whole", "shuffled", "affirmed"] = "whole"
    align: float = 0.0
    shard: Literal["auto", "always", "never"] = "auto"
    recompute: bool = False
    compile: bool = False
    best: Literal["loss", "last"] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "examples_per_slide")
        self._check_within(
            projector_epochs=math.inf, projector_lr=math.inf, projector_rate=math.inf,
            vision_rate=math.inf, caption_share=1.0, drop_options_prob=1.0, abstain_share=1.0,
            align=math.inf,
        )  # fmt: skip
        if self.align and not self.instruct.train_vision:
            raise ConfigError(
                f"align is {self.align}, but the vision model does not train.",
                hint="Leave instruct.train_vision on, or align at 0.",
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many optimisation steps the run has, both stages together."""
        return (self.projector_epochs + self.epochs) * steps_per_epoch

    def sampling(self) -> Sampling:
        """Return what is drawn from each slide: sub-captions only where they are used."""
        return replace(
            super().sampling(),
            num_subcaptions=self.num_subcaptions if self.align else 0,
            examples=Examples(
                most=self.examples_per_slide,
                caption_share=self.caption_share,
                drop_options_prob=self.drop_options_prob,
                caption_epochs=self.projector_epochs,
                captions=self.captions,
                letters=self.instruct.choice_answer == "letter",
                abstain_share=self.abstain_share,
            ),
        )

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Return the checkpoint-selection metric of a validation; higher is better."""
        value = None if self.best == "last" else val["loss_answer"]
        return None if value is None else -float(value)


AnyConfig = PretrainConfig | TuneConfig


def resolve(
    preset: str | None = None,
    *,
    base: PretrainConfig | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> PretrainConfig:
    """Return settings of a pretraining on slides; see :func:`loop_config.from_preset`."""
    return from_preset(
        PretrainConfig, PRESETS, DEFAULT_PRESET,
        preset=preset, base=base, file=file, overrides=overrides, given=given,
    )  # fmt: skip


def resolve_tuning(
    preset: str | None = None,
    *,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> TuneConfig:
    """Return the settings of a tuning; see :func:`resolve`.

    Folders are made absolute; what is no folder here is a name on the hub.
    """
    name = preset_name(preset, TUNE_PRESETS, DEFAULT_TUNE_PRESET, file, overrides)
    made = load_config(
        TuneConfig,
        base=TUNE_PRESETS[name],
        file=file,
        overrides=overrides,
        given={**(given or {}), "preset": name},
    )
    for key, what in (("run", "The run of pathflip pretrain"), ("llm", "The language model")):
        if not getattr(made, key):
            raise ConfigError(f"{what} is not named.", hint=f"Give --{key}.")
    run = str(Path(made.run).expanduser().absolute())
    folder = Path(made.llm).expanduser()
    return replace(made, run=run, llm=str(folder.absolute()) if folder.is_dir() else made.llm)
