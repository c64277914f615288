"""Tuning on two workers loses one in its second stage and comes out as one process does."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from jobs.tune import tune
from pathflip.checkpoints import latest_checkpoint, load_run
from pathflip.training import run_dir
from pathflip.training.instruct import Instruct
from pathflip.training.trainer import train
from tests import faults
from tests.tuning import make_given

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(300)]

STEPS, KILL_AT = 24, 7
SETTINGS = (
    "epochs=5", "lr=0.002", "projector_lr=0.002", "instruct.lora_dropout=0", "save_every=3",
)  # fmt: skip


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in run_dir.read_metrics(run) if "loss" in line]


def logged_step(run: Path) -> int:
    return max((line["step"] for line in run_dir.read_metrics(run)), default=0)


def test_two_workers_one_killed(cluster: str, tmp_path: Path) -> None:
    given = make_given(tmp_path)
    alone, run = tmp_path / "alone", tmp_path / "run"
    objective, _ = run_dir.prepare(Instruct(given.settings(*SETTINGS)), given.archive, alone)
    train(alone, objective)
    settings = given.settings(*SETTINGS, "max_workers=2")
    killed = []

    def kill() -> None:
        faults.until(lambda: logged_step(run) >= KILL_AT, seconds=200, what="step 7 is logged")
        attempt = json.loads((run / "attempt.json").read_text())
        os.kill(attempt["pids"][1], signal.SIGKILL)
        killed.append(logged_step(run))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = tune(given.archive, run, settings)
    finally:
        killer.join()
    assert KILL_AT <= killed[0] < STEPS, "killed too late to show anything"
    assert result["steps"] == result["trained"] == STEPS
    attempt = json.loads((run / "attempt.json").read_text())
    assert attempt["workers"] == 2
    assert 4 < attempt["from_step"] < STEPS
    assert curve(run) == pytest.approx(curve(alone), abs=1e-3)
    mine, theirs = (latest_checkpoint(path / "checkpoints") for path in (run, alone))
    assert mine is not None
    assert theirs is not None
    weights, others = mine.tensors("model"), theirs.tensors("model")
    assert weights.keys() == others.keys()
    assert max(float((weights[key] - others[key]).abs().max()) for key in weights) < 2e-3
    assert load_run(run).config["max_workers"] == 2
    assert tune(given.archive, run, settings)["trained"] == 0
