"""The seam between the trainer and a model family: data, losses, validation, export.

The trainer knows neither slides nor text. A :class:`Dataset` says what the items of a run are, in
which order they come and how a batch of them is drawn; an :class:`Objective` says how the model is
built, what its losses are, what trains when, how it is validated and what a finished run holds. A
new model family adds one of each, and no line to the trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist

from pathflip.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pathflip.training.loop_config import LoopConfig


class Batch(Protocol):
    """A micro-batch of one worker."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        ...


class Dataset(Protocol):
    """Items of a run, their order and how a batch of them is drawn.

    What is drawn is a function of (seed, epoch, item), never of the worker that draws it.
    """

    @property
    def unit(self) -> str:
        """Name of an item, in the plural: ``slides``."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimisation steps of an epoch."""
        ...

    def micro_batches(
        self, step: int, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> Sequence[Batch]:
        """Return a worker's share of a step, a micro-batch each; in page-locked memory if asked."""
        ...

    @property
    def archive(self) -> str:
        """URI of the archive the items are from."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the list of items, from which a run that is resumed goes on."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return counts of items by split and the other figures that a dry run shows."""
        ...

    def memory_mb(self, num_items: int, /, *, read_ahead: int) -> dict[str, float]:
        """Return MiB a worker needs for data with so many items in a micro-batch."""
        ...


@dataclass(frozen=True)
class Loss:
    """A loss of a micro-batch as a sum and what it is a sum over.

    The loss of a step is the sum over all micro-batches and workers, divided by the sum of the
    counts. A loss that is a mean within its micro-batch (as one over pairs is) has count 1.

    Attributes:
        total: The sum, a scalar with its gradient.
        count: Number of terms.
    """

    total: torch.Tensor
    count: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps that train the same weights on one schedule.

    Attributes:
        name: Name of the stage.
        start: Its first step.
        steps: Number of its steps.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices.
        rates: Learning rates of parts of the model, as multiples of ``lr``.
    """

    name: str
    start: int
    steps: int
    lr: float
    weight_decay: float
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the processes that train together.

    Attributes:
        rank: This process.
        world: Number of processes.
        device: Device it computes on.
        bf16: Whether losses are computed under autocast to bfloat16.
        group: Process group of all; None in one process.
        alone: Process group of this process only; None in one process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    group: Any = None
    alone: Any = None

    def autocast(self) -> Any:
        """Return the context that losses are computed in."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, on the CPU."""
        if self.world == 1:
            return values.cpu()
        total = values.to(self.device)
        dist.all_reduce(total, group=self.group)
        return total.cpu()


D = TypeVar("D", bound=Dataset)
C = TypeVar("C", bound="LoopConfig")


class Objective(ABC, Generic[D, C]):
    """Interface between the trainer and a model family.

    An objective holds settings only, so that it can be sent to the processes that train.

    Args:
        config: Settings of the run.

    Attributes:
        exports: Folders of a finished run.
    """

    exports: ClassVar[tuple[str, ...]] = ("model",)

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Losses by name with their weights; the weighted sum is minimised."""

    # -- beginning --------------------------------------------------------------------------------

    @abstractmethod
    def select(self, archive: str) -> D:
        """Choose the data of a new run; refuse an archive or settings that cannot work."""

    @abstractmethod
    def load(self, path: Path) -> D:
        """Read the data of a begun run, as :meth:`Dataset.save` wrote it."""

    def fitted(self, dataset: D) -> Self:
        """Return the objective with its settings completed from the data."""
        return self

    @abstractmethod
    def initial(self, dataset: D) -> Any:
        """Return the model the run starts from, with ``save_pretrained``; kept in RUN/init."""

    @abstractmethod
    def parameters(self, dataset: D) -> tuple[int, int]:
        """Return the number of parameters that train, and of those that never do."""

    def check(self, dataset: D) -> None:  # most have nothing to check
        """Refuse to resume where an input outside the run folder has changed."""

    # -- training ---------------------------------------------------------------------------------

    @abstractmethod
    def build(self, dataset: D, init: Path) -> torch.nn.Module:
        """Build the model as it is before the first step, on the CPU.

        Args:
            dataset: The data of the run.
            init: The folder with the model of :meth:`initial`.
        """

    def shard(self, model: Any, worker: Worker) -> bool:
        """Cut parts of a built model over several workers, in place; return whether any was.

        Called on all of them, with the model on the CPU.
        """
        return False

    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Return the stages, in their order, without gaps; most have one."""
        config = self.config
        return [
            Stage(
                name="all",
                start=0,
                steps=config.total_steps(steps_per_epoch),
                lr=config.lr,
                weight_decay=config.weight_decay,
                rates=config.rates,
            )
        ]

    def trainable(self, model: Any, stage: Stage) -> None:
        """Choose the parameters that train in a stage; parts whose rate is 0 are frozen."""
        for part in self._frozen:
            getattr(model, part).freeze()

    def saved(self, model: Any) -> Collection[str] | None:
        """Return the tensors that checkpoints hold: those that ever train; None for all."""
        if not self._frozen:
            return None
        return [name for name in model.state_dict() if name.partition(".")[0] not in self._frozen]

    def counted(self, model: Any) -> tuple[int, int]:
        """Return the number of parameters of a model that train, and of those that never do."""
        self.trainable(model, self.stages(1)[-1])
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return trained, sum(size for size, _ in sizes) - trained

    @property
    def _frozen(self) -> list[str]:
        return [part for part, rate in self.config.rates.items() if rate == 0]

    def counts(self, model: Any, batch: Any) -> dict[str, float]:
        """Return the counts of a micro-batch's losses, known before its forward pass."""
        return dict.fromkeys(self.weights, 1.0)

    @abstractmethod
    def losses(self, model: Any, batch: Any, *, group: Any) -> dict[str, Loss]:
        """Return the losses of a micro-batch that is on the device.

        Values that are not in :attr:`weights` are logged, as the first worker sees them, and not
        trained on.

        Args:
            model: The model, wrapped where several processes train it.
            batch: The micro-batch.
            group: Process group to gather from; None for this process alone.
        """

    # -- the end ----------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: Any, dataset: D, worker: Worker) -> dict[str, Any]:
        """Measure the model on the validation items; every worker takes part, all return the same.

        Returns:
            Metrics, ``config.metric`` among them; empty without validation items.
        """

    @abstractmethod
    def export(self, run: Path, dataset: D, best: Checkpoint, result: dict[str, Any]) -> str:
        """Write the folders in ``exports`` and return the model card."""
