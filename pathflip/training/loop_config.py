"""Settings that every training has: data, schedule, workers, checkpoints.

``config.py`` adds those of slides and ``tree_config.py`` those of patch trees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pathflip.checkpoints import other_kind
from pathflip.config import check_positive, load_config, read_yaml
from pathflip.errors import CheckpointError, ConfigError

MAY_CHANGE = (
    "min_workers", "max_workers", "cpus_per_worker", "cache_mb", "log_every", "save_every",
    "max_failures", "shard", "recompute", "compile",
)  # fmt: skip
"""Settings a resumed run may be given anew: they change how it runs, not what comes out."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of any training.

    Attributes:
        encoder: Encoder of the features to train on; None where the archive holds one encoder.
        source: Source of the captions to train on; None takes the first source each slide has, and
            for trees the only one there is.
        val_fraction: Share of patients held out to validate where the archive names no split.
        batch_size: Number of items (slides, trees) in a step, over all workers and micro-batches.
        accumulate: Micro-batches a step is cut into, to save memory; negatives come from one
            micro-batch (of all workers, with gathered negatives).
        epochs: Number of passes over the training items.
        lr: Peak learning rate.
        min_lr: Learning rate at the end.
        warmup: Share of the steps in which the learning rate rises linearly.
        weight_decay: Weight decay of matrices; biases, norms, scales and query tokens have none.
        clip: Maximum norm of the gradient; 0 for no limit.
        seed: Seed of weights, order, draws, dropout, and of the split where the archive has none.
        precision: ``bf16`` (autocast), ``fp32``, or ``auto``: bf16 on GPUs.
        device: ``cpu``, ``cuda``, or ``auto``: GPUs where the cluster has some.
        min_workers: Minimum number of workers to go on with; None: as many as max_workers.
        max_workers: Maximum number of workers; None: one per GPU, one on CPUs.
        cpus_per_worker: Number of cores of a worker; None: an even share of this machine's,
            one on a cluster.
        cache_mb: Largest features (MiB) that each worker keeps in memory.
        log_every: Number of steps between lines of metrics.jsonl.
        save_every: Number of steps between checkpoints; each validation writes one, too.
        val_every: Number of epochs between validations.
        max_skipped_in_row: Number of non-finite steps in a row at which training stops.
        max_skipped_share: Share of non-finite steps (of 100 or more) above which training stops.
        max_failures: Number of times Ray restarts the workers after one died.
    """

    encoder: str | None = None
    source: str | None = None
    val_fraction: float = 0.1
    batch_size: int = 64
    accumulate: int = 1
    epochs: int = 50
    lr: float = 1e-4
    min_lr: float = 5e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
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
        check_positive(
            self, "epochs", "batch_size", "accumulate", "min_workers", "max_workers",
            "cpus_per_worker", "log_every", "save_every", "val_every", "max_skipped_in_row",
        )  # fmt: skip
        self._check_within(
            val_fraction=0.9, warmup=1.0, lr=math.inf, min_lr=math.inf, weight_decay=math.inf,
            clip=math.inf, max_skipped_share=1.0, cache_mb=math.inf, max_failures=math.inf,
        )  # fmt: skip
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

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rates of parts of the model, as multiples of ``lr``; 0 freezes a part."""
        return {}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many optimisation steps the run has."""
        return self.epochs * steps_per_epoch

    def _check_within(self, **highest: float) -> None:
        for name, high in highest.items():
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise ConfigError(f"{name} is {value}.", hint=f"It must be 0 to {high:g}.")


def save_settings(config: LoopConfig) -> str:
    """Return the settings as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


C = TypeVar("C", bound=LoopConfig)


def read_settings(run: Path, kind: type[C]) -> C:
    """Read the settings of a run.

    Args:
        run: The run folder.
        kind: The settings it must have.

    Raises:
        CheckpointError: They are missing, not those of this version, or of another kind of run.
    """
    path = run / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"There is no run at {run}.", code="missing")
    try:
        content = read_yaml(path)
        # Runs of version 0.1.0 do not say what they are of.
        found = content.get("kind", "instruct" if "instruct" in content else "contrastive")
        wanted = next(item.default for item in fields(kind) if item.name == "kind")
        if found == wanted:
            return load_config(kind, file=path)
    except ConfigError as error:
        raise CheckpointError(
            f"The settings of the run cannot be used: {error.message}",
            hint="Begin again in another run folder.",
            code="damaged",
        ) from error
    began = f" it began with: {content['run']}" if found == "instruct" else ""
    hint = f"Name the run of pathflip pretrain{began}." if began else None
    raise other_kind(run, found, hint=hint)


def differing(made: LoopConfig, asked: LoopConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, value made with, value asked for) of settings that would change the result."""
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


def recall_or_loss(best: Literal["recall", "loss", "last"], val: Mapping[str, Any]) -> float | None:
    """Return the checkpoint-selection metric of a validation by retrieval; higher is better.

    Args:
        best: Criterion: the mean of R@1/5/10 both ways, the loss, or none.
        val: The validation.
    """
    if best == "last":
        return None
    value = val["mean_recall"] if best == "recall" else val["loss"]
    if value is None:
        return None
    return float(value) if best == "recall" else -float(value)


def from_preset(
    kind: type[C],
    presets: Mapping[str, Any],
    default: str,
    *,
    preset: str | None = None,
    base: C | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> C:
    """Return settings of a pretraining: a preset, a file over it, then overrides, then flags.

    Args:
        kind: Class of the settings.
        presets: Presets by name, each with the settings of model and training.
        default: Preset where none is named.
        preset: The preset; without it the one the overrides or the file name, else ``default``.
        base: Settings to start from instead of a preset's.
        file: YAML file of settings.
        overrides: ``key=value``; the model's are ``model.key=value``.
        given: Values that win over everything.

    Raises:
        ConfigError: Unknown preset or setting, or a value that cannot be.
    """
    if base is not None:
        return load_config(kind, base=base, file=file, overrides=overrides, given=given)
    name = preset_name(preset, presets, default, file, overrides)
    return load_config(
        kind,
        base={**presets[name].train, "model": presets[name].model},
        file=file,
        overrides=overrides,
        given={**(given or {}), "preset": name},
    )


def preset_name(
    asked: str | None,
    presets: Mapping[str, Any],
    default: str,
    file: str | Path | None,
    overrides: Sequence[str],
) -> str:
    """Return the preset asked for, else the one named by the overrides, else by the file.

    Raises:
        ConfigError: There is no such preset.
    """
    from_file = {} if file is None else read_yaml(file)
    named = [text.partition("=")[2].strip() for text in overrides if text.startswith("preset=")]
    name: str = asked or (named[-1] if named else from_file.get("preset")) or default
    if name not in presets:
        raise ConfigError(
            f"There is no preset {name!r}.", hint=f"Known: {', '.join(sorted(presets))}."
        )
    return name
