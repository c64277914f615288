"""Settings of a training: a preset, with a file, ``-o key=value`` and flags over it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pathflip.config import load_config, read_yaml
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PRESETS, InstructConfig, PathFLIPConfig
from pathflip.training.examples import Examples
from pathflip.training.slide_batches import Sampling

DEFAULT_PRESET, DEFAULT_TUNE_PRESET = "pathflip/paper", "instruct/paper"
MAY_CHANGE = (
    "min_workers", "max_workers", "cpus_per_worker", "cache_mb", "log_every", "save_every",
    "max_failures",
)  # fmt: skip
"""Settings a resumed run may be given anew: they change how it runs, not what comes out."""
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
class TrainConfig:
    """Settings of any training.

    Attributes:
        encoder: Encoder of the features to train on; None where the archive holds one encoder.
        source: Source of the captions to train on; None takes the first source each slide has.
        subcaption_source: Units that sub-captions are drawn from (formerly ``pieces``):
            sentences; sentences that affirm something
            (no region shows "No necrosis."); or the statements a language model made of them
            (slides without any use their sentences).
        num_subcaptions: K, number of sub-captions of a slide in a step.
        max_merged: Maximum number of sentences merged into one sub-caption.
        v1_window_bug: Draw windows of sentences as the published code does: never the last
            (formerly ``contig_off_by_one``).
        val_fraction: Share of patients held out to validate where the archive names no split.
        batch_size: Number of slides in a step, over all workers and micro-batches.
        accumulate: Micro-batches a step is cut into, to save memory; negatives come from one
            micro-batch (of all workers, with gathered negatives).
        max_regions: Maximum number of regions of a slide in a training step; None for all.
            Validation always uses all.
        epochs: Number of passes over the training slides.
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
    subcaption_source: Literal["sentences", "affirmed", "statements"] = field(
        default="sentences", metadata={"formerly": "pieces"}
    )
    num_subcaptions: int = 8
    max_merged: int = 3
    v1_window_bug: bool = field(default=False, metadata={"formerly": "contig_off_by_one"})
    val_fraction: float = 0.1
    batch_size: int = 64
    accumulate: int = 1
    max_regions: int | None = 24
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
        self._check_positive(
            "num_subcaptions", "max_merged", "epochs", "batch_size", "accumulate", "max_regions",
            "min_workers", "max_workers", "cpus_per_worker", "log_every", "save_every",
            "val_every", "max_skipped_in_row",
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

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}.", hint="It must be 1 or more.")

    def _check_within(self, **highest: float) -> None:
        for name, high in highest.items():
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise ConfigError(f"{name} is {value}.", hint=f"It must be 0 to {high:g}.")

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
        steps: Number of optimisation steps; overrides ``epochs`` where given.
        best: Criterion for the exported weights: the mean of R@1/5/10 both ways on the
            validation slides (``recall``), their loss (``loss``), or the last (``last``).
    """

    kind: Literal["contrastive"] = "contrastive"
    family: Literal["pathflip"] = "pathflip"
    preset: str = DEFAULT_PRESET
    model: PathFLIPConfig = field(default_factory=PathFLIPConfig)
    steps: int | None = None
    best: Literal["recall", "loss", "last"] = "recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("steps")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many optimisation steps the run has."""
        return self.steps or self.epochs * steps_per_epoch

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Return the checkpoint-selection metric of a validation; higher is better."""
        if self.best == "last":
            return None
        value = val["mean_recall"] if self.best == "recall" else val["loss"]
        if value is None:
            return None
        return float(value) if self.best == "recall" else -float(value)


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
        captions: Style of caption targets: ``whole``, unchanged; ``shuffled``, their sentences in
            a random order, for reports whose order means nothing; ``affirmed``, what they affirm,
            in the order of the alphabet.
        align: Weight of the vision model's own losses, which train along in the second stage.
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
    captions: Literal["whole", "shuffled", "affirmed"] = "whole"
    align: float = 0.0
    best: Literal["loss", "last"] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("examples_per_slide")
        self._check_within(
            projector_epochs=math.inf, projector_lr=math.inf, projector_rate=math.inf,
            vision_rate=math.inf, caption_share=1.0, drop_options_prob=1.0, align=math.inf,
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
            ),
        )

    def metric(self, val: Mapping[str, Any]) -> float | None:
        """Return the checkpoint-selection metric of a validation; higher is better."""
        value = None if self.best == "last" else val["loss_answer"]
        return None if value is None else -float(value)


AnyConfig = PretrainConfig | TuneConfig


def resolve(
    preset_name: str | None = None,
    *,
    base: PretrainConfig | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> PretrainConfig:
    """Return settings of a pretraining: a preset, a file over it, then overrides, then flags.

    Args:
        preset_name: The preset; without it the one the overrides or the file name, else
            ``pathflip/paper``.
        base: Settings to start from instead of a preset's.
        file: YAML file of settings.
        overrides: ``key=value``; the model's are ``model.key=value``.
        given: Values that win over everything.

    Raises:
        ConfigError: Unknown preset or setting, or a value that cannot be.
    """
    if base is not None:
        return load_config(PretrainConfig, base=base, file=file, overrides=overrides, given=given)
    name = _preset_name(preset_name, PRESETS, DEFAULT_PRESET, file, overrides)
    return load_config(
        PretrainConfig,
        base={**PRESETS[name].train, "model": PRESETS[name].model},
        file=file,
        overrides=overrides,
        given={**(given or {}), "preset": name},
    )


def resolve_tuning(
    preset_name: str | None = None,
    *,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> TuneConfig:
    """Return the settings of a tuning; see :func:`resolve`.

    Folders are made absolute; what is no folder here is a name on the hub.
    """
    name = _preset_name(preset_name, TUNE_PRESETS, DEFAULT_TUNE_PRESET, file, overrides)
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


def _preset_name(
    asked: str | None,
    presets: Mapping[str, Any],
    default: str,
    file: str | Path | None,
    overrides: Sequence[str],
) -> str:
    """The preset asked for, else the one named by the overrides, else by the file."""
    from_file = {} if file is None else read_yaml(file)
    named = [text.partition("=")[2].strip() for text in overrides if text.startswith("preset=")]
    name: str = asked or (named[-1] if named else from_file.get("preset")) or default
    if name not in presets:
        raise ConfigError(
            f"There is no preset {name!r}.", hint=f"Known: {', '.join(sorted(presets))}."
        )
    return name


def save_settings(config: TrainConfig) -> str:
    """Return the settings as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


C = TypeVar("C", bound=TrainConfig)


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
    command = {"contrastive": "pretrain", "instruct": "tune"}.get(found, found)
    began = f" it began with: {content['run']}" if found == "instruct" else ""
    raise CheckpointError(
        f"{run} is a run of pathflip {command}.",
        hint=f"Name the run of pathflip pretrain{began}." if began else "Name another run folder.",
        code="other_kind",
    )


def differing(made: TrainConfig, asked: TrainConfig) -> list[tuple[str, Any, Any]]:
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
