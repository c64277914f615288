"""A language model cut over two processes is tuned as in one, and goes on in either."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from pathflip.checkpoints import latest_checkpoint
from pathflip.training import run_dir
from pathflip.training.config import TuneConfig
from pathflip.training.instruct import Instruct
from pathflip.training.objective import Worker
from pathflip.training.trainer import train
from tests.tuning import STEPS, Given, make_given

pytestmark = pytest.mark.timeout(600)

SETTINGS = ("instruct.lora_dropout=0", "lr=0.002", "projector_lr=0.002", "precision=fp32")
KINDS = {
    "lora": ("recompute=true",),
    "full": ("instruct.llm_tuning=full", "instruct.train_vision=true"),
}


class Told(Instruct):
    """Tuning that writes down how much of the language model a worker holds."""

    def shard(self, model: Any, worker: Worker) -> bool:
        layers = model.causal.model.layers
        before = sum(own.numel() for own in layers.parameters())
        cut = super().shard(model, worker)
        held = [own for own in layers.parameters() if isinstance(own, DTensor)]
        after = sum(own.to_local().numel() for own in held)
        folder = Path(os.environ["TOLD"])
        (folder / f"{worker.rank}.json").write_text(json.dumps([cut, before, after]))
        return cut


def work(rank: int, world: int, run: str, config: TuneConfig) -> None:
    """Train as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}/meet", rank=rank, world_size=world)
    train(run, Told(config), rank=rank, world=world)
    dist.destroy_process_group()


def together(run: Path, config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Train in two processes; return what each held of the language model's layers."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TOLD", str(run))
    (run / "meet").unlink(missing_ok=True)
    mp.spawn(work, args=(2, str(run), config), nprocs=2)
    return [json.loads((run / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return make_given(tmp_path_factory.mktemp("sharded"))


def newest(run: Path) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == STEPS
    return {
        f"{part}/{k}": v for part in ("model", "optimizer") for k, v in found.tensors(part).items()
    }


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in run_dir.read_metrics(run) if "loss" in line]


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert type(value) is torch.Tensor
        assert (value.shape, value.dtype) == (other[name].shape, other[name].dtype)
        torch.testing.assert_close(value, other[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(
    given: Given, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    settings = (*SETTINGS, *KINDS[kind])
    objective = Instruct(given.settings(*settings, "shard=never", "recompute=false"))
    run_dir.prepare(objective, given.archive, alone)
    train(alone, objective)
    config = given.settings(*settings, "shard=always")
    run_dir.prepare(Instruct(config), given.archive, run)
    for cut, before, after in together(run, config, monkeypatch):
        assert cut
        assert before / 2 <= after < 0.6 * before
    assert curve(run) == pytest.approx(curve(alone), abs=1e-4)
    whole = newest(alone)
    assert_alike(newest(run), whole)
    if kind != "lora":
        return
    # A run of two goes on in one, and a run of one in two: checkpoints are the same kind of file.
    for path in (run, alone):
        shutil.rmtree(path / "checkpoints" / f"step-{STEPS:08d}")
    train(run, objective)
    together(alone, config, monkeypatch)
    assert_alike(newest(run), whole)
    assert_alike(newest(alone), whole)
    result = run_dir.finish(*run_dir.prepare(objective, given.archive, run), run)
    assert result["steps"] == STEPS


def test_small_models_are_not_cut_by_themselves(given: Given) -> None:
    objective = Instruct(given.settings())
    assert not objective.shard(None, Worker())
