"""Objectives that fail at a step: a worker that dies, and one that waits for its driver to die.

They are handed in like any other objective, so the trainer knows nothing of them. A process fails
where it has done FAIL_AT steps, so a run that goes on with as many left or fewer comes to its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch.distributed as dist

from pathflip.training.contrastive import Contrastive
from pathflip.training.instruct import Instruct
from tests import faults

FAIL_AT = 7
"""Steps that a process has done when it fails."""


class _Counting:
    begun = 0

    def fails(self) -> bool:
        """Return whether the step after FAIL_AT begins; called once a step."""
        self.begun += 1
        return self.begun == FAIL_AT + 1

    def die(self) -> None:
        """End the last of the workers as a machine would that loses its power."""
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        if self.fails() and last:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingContrastive(_Counting, Contrastive):
    """Pretraining whose last worker dies."""

    def losses(self, model: Any, batch: Any, *, group: Any) -> Any:
        """Return the losses of a step, or die."""
        self.die()
        return super().losses(model, batch, group=group)


class DyingInstruct(_Counting, Instruct):
    """Tuning whose last worker dies."""

    def losses(self, model: Any, batch: Any, *, group: Any) -> Any:
        """Return the losses of a step, or die."""
        self.die()
        return super().losses(model, batch, group=group)


class WaitingContrastive(_Counting, Contrastive):
    """Pretraining that waits for its driver to be killed, and for Ray to end it then."""

    def losses(self, model: Any, batch: Any, *, group: Any) -> Any:
        """Return the losses of a step, or nothing any more."""
        while self.fails():
            time.sleep(3600)
        return super().losses(model, batch, group=group)


WAITING_PRETRAIN = """
import jobs.pretrain
from pathflip.cli import main
from tests.failpoints import WaitingContrastive

jobs.pretrain.Contrastive = WaitingContrastive
main()
"""
"""Program of ``pathflip`` whose pretraining waits after FAIL_AT steps."""


def waiting_pretrain(*words: str) -> subprocess.Popen[str]:
    """Start ``pathflip pretrain`` that waits after FAIL_AT steps, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", WAITING_PRETRAIN, "pretrain", *words],
        cwd=faults.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
