"""Pretraining: an archive and captions in, a run folder with a trained model out.

Settings, an objective and the run folder are all there is here; the training library
(``pathflip/training``) has the parts, in the order of the data::

    config.py         settings: a preset, a file and overrides over it
    dataset.py        the slides of a run with their texts and their split
    slide_batches.py  features from the archive, text drawn per slide and epoch
    contrastive.py    the objective: model, losses, validation, export
    trainer.py        the loop of one worker; runs without Ray as well
    run_dir.py        the run folder: how it begins, what is logged, how it ends

Presets ``mrplip/…`` train on patch trees instead of slides, in the same loop: ``tree_config.py``,
``tree_corpus.py``, ``tree_dataset.py``, ``multiresolution.py``.

``jobs/ray_train.py`` puts Ray Train around the loop.

    python -m jobs.pretrain --archive URI --preset P --run DIR   (the same as: pathflip pretrain …)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import ray_train
from pathflip import tracing
from pathflip.config import read_yaml
from pathflip.models import MR_PRESETS, PRESETS
from pathflip.training import config as slides
from pathflip.training.config import PretrainConfig as PretrainConfig
from pathflip.training.contrastive import Contrastive
from pathflip.training.loop_config import preset_name, read_settings
from pathflip.training.multiresolution import MultiResolution
from pathflip.training.trainer import TrainingProgress
from pathflip.training.tree_config import FAMILY, MRPretrainConfig, resolve_trees

AnyPretrainConfig = PretrainConfig | MRPretrainConfig


def resolve(
    preset: str | None = None,
    *,
    base: AnyPretrainConfig | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> AnyPretrainConfig:
    """Return settings of a pretraining, of the kind that the preset's prefix names.

    Args:
        preset: The preset; without it the one the overrides or the file name, else
            ``pathflip/paper``.
        base: Settings to start from instead of a preset's.
        file: YAML file of settings.
        overrides: ``key=value``; the model's are ``model.key=value``.
        given: Values that win over everything.

    Raises:
        ConfigError: Unknown preset or setting, or a value that cannot be.
    """
    over: dict[str, Any] = {"file": file, "overrides": overrides, "given": given}
    if isinstance(base, MRPretrainConfig):
        return resolve_trees(base=base, **over)
    if base is not None:
        return slides.resolve(base=base, **over)
    known = {**PRESETS, **MR_PRESETS}
    name = preset_name(preset, known, slides.DEFAULT_PRESET, file, overrides)
    return (resolve_trees if name.startswith(FAMILY) else slides.resolve)(name, **over)


def settings_of(run: Path) -> AnyPretrainConfig:
    """Return the settings of a begun run, of the kind that it is.

    Raises:
        CheckpointError: They are missing or not those of a pretraining.
    """
    path = run / "config.yaml"
    kind = read_yaml(path).get("kind") if path.exists() else None
    if kind == "multiresolution":
        return read_settings(run, MRPretrainConfig)
    return read_settings(run, PretrainConfig)


def objective(config: AnyPretrainConfig) -> Contrastive | MultiResolution:
    """Return the objective of a pretraining with these settings."""
    if isinstance(config, MRPretrainConfig):
        return MultiResolution(config)
    return Contrastive(config)


@tracing.job
def pretrain(
    archive: str,
    run: str | Path,
    config: AnyPretrainConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> dict[str, Any]:
    """Train a model on an archive's slides or trees; see :func:`jobs.ray_train.fit`.

    Args:
        archive: Archive URI.
        run: Run folder.
        config: Settings, as from :func:`resolve`.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver about once a second.
    """
    return ray_train.fit(
        objective(config or resolve()), archive, run, address=address, progress=progress
    )


def plan(archive: str, run: str | Path, config: AnyPretrainConfig | None = None) -> dict[str, Any]:
    """Return the plan of :func:`pretrain`, without starting or writing anything."""
    return ray_train.planned(objective(config or resolve()), archive, run)


if __name__ == "__main__":
    from pathflip.cli import main

    main(["pretrain", *sys.argv[1:]])
