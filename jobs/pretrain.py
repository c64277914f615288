"""Pretraining: an archive and captions in, a run folder with a trained model out.

Settings, an objective and the run folder are all there is here; the training library
(``pathflip/training``) has the parts, in the order of the data::

    config.py         settings: a preset, a file and overrides over it
    dataset.py        the slides of a run with their texts and their split
    slide_batches.py  features from the archive, text drawn per slide and epoch
    contrastive.py    the objective: model, losses, validation, export
    trainer.py        the loop of one worker; runs without Ray as well
    run_dir.py        the run folder: how it begins, what is logged, how it ends

``jobs/ray_train.py`` puts Ray Train around the loop.

    python -m jobs.pretrain --archive URI --preset P --run DIR   (the same as: pathflip pretrain …)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import ray_train
from pathflip.training.config import PretrainConfig as PretrainConfig
from pathflip.training.config import resolve as resolve
from pathflip.training.contrastive import Contrastive
from pathflip.training.trainer import TrainingProgress


def pretrain(
    archive: str,
    run: str | Path,
    config: PretrainConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> dict[str, Any]:
    """Train a model on an archive's slides and captions; see :func:`jobs.ray_train.fit`.

    Args:
        archive: Archive URI.
        run: Run folder.
        config: Settings, as from :func:`resolve`.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver about once a second.
    """
    objective = Contrastive(config or resolve())
    return ray_train.fit(objective, archive, run, address=address, progress=progress)


def plan(archive: str, run: str | Path, config: PretrainConfig | None = None) -> dict[str, Any]:
    """Return the plan of :func:`pretrain`, without starting or writing anything."""
    return ray_train.planned(Contrastive(config or resolve()), archive, run)


if __name__ == "__main__":
    from pathflip.cli import main

    main(["pretrain", *sys.argv[1:]])
