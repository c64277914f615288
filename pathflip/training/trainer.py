"""The training loop: one process of one or many, without Ray.

``jobs/ray_train.py`` runs :func:`train` in Ray Train workers; tests and benchmarks call it as it
is. It reads data and start from the run folder, which ``run_dir.prepare`` made, and goes on from
the newest intact checkpoint there. What is trained is an :class:`Objective`. Learning rate, order,
draws and dropout are functions of (seed, step), so a checkpoint needs no state of theirs but the
step.
"""

from __future__ import annotations

import bisect
import gc
import hashlib
import itertools
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pathflip.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint, verify_whole
from pathflip.errors import TrainingError
from pathflip.job_metrics import Sample
from pathflip.training.loader import stream
from pathflip.training.objective import Batch, Objective, Stage, Worker
from pathflip.training.optim import learning_rate, parameter_groups
from pathflip.training.run_dir import DATA, RunLog, checkpoint_at, load_tensors, model_tensors
from pathflip.training.sharding import clip_gradients, is_cut, like, whole

RECENT = 50
"""Steps whose mean is "the loss" of a run."""
AT_ONCE = 1 << 23
"""Numbers of gradients that workers exchange together, if it is no larger tensor: 32 MB."""
MIN_STEPS_FOR_SHARE = 100
"""Steps before the share of skipped ones is judged."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Progress of a run.

    Attributes:
        step: Steps done.
        steps: Steps of the run.
        epoch: Epochs done.
        loss: Loss of the step; None if it was not finite.
        items_per_s: Items trained on in a second.
        unit: Name of the items.
        seconds_left: Seconds to the last step.
        val: The last validation, {} before the first.
    """

    step: int
    steps: int
    epoch: float
    loss: float | None
    items_per_s: float
    unit: str
    seconds_left: float
    val: Mapping[str, Any] = field(default_factory=dict)

    def samples(self) -> list[Sample]:
        """Return its figures, for Prometheus."""
        found = [
            Sample("pathflip_train_step", self.step),
            Sample("pathflip_train_steps_expected", self.steps),
            Sample("pathflip_train_items_per_second", self.items_per_s, {"unit": self.unit}),
        ]
        if self.loss is not None:
            found.append(Sample("pathflip_train_loss", self.loss))
        for name, value in self.val.items():
            nested = value if isinstance(value, Mapping) else {"": value}
            found += [
                Sample("pathflip_train_validation", one, {"name": f"{name} {key}".strip()})
                for key, one in nested.items()
                if isinstance(one, float)
            ]
        return found

    @property
    def fraction(self) -> float:
        """Share of the steps done."""
        return self.step / max(1, self.steps)

    def line(self) -> str:
        """One line for people."""
        loss = "" if self.loss is None else f" · loss {self.loss:.4f}"
        return (
            f"train {self.step:,}/{self.steps:,} steps · epoch {self.epoch:.1f}{loss} · "
            f"{self.items_per_s:,.1f} {self.unit}/s · {_left(self.seconds_left)}"
        )


def _left(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min left"
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


@dataclass
class Counters:
    """Training state of a checkpoint besides its tensors.

    Attributes:
        step: Number of steps done, skipped ones included; the position in data and schedule.
        skipped: Number of steps whose loss or gradient was not finite.
        skipped_in_row: Number of those since the last finite step.
        seconds: Training time in seconds, all attempts together.
        recent: Losses of the last steps.
        val: The last validation.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    val: dict[str, Any] = field(default_factory=dict)


def train(
    run: str | Path,
    objective: Objective[Any, Any],
    *,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Train a prepared run to its end, from wherever it stands.

    With several processes, ``torch.distributed`` is initialised and each calls this with its rank.
    More processes than can share a batch evenly are let go at once.

    Args:
        run: The run folder.
        objective: Objective of the run, as ``run_dir.prepare`` returned it.
        rank: Rank of this process.
        world: Number of processes.
        device: ``cpu`` or ``cuda``.
        progress: Called on rank 0 after every step.

    Raises:
        TrainingError: Losses or gradients were not finite too often.
        CheckpointError, ArchiveError: The run or its archive is damaged.
    """
    config = objective.config
    used = shareable(config.batch_size // config.accumulate, world)
    group = alone = None
    if world > 1:
        group = dist.new_group(list(range(used)))
        alone = [dist.new_group([other]) for other in range(world)][rank]
    if rank < used:
        place = torch.device(device)
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # Ray lets a worker see the cards of its machine's others
        worker = Worker(
            rank=rank,
            world=used,
            device=place,
            bf16=config.precision == "bf16"
            or (config.precision == "auto" and place.type == "cuda"),
            group=group,
            alone=alone,
        )
        with reproducible(place):
            Trainer(Path(run), objective, worker).fit(progress)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Give sums on a CPU an order that does not depend on how threads take turns.

    Gradients of rows that are gathered more than once are otherwise added by all threads as they
    come, and two runs with the same settings part in the last digits. On a GPU nothing changes.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def shareable(items: int, world: int) -> int:
    """Return the number of ``world`` workers that can share so many items evenly."""
    return next(count for count in range(min(world, items), 0, -1) if items % count == 0)


class Trainer:
    """Training loop of one worker, with its state.

    Args:
        run: The run folder.
        objective: Objective of the run.
        worker: Rank, device and process groups of this process.
    """

    def __init__(self, run: Path, objective: Objective[Any, Any], worker: Worker) -> None:
        self.run, self.objective, self.worker = run, objective, worker
        self.config = objective.config
        self.dataset = objective.load(run / DATA)
        verify_whole(run / "init")
        self.per_epoch: int = self.dataset.steps_per_epoch
        self.steps: int = self.config.total_steps(self.per_epoch)
        self.stages = objective.stages(self.per_epoch)
        model: Any = objective.build(self.dataset, run / "init")
        self.sharded = worker.world > 1 and objective.shard(model, worker)
        self.model = model.to(worker.device)
        self.saved = objective.saved(self.model)
        self._enter(self.stages[0])
        self.counters = Counters()

    def fit(self, progress: Callable[[TrainingProgress], None] | None) -> None:
        """Train to the last step."""
        with ExitStack() as stack:
            log = stack.enter_context(RunLog(self.run)) if self.worker.rank == 0 else None
            self._resume()
            pids = self._pids()
            if log is not None:
                log.begin(self.counters.step, pids=pids)
            model = self._shared_model()
            batches = stream(
                self.dataset,
                self.counters.step,
                self.steps,
                rank=self.worker.rank,
                world=self.worker.world,
                pin=self.worker.device if self.worker.device.type == "cuda" else None,
            )
            stack.enter_context(closing(batches))  # type: ignore[type-var]
            self.model.train()
            began = last = time.monotonic()
            first = last_step = self.counters.step
            before = self.counters.seconds
            told: TrainingProgress | None = None
            for micro_batches in batches:
                if (stage := self._stage_at(self.counters.step)) != self.stage:
                    del model  # what it hung on the gradients must be gone before the next
                    if self.worker.world > 1:
                        gc.collect()
                    self._enter(stage)
                    model = self._shared_model()
                    self.model.train()
                found = self._step(model, micro_batches)
                counters = self.counters
                done = counters.step
                now = time.monotonic()
                counters.seconds = before + now - began
                if log is not None and (done % self.config.log_every == 0 or done == self.steps):
                    rate = (done - last_step) * self.config.batch_size / max(now - last, 1e-9)
                    last, last_step = now, done
                    log.step(
                        {
                            "step": done,
                            "epoch": round(done / self.per_epoch, 4),
                            **found,
                            **({"stage": self.stage.name} if len(self.stages) > 1 else {}),
                            f"{self.dataset.unit}_per_s": round(rate, 2),
                            "memory_mb": self._memory_mb(),
                            "skipped": counters.skipped,
                            "seconds": round(counters.seconds, 3),
                        }
                    )
                if progress is not None:
                    pace = (now - began) / (done - first)
                    told = TrainingProgress(
                        step=done,
                        steps=self.steps,
                        epoch=done / self.per_epoch,
                        loss=found["loss"],
                        items_per_s=self.config.batch_size / max(pace, 1e-9),
                        unit=self.dataset.unit,
                        seconds_left=pace * (self.steps - done),
                        val=counters.val,
                    )
                    progress(told)
                self._maybe_save(log)
                self._stop_if_hopeless()
            if progress is not None and told is not None:  # the last validation came after it
                progress(replace(told, val=self.counters.val))

    # -- stages -----------------------------------------------------------------------------------

    def _stage_at(self, step: int) -> Stage:
        return [stage for stage in self.stages if stage.start <= step][-1]

    def _enter(self, stage: Stage) -> None:
        """Begin a stage: choose what trains and give it a new optimiser."""
        self.stage = stage
        self.objective.trainable(self.model, stage)
        fused = self.worker.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, stage.weight_decay, stage.rates), lr=stage.lr, fused=fused
        )

    def _shared_model(self) -> Any:
        """Return the model, wrapped where several GPUs train it and each holds all of it.

        On CPUs, and where a part of the model is cut over the GPUs, gradients of what is whole
        are averaged after the backward pass. On CPUs gloo's threads would take the cores
        that compute it (docs/notes/performance-log.md, two workers).
        """
        if self.worker.world == 1 or self.worker.device.type == "cpu" or self.sharded:
            return self.model
        return DistributedDataParallel(
            self.model,
            process_group=self.worker.group,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )

    # -- one step ---------------------------------------------------------------------------------

    def _step(self, model: Any, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """Do one optimisation step, or skip it; return its line of the log."""
        config, counters, stage, worker = self.config, self.counters, self.stage, self.worker
        lr = learning_rate(
            counters.step - stage.start,
            steps=stage.steps,
            peak=stage.lr,
            floor=config.min_lr,
            warmup=config.warmup,
        )
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.objective.weights
        sums = torch.zeros(len(weights) + 2, dtype=torch.float32, device=worker.device)
        counts = self._counts(micro_batches)
        beside: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            torch.manual_seed(_seed(config.seed, counters.step, number, worker.rank))
            wrapped = isinstance(model, DistributedDataParallel)
            with model.no_sync() if wrapped and not last else nullcontext():
                with worker.autocast():
                    losses = self.objective.losses(
                        model, batch.to(worker.device), group=worker.group
                    )
                counts = counts or {name: loss.count for name, loss in losses.items()}
                # A loss may have no terms in a step: then its sum is 0.
                parts = {name: losses[name].total / (counts[name] or 1.0) for name in weights}
                loss: Any = weighted(weights, parts)
                loss.backward()
            for name in losses.keys() - weights.keys():
                beside[name].append(losses[name].total.detach().float())
            sums[:-1] += torch.stack([part.detach().float() for part in (loss, *parts.values())])
        if worker.world > 1 and model is self.model:
            average_gradients(self.model, worker)
        norm = clip_gradients(self.model, config.clip if config.clip else math.inf)
        sums[-1] = float(not torch.isfinite(sums[:-1]).all())
        if worker.world > 1:
            dist.all_reduce(sums, group=worker.group)
            sums /= worker.world
        *means, bad = sums.tolist()
        # Averaged, every rank has the same gradient, so all of them agree.
        if bad or not math.isfinite(float(norm)):
            counters.skipped += 1
            counters.skipped_in_row += 1
        else:
            counters.skipped_in_row = 0
            for entry in self.optimizer.param_groups:
                entry["lr"] = lr * entry["rate"]
            self.optimizer.step()
            counters.recent = [*counters.recent, means[0]][-RECENT:]
        counters.step += 1
        found = {
            name: _finite(value) if counts.get(name, 1.0) else None
            for name, value in zip(("loss", *weights), means, strict=True)
        }
        seen = {name: _finite(float(torch.stack(beside[name]).mean())) for name in sorted(beside)}
        return {**found, **seen, "lr": lr, "grad_norm": _finite(float(norm))}

    def _counts(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Return the divisor of each loss of the step; DDP takes the mean over workers.

        Empty where there is one micro-batch in all: its losses bring their counts along.
        """
        worker = self.worker
        if worker.world == 1 and len(micro_batches) == 1:
            return {}
        own = [self.objective.counts(self.model, batch) for batch in micro_batches]
        names = list(self.objective.weights)
        totals = torch.tensor([sum(each[name] for each in own) for name in names])
        totals = worker.summed(totals.double()) / worker.world
        return dict(zip(names, totals.tolist(), strict=True))

    def _stop_if_hopeless(self) -> None:
        counters, config = self.counters, self.config
        in_row = counters.skipped_in_row >= config.max_skipped_in_row
        share = counters.skipped / counters.step
        often = counters.step >= MIN_STEPS_FOR_SHARE and share > config.max_skipped_share
        if in_row or often:
            what = (
                f"the last {counters.skipped_in_row} steps"
                if in_row
                else f"{counters.skipped:,} of {counters.step:,} steps"
            )
            raise TrainingError(
                f"Training stopped at step {counters.step:,}: {what} had a loss or gradient that "
                "was not finite.",
                hint="Train with a lower lr or in fp32 (-o precision=fp32) in another run folder; "
                f"the last checkpoint in {self.run / 'checkpoints'} is intact.",
                code="not_finite",
            )

    def _memory_mb(self) -> float:
        """Return peak memory of this process: of the GPU where there is one, else resident."""
        device = self.worker.device
        if device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    # -- checkpoints ------------------------------------------------------------------------------

    def _maybe_save(self, log: RunLog | None) -> None:
        config, done = self.config, self.counters.step
        ended = done == self.steps
        validated = False
        if ended or done % (config.val_every * self.per_epoch) == 0:
            val = self.validate()
            validated = bool(val)
        if validated:
            self.counters.val = val
            if log is not None:
                epoch = round(done / self.per_epoch, 4)
                log.validation({"step": done, "epoch": epoch, "val": self.counters.val})
        if not (ended or validated or done % config.save_every == 0):
            return
        writes = self.worker.rank == 0
        if writes or self.sharded:  # what is cut is gathered from all, and kept by one
            tensors = {
                "model": model_tensors(self.model, self.saved, keep=writes),
                "optimizer": self._optimizer(keep=writes),
            }
        if writes:
            save_checkpoint(
                self.run / "checkpoints",
                step=done,
                tensors=tensors,
                state=asdict(self.counters),
                metric=config.metric(self.counters.val) if validated else None,
            )

    def _optimizer(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the optimiser's tensors, as ``<state>/<parameter>``; see :func:`whole`."""
        return {
            f"{what}/{name}": whole(value, keep=keep)
            for name, parameter in self.model.named_parameters()
            for what, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _resume(self) -> None:
        """Load the newest intact checkpoint; rank 0 chooses it for all."""
        found: Checkpoint | None = None
        if self.worker.rank == 0:
            found = latest_checkpoint(self.run / "checkpoints")
        worker = self.worker
        if worker.world > 1:
            step = torch.tensor([-1 if found is None else found.step], device=worker.device)
            dist.broadcast(step, 0, group=worker.group)
            if worker.rank and int(step) >= 0:
                found = checkpoint_at(self.run, int(step))
        if found is None:
            return
        load_tensors(self.model, found.tensors("model"), self.saved)
        self._enter(self._stage_at(found.step))
        # A stage begins with an optimiser of its own, not with that of the stage before.
        tensors = found.tensors("optimizer") if self.stage.start < found.step else {}
        for name, parameter in self.model.named_parameters():
            state = {
                key.partition("/")[0]: like(parameter, value)
                if value.shape == parameter.shape
                else value.to(parameter.device)
                for key, value in tensors.items()
                if key.partition("/")[2] == name
            }
            if state:
                self.optimizer.state[parameter] = state
        self.counters = Counters(**found.state())

    def _pids(self) -> list[int]:
        """Return process ids of all ranks."""
        pids = torch.zeros(self.worker.world, dtype=torch.int64)
        pids[self.worker.rank] = os.getpid()
        return [int(pid) for pid in self.worker.summed(pids)]

    # -- validation -------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Measure the model on the validation items; every rank takes part and returns the same."""
        self.model.eval()
        try:
            return self.objective.evaluate(self.model, self.dataset, self.worker)
        finally:
            self.model.train()


def average_gradients(model: torch.nn.Module, worker: Worker) -> None:
    """Put the mean over all workers in the place of each gradient, some megabytes at a time.

    Every parameter that trains has a gradient in every worker, as DDP demands it, too. Those of
    parameters that are cut over the workers are averaged already.
    """
    left: list[torch.Tensor] = []
    for name, own in model.named_parameters():
        if own.requires_grad and not is_cut(own):
            if own.grad is None:
                raise RuntimeError(f"{name} has no gradient, so workers cannot average it")
            left.append(own.grad)
    while left:
        ends = list(itertools.accumulate(grad.numel() for grad in left))
        count = max(1, bisect.bisect_right(ends, AT_ONCE))
        grads, left = left[:count], left[count:]
        joint = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(joint, group=worker.group)
        joint /= worker.world
        means = torch.split(joint, [grad.numel() for grad in grads])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))


def weighted(weights: Mapping[str, float], losses: Mapping[str, Any]) -> Any:
    """Return the weighted sum of losses, in the weights' order; a weight of 0 adds nothing."""
    terms = [
        losses[name] if weight == 1 else weight * losses[name]
        for name, weight in weights.items()
        if weight
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _seed(*key: int) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, ("dropout", *key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
