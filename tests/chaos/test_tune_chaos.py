"""Tuning on two workers loses one in its second stage and comes out as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import ray_train
from jobs.tune import tune
from pathflip.checkpoints import latest_checkpoint, load_run
from pathflip.training import run_dir
from pathflip.training.instruct import Instruct
from pathflip.training.trainer import train
from tests.failpoints import FAIL_AT, DyingInstruct
from tests.tuning import STEPS, make_given

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(300)]

SETTINGS = ("lr=0.002", "projector_lr=0.002", "instruct.lora_dropout=0", "save_every=3")


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in run_dir.read_metrics(run) if "loss" in line]


def test_two_workers_one_killed(cluster: str, tmp_path: Path) -> None:
    given = make_given(tmp_path)
    alone, run = tmp_path / "alone", tmp_path / "run"
    objective, _ = run_dir.prepare(Instruct(given.settings(*SETTINGS)), given.archive, alone)
    train(alone, objective)
    settings = given.settings(*SETTINGS, "max_workers=2")
    result = ray_train.fit(DyingInstruct(settings), given.archive, run)
    assert result["steps"] == result["trained"] == STEPS
    attempt = json.loads((run / "attempt.json").read_text())
    assert attempt["workers"] == 2
    assert attempt["from_step"] == FAIL_AT - 1  # in the second stage
    assert curve(run) == pytest.approx(curve(alone), abs=1e-3)
    mine, theirs = (latest_checkpoint(path / "checkpoints") for path in (run, alone))
    assert mine is not None
    assert theirs is not None
    weights, others = mine.tensors("model"), theirs.tensors("model")
    assert weights.keys() == others.keys()
    assert max(float((weights[key] - others[key]).abs().max()) for key in weights) < 2e-3
    assert load_run(run).config["max_workers"] == 2
    assert tune(given.archive, run, settings)["trained"] == 0
