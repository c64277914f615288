"""The run folder: preparation, training log, export.

``prepare`` writes settings, the items and the model to start from; rank 0 writes ``RunLog`` while
training; ``finish`` exports the best weights with their model card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from pathflip.archive.storage import normalise
from pathflip.checkpoints import (
    Checkpoint,
    best_checkpoint,
    latest_checkpoint,
    remove_folder,
    verify_whole,
    write_whole,
)
from pathflip.errors import (
    ArchiveError,
    CheckpointError,
    ConfigError,
    PathFLIPError,
    TrainingError,
    from_dict,
)
from pathflip.files import FileLock, replacing, write_file
from pathflip.training.loop_config import LoopConfig, differing, read_settings, save_settings
from pathflip.training.objective import Dataset, Objective
from pathflip.training.sharding import like, whole

DATA = "data.parquet"
"""The items of a run."""
STOPPED, PROGRESS = ".stopped.json", ".progress.json"
WRITER_WAIT_S = 60.0
"""Seconds to wait for the rank 0 of an earlier attempt, which Ray or the kernel is ending."""

Kind = TypeVar("Kind", bound=Objective[Any, Any])
D = TypeVar("D", bound=Dataset)


# -- beginning ------------------------------------------------------------------------------------


def prepare(objective: Kind, archive: str, run: str | Path) -> tuple[Kind, Any]:
    """Make the run folder, or check that it is of the same run, before any worker starts.

    Args:
        objective: Objective of the run.
        archive: The archive's URI.
        run: The run folder.

    Returns:
        The objective fitted to the data, and the data of the run.

    Raises:
        ConfigError: The folder cannot be written.
        PathFLIPError: See :func:`inspect`.
    """
    run = Path(run).absolute()
    objective, dataset, done = _inspect(objective, archive, run)
    if (run / "config.yaml").exists():
        if not (done or (run / "init").exists()):
            again = objective.initial(dataset)  # its model was lost
            write_whole(run / "init", lambda part: again.save_pretrained(str(part)))
        return objective, dataset
    model = objective.initial(dataset)
    try:
        run.mkdir(parents=True, exist_ok=True)
        with replacing(run / DATA, one_writer=True) as part:
            dataset.save(part)
        write_whole(run / "init", lambda part: model.save_pretrained(str(part)))
        write_file(run / "versions.json", json.dumps(versions(), indent=1))
        write_file(run / "config.yaml", save_settings(objective.config))  # last: now it is a run
    except OSError as error:
        raise ConfigError(
            f"The run {run} cannot be written: {error.strerror}.",
            hint="Check permissions and space, or give another folder.",
            code="not_permitted",
        ) from error
    return objective, dataset


def inspect(objective: Kind, archive: str, run: Path) -> tuple[Kind, Any]:
    """Fit an objective to its data and refuse what cannot be trained in a folder; write nothing.

    Args:
        objective: Objective of the run.
        archive: The archive's URI.
        run: The run folder, which need not exist.

    Returns:
        The objective fitted to the data, and the data: of the run in the folder, if there is one.

    Raises:
        ConfigError: The folder holds a run with other settings (the first differing one is named)
            or other files, or the data does not suit the settings.
        ArchiveError, EncoderError, CheckpointError: The archive or a model cannot be used.
    """
    objective, dataset, _ = _inspect(objective, archive, run)
    return objective, dataset


def _inspect(objective: Kind, archive: str, run: Path) -> tuple[Kind, Any, bool]:
    """Do what :func:`inspect` does; return, too, whether the run in the folder is finished."""
    if (run / "config.yaml").exists():
        made = read_settings(run, type(objective.config))
        dataset = objective.load(run / DATA)
        objective = objective.fitted(dataset)
        _check_same_run(made, objective.config, dataset, archive, run)
        done = finished(run, objective.exports) is not None
        if not done:
            objective.check(dataset)
        return objective, dataset, done
    if run.is_dir() and (
        alien := [
            p.name
            for p in run.iterdir()
            if p.name not in _OWN and not (p.name.startswith(".") and p.name.endswith(".partial"))
        ]
    ):
        raise ConfigError(
            f"{run} is not a run and not empty (it holds {sorted(alien)[0]}).",
            hint="Give a new or empty folder.",
            code="not_empty",
        )
    dataset = objective.select(archive)
    objective = objective.fitted(dataset)
    _ = dataset.steps_per_epoch  # enough items for a batch
    return objective, dataset, False


_OWN = ("init", DATA, "versions.json", ".lock", ".writer", f".{DATA}.partial", ".init.partial")
"""Files that a preparation that was killed may have left."""


def _check_same_run(
    made: LoopConfig, asked: LoopConfig, dataset: Dataset, archive: str, run: Path
) -> None:
    """Refuse to resume with other settings or another archive than the run was begun with."""
    if differ := differing(made, asked):
        key, old, new = differ[0]
        more = "" if len(differ) == 1 else f" ({len(differ) - 1} more differ)"
        raise ConfigError(
            f"{run} was begun with {key}={json.dumps(old)}; this asks for {key}={json.dumps(new)}"
            f"{more}.",
            hint="Repeat the settings of the run (its config.yaml), or give another run folder.",
            code="other_settings",
        )
    if dataset.archive != normalise(archive):
        raise ConfigError(
            f"{run} was begun with --archive {dataset.archive}; this asks for {archive}.",
            hint="Name the same archive, or give another run folder.",
            code="other_settings",
        )


def versions() -> dict[str, Any]:
    """Return package versions and, where known, the git revision the run was made with."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in (
        "pathflip", "torch", "ray", "transformers", "peft", "tokenizers", "pylance", "numpy",
    ):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    here = Path(__file__).resolve().parents[2]
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
        found["git"] = revision.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["git"] = None
    return found


@contextmanager
def opened(run: Path) -> Iterator[None]:
    """Lock the run folder, making it if need be; remove a new one if setup fails."""
    new = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = run_lock(run / ".lock")
        lock.__enter__()
    except OSError as error:
        raise ConfigError(
            f"The run {run} cannot be written: {error.strerror}.",
            hint="Give a run folder that you may write to.",
            code="not_permitted",
        ) from error
    try:
        yield
    except PathFLIPError:
        if new and [path.name for path in run.iterdir()] == [".lock"]:
            shutil.rmtree(run)
        raise
    finally:
        lock.__exit__(None, None, None)


def run_lock(path: Path, *, wait_s: float = 0.0) -> FileLock:
    """Return the exclusive lock of a run, or of its rank 0.

    Args:
        path: The lock's file, in the run folder.
        wait_s: Seconds to wait for another holder to release it.
    """

    def refusal(holder: str) -> TrainingError:
        return TrainingError(
            f"Another process is training the run {path.parent} ({holder}).",
            hint="Wait for it to finish, or stop it; the lock is released when the process ends.",
            code="locked",
        )

    return FileLock(path, refusal=refusal, wait_s=wait_s)


# -- while it trains ------------------------------------------------------------------------------


class RunLog:
    """Writer of metrics.jsonl and TensorBoard logs, on rank 0.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = run_lock(run / ".writer", wait_s=WRITER_WAIT_S)

    def __enter__(self) -> RunLog:
        self._lock.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if hasattr(self, "_lines"):
            self._lines.close()
            self._board.close()
        self._lock.__exit__(None, None, None)

    def begin(self, step: int, *, pids: list[int]) -> None:
        """Open the logs at a step; remove lines that a dead attempt logged beyond it.

        Args:
            step: The step training goes on from.
            pids: Process ids of the ranks, noted in attempt.json with the step.
        """
        from tensorboardX import SummaryWriter

        path = self._run / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(self._run) if line["step"] <= step]
            write_file(path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(self._run / "tensorboard"), purge_step=step + 1, flush_secs=10
        )
        started = {"workers": len(pids), "pids": pids, "from_step": step}
        write_file(self._run / "attempt.json", json.dumps(started))

    def step(self, line: dict[str, Any]) -> None:
        """Log a step."""
        self._write(line, {key: line[key] for key in line if key not in ("step", "epoch", "stage")})

    def validation(self, line: dict[str, Any]) -> None:
        """Log a validation."""
        val = line["val"]
        nested = {
            f"val/{way}_{name}": value
            for way in ("itr", "tir")
            for name, value in val.get(way, {}).items()
        }
        plain = {f"val/{key}": value for key, value in val.items() if isinstance(value, float)}
        self._write(line, nested | plain)

    def _write(self, line: dict[str, Any], scalars: dict[str, Any]) -> None:
        self._lines.write(f"{json.dumps(line)}\n")
        self._lines.flush()
        for name, value in scalars.items():
            if value is not None:
                self._board.add_scalar(
                    name if "/" in name else f"train/{name}", value, line["step"]
                )


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without one that a dying process cut short."""
    path = Path(run) / "metrics.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def checkpoint_at(run: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step, verified.

    Raises:
        CheckpointError: If this machine does not see it.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    note = verify_whole(path)
    return Checkpoint(path=path, step=step, metric=note.get("metric"))


def stop(run: Path, error: PathFLIPError) -> None:
    """Record an error that a restart would only meet again."""
    write_file(run / STOPPED, json.dumps(error.to_dict()))


def stopped(run: Path) -> PathFLIPError | None:
    """Return the error that :func:`stop` recorded."""
    try:
        return from_dict(json.loads((run / STOPPED).read_bytes()))
    except FileNotFoundError:
        return None


def may_pass(error: PathFLIPError) -> bool:
    """Return whether an error may be gone after a restart, such as a storage fault."""
    return isinstance(error, ArchiveError) and error.code != "damaged"


# -- the end --------------------------------------------------------------------------------------


def finished(run: str | Path, exports: Sequence[str] = ("model",)) -> dict[str, Any] | None:
    """Return the result of a run whose exports are present and intact; None if unfinished.

    Args:
        run: The run folder.
        exports: Folders that a finished run holds, see :class:`Objective`.
    """
    run = Path(run)
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_bytes())
        for folder in exports:
            verify_whole(run / folder)
    except (FileNotFoundError, CheckpointError):
        return None
    return result


def finish(objective: Objective[D, Any], dataset: D, run: str | Path) -> dict[str, Any]:
    """Export the best weights and write the model card and result.json.

    Raises:
        TrainingError: If training has not reached its last step.
    """
    run = Path(run).absolute()
    last = latest_checkpoint(run / "checkpoints")
    best = best_checkpoint(run / "checkpoints")
    steps = objective.config.total_steps(dataset.steps_per_epoch)
    if last is None or best is None or last.step < steps:
        raise TrainingError(
            f"The training of {run} ended at step {last.step if last else 0:,} of {steps:,}.",
            hint="The same command goes on from there.",
            code="unfinished",
        )
    state = last.state()
    recent = state["recent"]
    val = best.state()["val"] if best.metric is not None else state["val"]
    result = {
        "run": str(run),
        "kind": objective.config.kind,
        "family": objective.config.family,
        "steps": last.step,
        "loss": sum(recent) / len(recent) if recent else None,
        "val": val,
        "seconds": round(state["seconds"], 3),
        "best_step": best.step,
        "skipped": state["skipped"],
    }
    if "collapsed" in val:
        result["collapsed"] = val["collapsed"]
    card = objective.export(run, dataset, best, result)
    write_file(run / "README.md", card)
    write_file(run / "result.json", json.dumps(result, indent=1))
    return result


def write_model(run: Path, model: Any, *, about: dict[str, Any], card: str, step: int) -> None:
    """Write RUN/model: the model, ``pathflip.json`` with what it belongs to, and its card.

    Args:
        run: The run folder.
        model: The model, with ``save_pretrained``.
        about: Content of ``pathflip.json``.
        card: Model card, README.md.
        step: Step of the weights.
    """

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about, indent=1))
        (part / "README.md").write_text(card)

    write_whole(run / "model", fill, step=step)


def clear(run: Path) -> None:
    """Remove files that only an unfinished run needs, except its checkpoints."""
    if (run / "init").exists():
        remove_folder(run / "init")
    shutil.rmtree(run / ".ray", ignore_errors=True)
    for name in (STOPPED, PROGRESS):
        (run / name).unlink(missing_ok=True)


def model_tensors(
    model: torch.nn.Module, names: Collection[str] | None = None, *, keep: bool = True
) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a model by name, shared ones once.

    Those that are cut over several workers are made whole, for which every worker must ask.

    Args:
        model: The model.
        names: Only the tensors of these names.
        keep: Whether this worker wants those that are cut; see :func:`whole`.

    Raises:
        TrainingError: If one of them is not finite: such weights are never written.
    """
    named = {name: whole(value, keep=keep) for name, value in _named(model, names).items()}
    for name, value in named.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TrainingError(
                f"The weights {name} are not finite; the checkpoint was not written.",
                hint="Train with a lower lr in a new run folder; the last checkpoint is intact.",
                code="not_finite",
            )
    return {name: value.detach() for name, value in named.items()}


def _named(model: torch.nn.Module, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = model.state_dict()
    named |= {name: value for name, value in model.named_buffers() if name in persistent}
    return named if names is None else {name: named[name] for name in names}


@torch.no_grad()
def load_tensors(
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    names: Collection[str] | None = None,
) -> None:
    """Put the tensors of :func:`model_tensors` into a model of the same shape."""
    for name, value in _named(model, names).items():
        value.copy_(like(value, tensors[name]))
