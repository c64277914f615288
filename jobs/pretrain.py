"""Pretraining: an archive and captions in, a run folder with a trained model out.

The parts, in the order of the data::

    recipe.py    the settings: a preset, a file and overrides over it
    corpus.py    which slides, their split, the order they are seen in
    batches.py   features from the archive, text drawn per slide and epoch
    task.py      what a training is; this module and tune.py have one each
    training.py  the loop of one worker; runs without Ray as well
    runs.py      the run folder: how it begins, what is logged, how it ends
    ray_train.py       the driver and Ray Train around the loop

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
from pathflip.training.trainer import Progress


def pretrain(
    archive: str,
    run: str | Path,
    config: PretrainConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train a model on an archive's slides and captions; see :func:`jobs.ray_train.fit`.

    Args:
        archive: Archive URI.
        run: Run folder.
        config: Settings, as from :func:`resolve`.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver about once a second.
    """
    return ray_train.fit(archive, run, config or resolve(), address=address, progress=progress)


def plan(archive: str, run: str | Path, config: PretrainConfig | None = None) -> dict[str, Any]:
    """Return what :func:`pretrain` would do, without starting or writing anything."""
    return ray_train.planned(archive, run, config or resolve())


if __name__ == "__main__":
    from pathflip.cli import main

    main(["pretrain", *sys.argv[1:]])
