"""The settings of a pretraining run, and what follows from them: schedule, decay, metric.

A preset gives the model and how to train it; a file, ``-o key=value`` and flags go over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from jobs.batches import Sampling
from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PRESETS, PathFLIPConfig, preset

DEFAULT_PRESET = "pathflip/paper"
MAY_CHANGE = (
    "min_workers", "max_workers", "cpus_per_worker", "cache_mb", "log_every", "save_every",
    "max_failures",
)  # fmt: skip
"""Settings a resumed run may be given anew: they change how it runs, not what comes out."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of ``pathflip pretrain``; a preset fills in model and training.

    Attributes:
        preset: The preset these settings started from, for the record.
        model: The model, see :class:`pathflip.models.PathFLIPConfig`.
        encoder: Whose features to train on; None where the archive holds one encoder.
        source: Which captions to train on; None takes the first source each slide has.
        pieces: What sub-captions are drawn from: sentences; those that affirm something (there is
            no region in which "No necrosis." could be found); or the statements a language model
            made of them (slides without any use their sentences).
        num_subcaptions: K, sub-captions of a slide in a step.
        max_merged: Most sentences merged into one sub-caption.
        contig_off_by_one: Draw windows of sentences as the published code does: never the last.
        val_fraction: Share of patients held out to validate where the archive names no split.
        epochs: Passes over the training slides.
        steps: Optimisation steps; over epochs where given.
        batch_size: Slides of a step, of all workers and micro-batches together.
        accumulate: Micro-batches a step is cut into, to save memory; negatives come from one
            micro-batch (of all workers, with gathered negatives).
        max_regions: Most regions of a slide in a training step; None for all. Validation always
            uses all.
        lr: Peak learning rate.
        min_lr: Learning rate at the end.
        warmup: Share of the steps in which the learning rate rises linearly.
        weight_decay: Of matrices; biases, norms, scales, query tokens have none.
        clip: Largest norm of the gradient; 0 for no limit.
        seed: Of weights, order, draws, dropout and the split where the archive names none.
        best: What decides which weights are exported: mean of R@1/5/10 both ways on the
            validation slides (``recall``), their loss (``loss``), or the last (``last``).
        precision: ``bf16`` (autocast), ``fp32``, or ``auto``: bf16 on GPUs.
        device: ``cpu``, ``cuda``, or ``auto``: GPUs where the cluster has some.
        min_workers: Fewest workers to go on with; None: as many as max_workers.
        max_workers: Most workers; None: one a GPU, one on CPUs.
        cpus_per_worker: Cores of a worker; None: all there are, shared evenly, on this machine,
            one on a cluster.
        cache_mb: Features are kept in memory, in each worker, if they are no larger (MiB).
        log_every: Steps between lines of metrics.jsonl.
        save_every: Steps between checkpoints; there is one at each validation, too.
        val_every: Epochs between validations.
        max_skipped_in_row: Stop when so many steps in a row were not finite.
        max_skipped_share: Stop when a larger share of the steps (of 100 or more) was not.
        max_failures: Times Ray restarts the workers after one died.
    """

    preset: str = DEFAULT_PRESET
    model: PathFLIPConfig = field(default_factory=PathFLIPConfig)
    encoder: str | None = None
    source: str | None = None
    pieces: Literal["sentences", "affirmed", "statements"] = "sentences"
    num_subcaptions: int = 8
    max_merged: int = 3
    contig_off_by_one: bool = False
    val_fraction: float = 0.1
    epochs: int = 50
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    max_regions: int | None = 24
    lr: float = 1e-4
    min_lr: float = 5e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    best: Literal["recall", "loss", "last"] = "recall"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    min_workers: int | None = None
    max_workers: int | None = None
    cpus_per_worker: int | None = None
    cache_mb: int = 2048
    log_every: int = 10
    save_every: int = 200
    val_every: int = 1
    max_skipped_in_row: int = 10
    max_skipped_share: float = 0.1
    max_failures: int = 3

    def __post_init__(self) -> None:
        positive = (
            "num_subcaptions", "max_merged", "epochs", "steps", "batch_size", "accumulate",
            "max_regions", "min_workers", "max_workers", "cpus_per_worker", "log_every",
            "save_every", "val_every", "max_skipped_in_row",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}.", hint="It must be 1 or more.")
        for name, low, high in (
            ("val_fraction", 0.0, 0.9), ("warmup", 0.0, 1.0), ("lr", 0.0, math.inf),
            ("min_lr", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("clip", 0.0, math.inf),
            ("max_skipped_share", 0.0, 1.0), ("cache_mb", 0, math.inf),
            ("max_failures", 0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}.", hint=f"It must be {low:g} to {high:g}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulate} micro-batches "
                "of equal size.",
                hint="Make batch_size a multiple of accumulate.",
            )
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            raise ConfigError(
                f"min_workers {self.min_workers} is more than max_workers {self.max_workers}.",
                hint="Give --min-workers a number up to --max-workers.",
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns how many optimisation steps the run has."""
        return self.steps or self.epochs * steps_per_epoch

    def sampling(self) -> Sampling:
        """Returns what is drawn from each slide."""
        return Sampling(
            seed=self.seed,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            num_subcaptions=self.num_subcaptions,
            max_regions=self.max_regions,
            max_merged=self.max_merged,
            statements=self.pieces == "statements",
            contig_off_by_one=self.contig_off_by_one,
        )

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Returns what the best checkpoint has most of, from a validation."""
        if self.best == "last":
            return None
        value = val["mean_recall"] if self.best == "recall" else val["loss"]
        if value is None:
            return None
        return float(value) if self.best == "recall" else -float(value)


def resolve(
    preset_name: str | None = None,
    *,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> PretrainConfig:
    """Returns the settings of a preset with a file, ``key=value`` overrides and flags over it.

    Args:
        preset_name: The preset; without it the one the overrides or the file name, else
            ``pathflip/paper``.
        file: YAML file of settings.
        overrides: ``key=value``; the model's are ``model.key=value``.
        given: Values that win over everything.

    Raises:
        ConfigError: Unknown preset or setting, or a value that cannot be.
    """
    from_file: dict[str, Any] = {}
    if file is not None:
        load_config(PretrainConfig, file=file)  # what is wrong in it is told with its name
        from_file = yaml.safe_load(Path(file).read_text())
    named = [text.partition("=")[2].strip() for text in overrides if text.startswith("preset=")]
    name = preset_name or (named[-1] if named else from_file.get("preset")) or DEFAULT_PRESET
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}.", hint=f"Known: {', '.join(sorted(PRESETS))}."
        )
    base = preset(name)
    layers = [
        *_flat({**base.train, "model": _values(base.model)}),
        *_flat(from_file),
        *overrides,
    ]
    return load_config(PretrainConfig, overrides=layers, given={**(given or {}), "preset": name})


def as_overrides(file: str | Path) -> list[str]:
    """Returns a file's settings as ``key=value``.

    Raises:
        ConfigError: The file or a setting in it is wrong.
    """
    load_config(PretrainConfig, file=file)
    return list(_flat(yaml.safe_load(Path(file).read_text())))


def _values(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = asdict(config)
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def save_settings(config: PretrainConfig) -> str:
    """Returns the settings as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


def load_settings(run: Path) -> PretrainConfig:
    """Reads the settings of a run.

    Raises:
        CheckpointError: If they are missing or not those of this version.
    """
    path = run / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"There is no run at {run}.", code="missing")
    try:
        return load_config(PretrainConfig, file=path)
    except ConfigError as error:
        raise CheckpointError(
            f"The settings of the run cannot be used: {error.message}",
            hint="Begin again in another run folder.",
            code="damaged",
        ) from error


def differing(made: PretrainConfig, asked: PretrainConfig) -> list[tuple[str, Any, Any]]:
    """Returns (key, value made with, value asked for) of settings that would change the result."""
    mine, theirs = (dict(_leaves(asdict(config))) for config in (made, asked))
    return [
        (key, mine.get(key), theirs.get(key))
        for key in dict.fromkeys([*mine, *theirs])
        if key not in MAY_CHANGE and mine.get(key) != theirs.get(key)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def learning_rate(step: int, *, steps: int, peak: float, floor: float, warmup: float) -> float:
    """Returns the learning rate of a step (from 0): linear to the peak, then cosine to the floor.

    Args:
        step: The step.
        steps: All steps.
        peak: Rate at the end of the warm-up.
        floor: Rate of the last step.
        warmup: Share of the steps that warm up.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, steps - 1 - rising)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the parameters in two groups: matrices decay, all else does not.

    Not decayed are biases, norms, scales and the bias of the sigmoid loss (vectors and scalars),
    and the query tokens.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tokens = "query_tokens" in name or "queries" in name or "latent" in name
            (plain if parameter.ndim < 2 or tokens else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
