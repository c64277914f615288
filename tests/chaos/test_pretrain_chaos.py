"""Pretraining loses a worker, its driver, and goes on with another number of workers.

The run to which nothing happened is the truth: its weights to 1e-6 and its log.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import ray_train
from jobs.pretrain import pretrain, resolve
from pathflip.errors import TrainingError
from pathflip.training import run_dir
from tests import faults
from tests.failpoints import FAIL_AT, DyingContrastive, waiting_pretrain
from tests.pretraining import (
    SAVE_EVERY,
    SETTINGS,
    STEPS,
    assert_close,
    curve,
    logged_step,
    make_cohort,
    words,
)

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cohort(tmp_path_factory.mktemp("pretrain"))


def settings(*more: str) -> Any:
    return resolve("pathflip/mini", overrides=[*SETTINGS, *more])


@pytest.fixture(scope="module")
def pair(archive: str, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers to which nothing happens."""
    run = tmp_path_factory.mktemp("pair") / "run"
    result = pretrain(archive, run, settings("max_workers=2"))
    assert result["trained"] == STEPS
    return run


@pytest.fixture(scope="module")
def alone(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, without Ray, to which nothing happens."""
    from pathflip.training.contrastive import Contrastive
    from pathflip.training.trainer import train

    run = tmp_path_factory.mktemp("alone") / "run"
    objective, dataset = run_dir.prepare(Contrastive(settings()), archive, run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are the same to the bit only on as many
    train(run, objective)
    torch.set_num_threads(threads)
    run_dir.finish(objective, dataset, run)
    return run


def test_two_workers_are_one(pair: Path, alone: Path) -> None:
    """With gathered negatives the loss, its curve and the validation are those of one process."""
    assert len(curve(pair)) == STEPS
    assert curve(pair) == pytest.approx(curve(alone), abs=1e-4)
    mine, theirs = (
        [line["val"] for line in run_dir.read_metrics(run) if "val" in line]
        for run in (pair, alone)
    )
    assert len(mine) == len(theirs) == 3
    assert mine[-1]["itr"] == theirs[-1]["itr"]
    assert mine[-1]["loss"] == pytest.approx(theirs[-1]["loss"], abs=1e-3)
    assert json.loads((pair / "attempt.json").read_text())["workers"] == 2


def test_finished_is_finished(archive: str, pair: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pair.rglob("*") if path.is_file()}
    result = pretrain(archive, pair, settings("max_workers=2"))
    assert result["trained"] == 0
    after = {path: path.stat().st_mtime_ns for path in pair.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {pair / ".lock"}


def test_worker_killed(archive: str, pair: Path, cluster: str, tmp_path: Path) -> None:
    """Rank 1 dies after step 7 of 12; from step 5 on again, to the same weights."""
    run = tmp_path / "run"
    result = ray_train.fit(DyingContrastive(settings("max_workers=2")), archive, run)
    assert result["steps"] == result["trained"] == STEPS
    assert json.loads((run / "attempt.json").read_text())["from_step"] == SAVE_EVERY
    assert_close(run, pair, within=1e-6)
    assert curve(run) == pytest.approx(curve(pair), abs=1e-6)


def test_the_one_process_of_a_machine_killed(archive: str, alone: Path, tmp_path: Path) -> None:
    """Without Ray it dies after step 7 too, and another goes on from step 5 to the same bits."""
    run, seen = tmp_path / "run", []
    dying = DyingContrastive(settings("cpus_per_worker=1"))
    result = ray_train.fit(dying, archive, run, address="local", progress=seen.append)
    assert result["steps"] == result["trained"] == STEPS
    attempt = json.loads((run / "attempt.json").read_text())
    assert (attempt["workers"], attempt["from_step"]) == (1, SAVE_EVERY)
    assert os.getpid() not in attempt["pids"]
    assert seen[-1].fraction == 1
    assert_close(run, alone, within=0)
    assert curve(run) == curve(alone)


def test_a_process_that_keeps_dying(archive: str, tmp_path: Path) -> None:
    dying = DyingContrastive(settings("max_failures=0"))
    with pytest.raises(TrainingError, match="died 1 times") as raised:
        ray_train.fit(dying, archive, tmp_path / "run", address="local")
    assert raised.value.code == "workers_died"
    assert logged_step(tmp_path / "run") == FAIL_AT


def test_driver_killed_then_another_number_of_workers(
    archive: str, alone: Path, cluster: str, tmp_path: Path
) -> None:
    """SIGKILL of ``pathflip pretrain`` on one worker; the same command goes on, on two."""
    run = tmp_path / "run"
    driver = waiting_pretrain(*words(archive, run), "--address", cluster)
    try:
        faults.until(
            lambda: logged_step(run) >= FAIL_AT or driver.poll() is not None,
            seconds=120,
            what="step 7 is logged",
        )
        ended = driver.poll()
    finally:
        driver.kill()
        _, err = driver.communicate()
    assert ended is None, err
    assert logged_step(run) == FAIL_AT
    assert json.loads((run / "attempt.json").read_text())["workers"] == 1
    result = pretrain(archive, run, settings("max_workers=2"))
    assert result["steps"] == STEPS
    assert result["trained"] == STEPS - SAVE_EVERY
    attempt = json.loads((run / "attempt.json").read_text())
    assert attempt["workers"] == 2
    assert attempt["from_step"] == SAVE_EVERY
    assert_close(run, alone, within=1e-3)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-4)
