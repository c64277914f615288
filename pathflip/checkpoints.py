"""Checkpoints and trained models, in folders that are written whole or not at all.

Every folder written here is made under a hidden name, its files are forced to disk, then
``COMPLETE.json`` (size and sha256 of each file, the step) is written last and the folder renamed
into place. A reader trusts a folder only when every file is the one ``COMPLETE.json`` lists, so a
process killed anywhere in between, a full disk or a flipped bit is found and never loaded.

A run of ``pathflip pretrain`` is laid out as::

    RUN/config.yaml versions.json data.parquet metrics.jsonl result.json README.md tensorboard/
    RUN/checkpoints/step-00000120/{model,optimizer}.safetensors state.json COMPLETE.json
    RUN/model/{config.json, model.safetensors, tokenizer…, pathflip.json, README.md, COMPLETE.json}

A run of ``pathflip tune`` has the same, but for::

    RUN/model/{instruct.json, projector.safetensors, vision/, adapter/, pathflip.json, …}
    RUN/llm/   the language model as it is served

A run of ``pretrain`` on patch trees is laid out as one on slides; its model is of another family.

:func:`load_run` opens the finished model; the rest is for those who write runs.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pathflip.errors import CheckpointError
from pathflip.files import PARTIAL, partial, sync, write_file

if TYPE_CHECKING:
    import torch

    from pathflip.models import MRPLIP, PathFLIP

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE.json"
KEEP = 3
"""Newest checkpoints kept beside the best one."""
_STEP = re.compile(r"step-(\d{8,})")


# -- whole folders --------------------------------------------------------------------------------


def write_whole(folder: str | Path, fill: Callable[[Path], None], **note: Any) -> Path:
    """Write a folder so that it appears complete or not at all.

    A folder of that name is replaced; between its removal and the rename there is none.

    Args:
        folder: Final path of the folder.
        fill: Writes the files into the (empty) folder it is given; subfolders are allowed.
        note: JSON values stored in ``COMPLETE.json`` beside the list of files, such as ``step``.

    Returns:
        The folder.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = partial(folder, one_writer=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        fill(part)
        _seal(part, note)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():
        remove_folder(folder)
    part.rename(folder)
    sync(folder.parent)
    return folder


def _seal(part: Path, note: Mapping[str, Any]) -> None:
    """Force a folder's files to disk and list them."""
    files = {}
    for path in _files(part):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[str(path.relative_to(part))] = {"bytes": path.stat().st_size, "sha256": digest}
    body = {**note, "files": files}
    write_file(part / COMPLETE, json.dumps({**body, "sha256": _digest(body)}, indent=1))
    for inner in sorted({part, *(path.parent for path in _files(part))}):
        sync(inner)


def verify_whole(folder: str | Path) -> dict[str, Any]:
    """Check every file of a folder against its ``COMPLETE.json`` and return its note.

    Raises:
        CheckpointError: If it is missing or incomplete (``incomplete``), or a file is missing,
            changed or not listed (``damaged``); the message names the file.
    """
    folder = Path(folder)
    note = read_note(folder)
    listed = note["files"]
    for name, entry in listed.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise _damaged(folder, f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
            with path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except FileNotFoundError:
            raise _damaged(folder, f"{name} is missing") from None
        if digest != entry["sha256"]:
            raise _damaged(folder, f"{name} is not what was written (sha256 differs)")
    return note


def read_note(folder: str | Path) -> dict[str, Any]:
    """Return a folder's ``COMPLETE.json`` without looking at the other files.

    Raises:
        CheckpointError: See :func:`verify_whole`.
    """
    path = Path(folder) / COMPLETE
    try:
        note = json.loads(path.read_bytes())
        stored = note.pop("sha256")
        intact = isinstance(note["files"], dict) and stored == _digest(note)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not complete: it has no {COMPLETE}.",
            hint="Its writer was stopped; run the command that writes it again.",
            code="incomplete",
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise _damaged(Path(folder), f"{COMPLETE} is damaged")
    return dict(note)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a process killed meanwhile leaves only a hidden one."""
    gone = folder.parent / f".{folder.name}.removed{PARTIAL}"
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged: {what}.",
        hint="Restore it from a copy, or write it again.",
        code="damaged",
    )


# -- checkpoints of a run -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files were all verified.

    Attributes:
        path: Its folder.
        step: Number of optimisation steps done.
        metric: Checkpoint-selection metric, higher is better; None where nothing was validated.
        refused: Newer checkpoints that could not be used, a sentence each.
    """

    path: Path
    step: int
    metric: float | None
    refused: tuple[str, ...] = ()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of ``<name>.safetensors`` (model, optimizer) on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def state(self) -> dict[str, Any]:
        """Return everything that is not a tensor: counters, data position, seeds."""
        state: dict[str, Any] = json.loads((self.path / "state.json").read_bytes())
        return state


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    metric: float | None = None,
    keep: int = KEEP,
) -> Path:
    """Write ``folder/step-<step>`` atomically, then remove all but the newest and the best.

    Args:
        folder: ``RUN/checkpoints``.
        step: Number of optimisation steps done.
        tensors: {file name without ending: {name: tensor}}; every file becomes safetensors.
        state: JSON values: what it takes, beside the tensors, to go on exactly.
        metric: Checkpoint-selection metric, higher is better.
        keep: Number of newest checkpoints to keep, besides the best.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def fill(part: Path) -> None:
        for name, named in tensors.items():
            flat = {key: value.detach().cpu().contiguous() for key, value in named.items()}
            save_file(flat, part / f"{name}.safetensors")
        write_file(part / "state.json", json.dumps(state, sort_keys=True))

    folder = Path(folder)
    path = folder / f"step-{step:08d}"
    try:
        write_whole(path, fill, step=step, metric=metric)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written: {error}.",
            hint="Free some space there, or correct its permissions; the one before is intact.",
            code="disk_full" if "No space left" in str(error) else "not_permitted",
        ) from error
    _prune(folder, keep)
    return path


def latest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Return the newest checkpoint all of whose files are intact; None if there is none yet.

    Folders without ``COMPLETE.json`` are what a killed writer left and are passed over; the next
    :func:`save_checkpoint` removes them. Damaged ones are refused with a warning that names the
    file, and the one before is taken.

    Raises:
        CheckpointError: If there are checkpoints and every one is damaged.
    """
    return _first_intact(Path(folder), sorted(_steps(Path(folder)), reverse=True))


def best_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Return the intact checkpoint with the largest metric, the newest among equals.

    Without any metric it is the newest one. Damaged ones are refused as in
    :func:`latest_checkpoint`.
    """
    order = sorted(_metrics(Path(folder)), reverse=True)
    if not order:
        return latest_checkpoint(folder)
    return _first_intact(Path(folder), [step for _, step in order])


def _first_intact(folder: Path, steps: list[int]) -> Checkpoint | None:
    refused: list[str] = []
    for step in steps:
        path = folder / f"step-{step:08d}"
        try:
            note = verify_whole(path)
        except CheckpointError as error:
            if error.code == "incomplete":
                continue
            refused.append(error.message)
            logger.warning("%s Trying the one before.", error.message)
            continue
        return Checkpoint(path=path, step=step, metric=note.get("metric"), refused=tuple(refused))
    if refused:
        raise CheckpointError(
            f"No checkpoint in {folder} can be used. {' '.join(refused)}",
            hint="Restore one from a copy, or begin again in another run folder.",
            code="damaged",
        )
    return None


def _steps(folder: Path) -> Iterator[int]:
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _STEP.fullmatch(path.name):
                yield int(match[1])


def _metrics(folder: Path) -> Iterator[tuple[float, int]]:
    for step in _steps(folder):
        try:
            metric = read_note(folder / f"step-{step:08d}").get("metric")
        except CheckpointError:
            continue
        if metric is not None:
            yield float(metric), step


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best, and leftovers of killed writers."""
    whole = []
    for step in sorted(_steps(folder)):
        path = folder / f"step-{step:08d}"
        if (path / COMPLETE).exists():
            whole.append(step)
        else:
            remove_folder(path)
    best = max(_metrics(folder), default=(0.0, -1))[1]
    for step in whole[:-keep]:
        if step != best:
            remove_folder(folder / f"step-{step:08d}")
    for path in folder.glob(f".step-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


# -- finished runs --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with what is needed to use it on an archive.

    Attributes:
        name: Name of the model in tables: the run folder's name and the start of its fingerprint.
        model: The model, in eval mode.
        fingerprint: sha256 over the model's configuration and weights.
        encoder: Patch encoder it was trained on: name, revision, dim.
        tiling: Tiling of its slides: fields of :class:`pathflip.geometry.Tiling`.
        config: Settings of the run (RUN/config.yaml); empty for a bare model folder.
        max_regions: Maximum number of regions a tuned model was shown of a slide; None for all.
        path: The run folder.
    """

    name: str
    model: PathFLIP
    fingerprint: str
    encoder: dict[str, Any]
    tiling: dict[str, Any]
    config: dict[str, Any]
    path: Path
    max_regions: int | None = None

    @property
    def has_regions(self) -> bool:
        """True where the model has vectors of regions."""
        return self.model.config.region_encoder != "none"


@dataclass(frozen=True, kw_only=True)
class TreeRun:
    """A trained patch model with what is needed to use it on tiles and archives.

    Attributes:
        name: Name of the model: the run folder's name and the start of its fingerprint.
        model: The model, in eval mode.
        fingerprint: sha256 over the model's configuration and weights.
        encoder: Patch encoder it was trained on: name, revision, dim.
        trees: Patch trees it was trained on: fields of :class:`pathflip.geometry.TreeSpec`.
        config: Settings of the run (RUN/config.yaml); empty for a bare model folder.
        path: The run folder.
    """

    name: str
    model: MRPLIP
    fingerprint: str
    encoder: dict[str, Any]
    trees: dict[str, Any]
    config: dict[str, Any]
    path: Path


@overload
def load_run(
    run: str | Path, *, device: str = "cpu", family: Literal["pathflip"] = "pathflip"
) -> Run: ...


@overload
def load_run(run: str | Path, *, device: str = "cpu", family: Literal["mrplip"]) -> TreeRun: ...


def load_run(
    run: str | Path, *, device: str = "cpu", family: Literal["pathflip", "mrplip"] = "pathflip"
) -> Run | TreeRun:
    """Open the model a run of ``pathflip pretrain`` exported, or that in a run of ``tune``.

    Args:
        run: The run folder, or the ``model`` folder of one.
        device: Device of the model: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        family: Family the model must be of: ``pathflip``, a model of slides, or ``mrplip``, one of
            patches.

    Raises:
        CheckpointError: If there is no finished model (``missing``, ``incomplete``), a file of it
            is not what was written (``damaged``), or it is of another family (``other_kind``).
        EncoderError: ``no_gpu`` where torch does not see the device.
    """
    path, folder, about = _open_run(run, family)
    with _collection_paused():
        from pathflip.encoders.neural import pick_device
        from pathflip.models import MRPLIP, PathFLIP

    kind = about.get("kind", "contrastive")
    inner = folder / "vision" if kind == "instruct" else folder
    with _collection_paused():
        model: Any = (PathFLIP if family == "pathflip" else MRPLIP).from_pretrained(str(inner))
    fingerprint = model.fingerprint()
    if about.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"{folder} was written as model {about['fingerprint'][:8]} and loads as "
            f"{fingerprint[:8]}.",
            hint="It was made by another version of pathflip; train or export it again.",
            code="other_version",
        )
    own = path if folder != path else path.parent
    config = own / "config.yaml"
    found: dict[str, Any] = {
        "name": model_name(about.get("run", own.name), fingerprint),
        "model": model.to(pick_device(device)).eval(),
        "fingerprint": fingerprint,
        "encoder": about["encoder"],
        "config": _read_yaml(config) if config.exists() else {},
        "path": own,
    }
    if family == "mrplip":
        return TreeRun(**found, trees=about["trees"])
    return Run(**found, tiling=about["tiling"], max_regions=about.get("max_regions"))


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the garbage collector while modules are imported and a model is built.

    There is no garbage then, only ever more to look through: a quarter of the CPU time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, kw_only=True)
class RunAbout:
    """Description of a run's model; attributes as of :class:`Run`.

    Attributes:
        has_regions: Whether the model has vectors of regions.
    """

    name: str
    fingerprint: str
    encoder: dict[str, Any]
    tiling: dict[str, Any]
    has_regions: bool


def describe_run(run: str | Path) -> RunAbout:
    """Describe the slide model of a run without loading it: no weights, no torch.

    Raises:
        CheckpointError: See :func:`load_run`, which alone finds weights of another version.
    """
    path, folder, about = _open_run(run, "pathflip")
    if "fingerprint" not in about:  # nothing but the weights tells it
        found = load_run(run)
        return RunAbout(
            name=found.name, fingerprint=found.fingerprint, encoder=found.encoder,
            tiling=found.tiling, has_regions=found.has_regions,
        )  # fmt: skip
    own = path if folder != path else path.parent
    inner = folder / "vision" if about.get("kind") == "instruct" else folder
    settings = json.loads((inner / "config.json").read_bytes())["pathflip"]
    return RunAbout(
        name=model_name(about.get("run", own.name), about["fingerprint"]),
        fingerprint=about["fingerprint"],
        encoder=about["encoder"],
        tiling=about["tiling"],
        has_regions=settings["region_encoder"] != "none",
    )


def _open_run(run: str | Path, family: str) -> tuple[Path, Path, dict[str, Any]]:
    """Verify a run's model folder; return the run's path, that folder and ``pathflip.json``."""
    path = Path(run).absolute()
    folder = path if (path / "pathflip.json").exists() else path / "model"
    if not folder.is_dir():
        begun = (path / "checkpoints").is_dir()
        settings = path / "config.yaml"
        tuned = settings.exists() and "instruct" in _read_yaml(settings)
        command = "tune" if tuned else "pretrain"
        raise CheckpointError(
            f"{run} holds no finished model." if begun else f"There is no run at {run}.",
            hint=f"Its training was not finished: run the same pathflip {command} command again."
            if begun
            else "Make one: pathflip pretrain --archive URI --run DIR",
            code="incomplete" if begun else "missing",
        )
    verify_whole(folder)
    about = json.loads((folder / "pathflip.json").read_bytes())
    kind = about.get("kind", "contrastive")
    if about.get("family", "pathflip") != family:
        patches = "A run of patches is an encoder: --encoder mrplip:RUN."
        raise other_kind(run, kind, hint=patches if family == "pathflip" else None)
    return path, folder, about


def other_kind(run: str | Path, kind: str, *, hint: str | None = None) -> CheckpointError:
    """Return the error of a run of another kind than a command works with.

    Args:
        run: The run folder.
        kind: The kind that it is, as its settings name it.
        hint: Advice; by default, to name another folder.
    """
    commands = {
        "contrastive": "pretrain",
        "instruct": "tune",
        "multiresolution": "pretrain --preset mrplip/…",
    }
    return CheckpointError(
        f"{run} is a run of pathflip {commands.get(kind, kind)}.",
        hint=hint or "Name another run folder.",
        code="other_kind",
    )


def is_tuned(run: str | Path) -> bool:
    """Return whether a run folder holds a model that was tuned to answer."""
    return (Path(run) / "model" / "instruct.json").is_file()


def model_name(run: str, fingerprint: str) -> str:
    """Return a model's name in tables, ``<run>_<first 8 of the fingerprint>``, in [a-z0-9_]."""
    slug = re.sub(r"[^a-z0-9]+", "_", run.lower()).strip("_")[:64] or "run"
    return f"{slug}_{fingerprint[:8]}"


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is not valid YAML: {error}.", code="damaged") from error
    return content if isinstance(content, dict) else {}
