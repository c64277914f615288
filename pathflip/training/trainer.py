"""The training loop: one process of one or many, without Ray.

``jobs/ray_train.py`` runs :func:`train` in Ray Train workers; tests and benchmarks call it as it
is. It reads everything from the run folder, which ``run_dir.prepare`` made, and goes on from the
newest intact checkpoint there. What is trained is a :class:`pathflip.training.objective.Task`.
Learning rate, order, draws and dropout are functions of (seed, step), so a checkpoint needs no
state of theirs but the step.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pathflip.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint, verify_whole
from pathflip.errors import TrainingError
from pathflip.models import PathFLIP
from pathflip.training.config import AnyConfig, learning_rate, parameter_groups, read_settings
from pathflip.training.dataset import Corpus
from pathflip.training.loader import Batch, Batches, FeatureReader
from pathflip.training.objective import Stage, task_of
from pathflip.training.run_dir import RunLog, checkpoint_at, load_tensors, model_tensors

RECENT = 50
"""Steps whose mean is "the loss" of a run."""
VAL_REGIONS = 1024
"""A validation batch holds at most these many regions, with padding."""
MIN_STEPS_FOR_SHARE = 100


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is."""

    step: int
    steps: int
    epoch: float
    loss: float | None
    slides_per_s: float
    seconds_left: float

    @property
    def fraction(self) -> float:
        """Share of the steps done."""
        return self.step / max(1, self.steps)

    def line(self) -> str:
        """One line for people."""
        loss = "" if self.loss is None else f" · loss {self.loss:.4f}"
        return (
            f"train {self.step:,}/{self.steps:,} steps · epoch {self.epoch:.1f}{loss} · "
            f"{self.slides_per_s:,.1f} slides/s · {_left(self.seconds_left)}"
        )


def _left(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min left"
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


@dataclass
class Counters:
    """What a checkpoint remembers besides tensors.

    Attributes:
        step: Steps done, skipped ones among them; it is the position in data and schedule.
        skipped: Steps whose loss or gradient was not finite.
        skipped_in_row: Of these, how many just now.
        seconds: Time trained, all attempts together.
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
    *,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train a prepared run to its end, from wherever it stands.

    With several processes, ``torch.distributed`` is initialised and each calls this with its rank.
    More processes than can share a batch evenly are let go at once.

    Args:
        run: The run folder.
        rank: This process.
        world: Number of processes.
        device: ``cpu`` or ``cuda``.
        progress: Called on rank 0 after every step.

    Raises:
        TrainingError: Losses or gradients were not finite too often.
        CheckpointError, ArchiveError: The run or its archive is damaged.
    """
    run = Path(run)
    config = read_settings(run)
    used = shareable(config.batch_size // config.accumulate, world)
    group = own = None
    if world > 1:
        group = dist.new_group(list(range(used)))
        alone = [dist.new_group([other]) for other in range(world)]
        own = alone[rank]
    if rank < used:
        _Trainer(run, config, rank, used, device, group, own).fit(progress)


def shareable(slides: int, world: int) -> int:
    """Returns how many of ``world`` workers can share so many slides evenly."""
    return next(count for count in range(min(world, slides), 0, -1) if slides % count == 0)


class _Trainer:
    def __init__(
        self,
        run: Path,
        config: AnyConfig,
        rank: int,
        world: int,
        device: str,
        group: Any,
        own: Any,
    ) -> None:
        self.run, self.config, self.rank, self.world = run, config, rank, world
        self.device = torch.device(device)
        self.group, self.own = group, own
        self.task = task_of(config)
        self.losses = self.task.losses
        self.corpus = Corpus.load(run / "data.parquet")
        verify_whole(run / "init")
        vision = PathFLIP.from_pretrained(str(run / "init"))
        reader = FeatureReader(self.corpus, cache_bytes=config.cache_mb << 20)
        self.batches = Batches(
            reader,
            config.sampling(),
            rank=rank,
            world=world,
            local=vision.config.negatives == "local",
        )
        self.steps = config.total_steps(self.batches.steps_per_epoch)
        self.stages = self.task.stages(self.batches.steps_per_epoch)
        self.model: Any = self.task.model(vision, self.corpus).to(self.device)
        self.kept = self.task.kept(self.model)
        self._enter(self.stages[0])
        self.counters = Counters()
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )
        self._val_slides = self.corpus.members("val").tolist()

    def fit(self, progress: Callable[[Progress], None] | None) -> None:
        """Train to the last step."""
        with ExitStack() as stack:
            log = stack.enter_context(RunLog(self.run)) if self.rank == 0 else None
            self._resume()
            pids = self._pids()
            if log is not None:
                log.begin(self.counters.step, pids=pids)
            model = self._shared_model()
            stream = self.batches.stream(
                self.counters.step, self.steps, pin=self.device.type == "cuda"
            )
            stack.enter_context(closing(stream))  # type: ignore[type-var]
            self.model.train()
            began = last = time.monotonic()
            first = last_step = self.counters.step
            before = self.counters.seconds
            for micro_batches in stream:
                if (stage := self._stage_at(self.counters.step)) != self.stage:
                    del model  # what it hung on the gradients must be gone before the next
                    if self.world > 1:
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
                            "epoch": round(done / self.batches.steps_per_epoch, 4),
                            **found,
                            **({"stage": self.stage.name} if len(self.stages) > 1 else {}),
                            "slides_per_s": round(rate, 2),
                            "memory_mb": self._memory_mb(),
                            "skipped": counters.skipped,
                            "seconds": round(counters.seconds, 3),
                        }
                    )
                if progress is not None:
                    pace = (now - began) / (done - first)
                    progress(
                        Progress(
                            step=done,
                            steps=self.steps,
                            epoch=done / self.batches.steps_per_epoch,
                            loss=found["loss"],
                            slides_per_s=self.config.batch_size / max(pace, 1e-9),
                            seconds_left=pace * (self.steps - done),
                        )
                    )
                self._maybe_save(log)
                self._stop_if_hopeless()

    # -- stages -----------------------------------------------------------------------------------

    def _stage_at(self, step: int) -> Stage:
        return [stage for stage in self.stages if stage.start <= step][-1]

    def _enter(self, stage: Stage) -> None:
        """Begin a stage: what trains, and an optimiser that knows nothing yet."""
        self.stage = stage
        self.task.enter(self.model, stage)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, stage.weight_decay, stage.rates), lr=stage.lr, fused=fused
        )

    def _shared_model(self) -> Any:
        """The model, wrapped where several processes train it."""
        if self.world == 1:
            return self.model
        return DistributedDataParallel(
            self.model,
            process_group=self.group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

    # -- one step ---------------------------------------------------------------------------------

    def _step(self, model: Any, micro_batches: list[Batch]) -> dict[str, Any]:
        """Do one optimisation step, or skip it; returns what is logged of it."""
        config, counters, stage = self.config, self.counters, self.stage
        lr = learning_rate(
            counters.step - stage.start,
            steps=stage.steps,
            peak=stage.lr,
            floor=config.min_lr,
            warmup=config.warmup,
        )
        self.optimizer.zero_grad(set_to_none=True)
        many = len(self.losses)
        sums = torch.zeros(many + 1, dtype=torch.float32, device=self.device)
        shares = self._shares(micro_batches)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            torch.manual_seed(_seed(config.seed, counters.step, number, self.rank))
            with nullcontext() if last or self.world == 1 else model.no_sync():
                output = self._forward(model, batch, self.group)
                parts = self.task.parts(output, shares[number])
                loss: Any = parts[0] / len(micro_batches)
                loss.backward()
            detached = torch.stack([part.detach().float() for part in parts])
            sums[:many] += detached / len(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip if config.clip else math.inf
        )
        sums[many] = float(not torch.isfinite(sums[:many]).all())
        if self.world > 1:
            dist.all_reduce(sums, group=self.group)
            sums /= self.world
        *losses, bad = sums.tolist()
        # After DDP has averaged, every rank has the same gradient, so all of them agree.
        if bad or not math.isfinite(float(norm)):
            counters.skipped += 1
            counters.skipped_in_row += 1
        else:
            counters.skipped_in_row = 0
            for entry in self.optimizer.param_groups:
                entry["lr"] = lr * entry["rate"]
            self.optimizer.step()
            counters.recent = [*counters.recent, losses[0]][-RECENT:]
        counters.step += 1
        found = {
            name: value if math.isfinite(value) else None
            for name, value in zip(self.losses, losses, strict=True)
        }
        return {**found, "lr": lr, "grad_norm": _finite(float(norm))}

    def _shares(self, micro_batches: list[Batch]) -> list[float]:
        """How much each micro-batch counts, 1 in the mean over those of all workers."""
        alone = self.world == 1 and len(micro_batches) == 1
        weights = None if alone else self.task.weights(self.model, micro_batches)
        if weights is None:
            return [1.0] * len(micro_batches)
        total = torch.tensor([sum(weights)], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        mean = float(total) / (self.world * len(weights))
        return [weight / mean for weight in weights]

    def _forward(self, model: Any, batch: Batch, group: Any) -> Any:
        move: dict[str, Any] = {"device": self.device, "non_blocking": True}
        cast = (
            torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        )
        with cast:
            features, mask = batch.features.to(**move).float(), batch.patch_mask.to(**move)
            return self.task.forward(model, features, mask, batch, group)

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
        """Peak memory of this process so far: of the GPU where there is one, else resident."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    # -- checkpoints ------------------------------------------------------------------------------

    def _maybe_save(self, log: RunLog | None) -> None:
        config, done = self.config, self.counters.step
        ended = done == self.steps
        validated = False
        if self._val_slides:
            every = config.val_every * self.batches.steps_per_epoch
            validated = ended or done % every == 0
        if validated:
            self.counters.val = self.validate()
            if log is not None:
                epoch = round(done / self.batches.steps_per_epoch, 4)
                log.validation({"step": done, "epoch": epoch, "val": self.counters.val})
        if self.rank == 0 and (ended or validated or done % config.save_every == 0):
            save_checkpoint(
                self.run / "checkpoints",
                step=done,
                tensors={
                    "model": model_tensors(self.model, self.kept),
                    "optimizer": self._optimizer(),
                },
                state=asdict(self.counters),
                metric=config.metric(self.counters.val) if validated else None,
            )

    def _optimizer(self) -> dict[str, torch.Tensor]:
        """The optimiser's tensors, as ``<what>/<parameter>``."""
        return {
            f"{what}/{name}": value
            for name, parameter in self.model.named_parameters()
            for what, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _resume(self) -> None:
        """Load the newest intact checkpoint; rank 0 says which, so that all take the same."""
        found: Checkpoint | None = None
        if self.rank == 0:
            found = latest_checkpoint(self.run / "checkpoints")
        if self.world > 1:
            step = torch.tensor([-1 if found is None else found.step], device=self.device)
            dist.broadcast(step, 0, group=self.group)
            if self.rank and int(step) >= 0:
                found = checkpoint_at(self.run, int(step))
        if found is None:
            return
        load_tensors(self.model, found.tensors("model"), self.kept)
        self._enter(self._stage_at(found.step))
        # A stage begins with an optimiser of its own, not with that of the stage before.
        tensors = found.tensors("optimizer") if self.stage.start < found.step else {}
        for name, parameter in self.model.named_parameters():
            state = {
                key.partition("/")[0]: value.to(parameter.device)
                for key, value in tensors.items()
                if key.partition("/")[2] == name
            }
            if state:
                self.optimizer.state[parameter] = state
        self.counters = Counters(**found.state())

    def _pids(self) -> list[int]:
        """Process ids of all ranks."""
        pids = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        pids[self.rank] = os.getpid()
        if self.world > 1:
            dist.all_reduce(pids, group=self.group)
        return [int(pid) for pid in pids]

    # -- validation -------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Measure the losses on the validation slides, and what else the task judges by.

        The same each time; every rank takes part and returns the same.
        """
        slides = self._val_slides
        place = {slide: row for row, slide in enumerate(slides)}
        many = len(self.losses)
        sums = torch.zeros(many + 1, dtype=torch.float64)
        self.model.eval()
        try:
            both = torch.zeros(0)
            chunks = val_chunks(self.corpus, slides, most_slides=self.task.val_slides)
            for chunk in chunks[self.rank :: self.world]:
                batch = self.batches.draw(chunk, chunk, epoch=0, validating=True)
                output = self._forward(self.model, batch, self.own)
                if (vectors := self.task.vectors(output)) is not None:
                    if both.numel() == 0:
                        both = torch.zeros(2, len(slides), vectors.shape[-1])
                    both[:, [place[i] for i in chunk]] = vectors.float().cpu()
                size = self.task.size(output, chunk)
                parts = self.task.parts(output, 1.0)
                sums[:many] += torch.stack([part.double().cpu() for part in parts]) * size
                sums[many] += size
        finally:
            self.model.train()
        if self.world > 1:
            both, sums = self._shared(both, len(slides), sums)
        means = (sums[:many] / sums[many]).tolist()
        losses = {name: _finite(value) for name, value in zip(self.losses, means, strict=True)}
        return self.task.judge(self.corpus, slides, both, losses)

    def _shared(
        self, both: torch.Tensor, rows: int, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join what the ranks computed: each filled in the rows of its slides."""
        width = torch.tensor([both.shape[-1] if both.numel() else 0], device=self.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=self.group)
        total = sums.to(self.device)
        dist.all_reduce(total, group=self.group)
        if not int(width):
            return both, total.cpu()
        if both.numel() == 0:  # more ranks than chunks
            both = torch.zeros(2, rows, int(width))
        joined = both.to(self.device)
        dist.all_reduce(joined, group=self.group)
        return joined.cpu(), total.cpu()


def val_chunks(corpus: Corpus, slides: Sequence[int], *, most_slides: int = 16) -> list[list[int]]:
    """Returns validation batches: consecutive slides, bounded in number and padded regions."""
    chunks: list[list[int]] = []
    for slide in slides:
        together = [*chunks[-1], slide] if chunks else []
        most = max((corpus.num_regions[i] for i in together), default=0)
        if not chunks or len(together) > most_slides or most * len(together) > VAL_REGIONS:
            chunks.append([slide])
        else:
            chunks[-1].append(slide)
    return chunks


def _seed(*key: int) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, ("dropout", *key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
