"""What there is to train: what the loop and the run folder ask of it.

``jobs/pretrain.py`` and ``jobs/tune.py`` each have a task; ``training.py`` runs whichever the
settings of a run are of. A task makes the model, says what of it trains when, turns batches into
losses, judges a validation, and writes what the run is for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

from pathflip.checkpoints import Checkpoint
from pathflip.models import PathFLIP
from pathflip.training.config import AnyConfig, TuneConfig
from pathflip.training.dataset import Corpus, rng_for
from pathflip.training.loader import Batch, Batches, FeatureReader

START_SLIDES, START_REGIONS, START_BYTES = 128, 24, 256 << 20
"""How much of the training data a model is started from: slides, regions of each, fp16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps that train the same weights on one schedule.

    Attributes:
        name: Of the stage.
        start: Its first step.
        steps: How many it has.
        lr: Peak learning rate.
        weight_decay: Of matrices.
        rates: Learning rates of parts of the model, as multiples of it.
    """

    name: str
    start: int
    steps: int
    lr: float
    weight_decay: float
    rates: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """One kind of training.

    Attributes:
        losses: What is logged of a step, attributes of what :meth:`forward` returns; the first is
            minimised.
        exports: Folders of a finished run.
        val_slides: Most slides of a validation batch.
    """

    losses: ClassVar[tuple[str, ...]]
    exports: ClassVar[tuple[str, ...]] = ("model",)
    val_slides: int = 16

    # -- beginning --------------------------------------------------------------------------------

    @abstractmethod
    def corpus(self, archive: str) -> Corpus:
        """Returns the slides a new run would train on; refuses what cannot work."""

    @abstractmethod
    def fitted(self, corpus: Corpus) -> AnyConfig:
        """Returns the settings with what follows from the slides filled in."""

    @abstractmethod
    def begin(self, corpus: Corpus) -> PathFLIP:
        """Returns the slide model the run starts from; it is kept in RUN/init."""

    @abstractmethod
    def parameters(self, corpus: Corpus) -> tuple[int, int]:
        """Returns how many parameters train, and how many do not."""

    def check(self, corpus: Corpus) -> None:  # noqa: B027  # most have nothing to check
        """Refuses to go on where what a begun run needs besides its folder has changed."""

    # -- training ---------------------------------------------------------------------------------

    @abstractmethod
    def model(self, vision: PathFLIP, corpus: Corpus) -> torch.nn.Module:
        """Returns the model to train as it is before the first step, on the CPU."""

    @abstractmethod
    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Returns the stages, in their order, without gaps."""

    def enter(self, model: Any, stage: Stage) -> None:  # noqa: B027  # most have one stage
        """Chooses what of the model trains in a stage."""

    def kept(self, model: Any) -> Collection[str] | None:
        """Returns the tensors that checkpoints hold: those that ever train; None for all."""
        return None

    @abstractmethod
    def forward(
        self, model: Any, features: torch.Tensor, mask: torch.Tensor, batch: Batch, group: Any
    ) -> Any:
        """Returns the model's output for a micro-batch whose features are on the device."""

    def weights(self, model: Any, batches: Sequence[Batch]) -> list[float] | None:
        """Returns how much each micro-batch counts in the loss of a step; None: all the same."""
        return None

    def parts(self, output: Any, share: float) -> list[torch.Tensor]:
        """Returns the losses of a micro-batch, as it counts.

        Args:
            output: Of :meth:`forward`.
            share: How much it counts, 1 in the mean over the step's micro-batches.
        """
        return [getattr(output, name) for name in self.losses]

    # -- validation -------------------------------------------------------------------------------

    @abstractmethod
    def size(self, output: Any, slides: Sequence[int]) -> int:
        """Returns what the mean losses of a validation batch are means over."""

    def vectors(self, output: Any) -> torch.Tensor | None:
        """Returns vectors of a validation batch [2, b, d], slides and texts; None without."""
        return None

    @abstractmethod
    def judge(
        self, corpus: Corpus, slides: Sequence[int], vectors: torch.Tensor, losses: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns what is noted of a validation.

        Args:
            corpus: The slides of the run.
            slides: Those that validate.
            vectors: Of :meth:`vectors`, for all of them.
            losses: The means of the losses, None where one is not finite.
        """

    # -- the end ----------------------------------------------------------------------------------

    @abstractmethod
    def export(self, run: Path, corpus: Corpus, best: Checkpoint, result: dict[str, Any]) -> str:
        """Writes the folders in ``exports`` and returns the model card."""


def task_of(config: AnyConfig) -> Task:
    """Returns the task that settings are of."""
    if isinstance(config, TuneConfig):
        from pathflip.training.instruct import Tuning

        return Tuning(config)
    from pathflip.training.contrastive import Pretraining

    return Pretraining(config)


def start_batch(corpus: Corpus, config: AnyConfig) -> Batch:
    """Returns some training slides, the same for the same seed: what a start is fitted to."""
    whole = max(1, corpus.about["slots"] * corpus.about["encoder"]["dim"] * 2)
    most = min(config.max_regions or START_REGIONS, START_REGIONS)
    count = max(2, min(START_SLIDES, START_BYTES // (whole * most)))
    train = corpus.members("train").tolist()
    chosen = rng_for("start", config.seed).permutation(train)[:count].tolist()
    sampling = replace(config.sampling(), max_regions=most)
    return Batches(FeatureReader(corpus), sampling).draw(chosen, chosen, epoch=0)


def about_model(
    config: AnyConfig, corpus: Corpus, result: dict[str, Any], *, run: str, fingerprint: str
) -> dict[str, Any]:
    """Returns pathflip.json of an exported model.

    Args:
        config: The settings.
        corpus: The slides.
        result: What is noted in result.json.
        run: What the slide model is called by, see ``pathflip.checkpoints.model_name``.
        fingerprint: Of the slide model.
    """
    return {
        "run": run,
        "preset": config.preset,
        "step": result["best_step"],
        "fingerprint": fingerprint,
        "encoder": corpus.about["encoder"],
        "tiling": corpus.about["tiling"],
        "archive": {"uri": corpus.about["archive"], "slides": len(corpus),
                    "sha256": corpus.digest()},
        "split": {**corpus.counts(), "seed": config.seed, "val_fraction": config.val_fraction},
        "val": result["val"],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
