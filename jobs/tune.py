"""Tuning: a pretraining run and a language model in, a model that answers about slides out.

The loop, the run folder and Ray are those of pretraining (``jobs/pretrain.py`` lists the parts);
the objective is another one, ``pathflip/training/instruct.py``.

    python -m jobs.tune --archive URI --run RUN --llm DIR --out DIR   (the same as: pathflip tune …)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import ray_train
from pathflip import tracing
from pathflip.training.config import TuneConfig
from pathflip.training.config import resolve_tuning as resolve
from pathflip.training.instruct import Instruct
from pathflip.training.trainer import TrainingProgress

__all__ = ["TuneConfig", "plan", "resolve", "tune"]


@tracing.job
def tune(
    archive: str,
    out: str | Path,
    config: TuneConfig,
    *,
    address: str | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> dict[str, Any]:
    """Tune a model on an archive's captions and questions; see :func:`jobs.ray_train.fit`.

    Args:
        archive: Archive URI.
        out: Run folder to make.
        config: Settings, as from :func:`resolve`; they name the pretraining run and the
            language model.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver about once a second.
    """
    return ray_train.fit(Instruct(config), archive, out, address=address, progress=progress)


def plan(archive: str, out: str | Path, config: TuneConfig) -> dict[str, Any]:
    """Return the plan of :func:`tune`, without starting or writing anything."""
    return ray_train.planned(Instruct(config), archive, out)


if __name__ == "__main__":
    from pathflip.cli import main

    main(["tune", *sys.argv[1:]])
