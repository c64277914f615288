"""Two processes are one with the whole batch; of official_v1, two of the published code's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from pathflip.models.official import load_official_v1
from pathflip.training import trainer
from pathflip.training.objective import Worker
from pathflip.training.trainer import average_gradients
from tests.unit.models import published, tree_workers
from tests.unit.models.tiny import CAPTIONS, SUBCAPTIONS, batch, tiny
from tests.unit.models.tree_samples import patch_model

SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {"dropout": 0.0},
    "sum": {"dropout": 0.0, "region_reduction": "sum", "label_smoothing": 0.1,
            "slide_context_layers": 1, "region_bias_init": -1.0},
}  # fmt: skip


def part(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    size = len(given["captions"]) // world
    mine = slice(rank * size, (rank + 1) * size)
    return {name: value[mine] for name, value in given.items()}


def of_process(rank: int) -> tuple[torch.Tensor, list[str], list[list[str]], torch.Tensor]:
    """Patches, captions, sub-captions and choices of one of two published processes."""
    torch.manual_seed(10 + rank)
    path = torch.randn(2, published.N, published.M, published.E_IN)
    mine = slice(2 * rank, 2 * rank + 2)
    return path, CAPTIONS[mine], SUBCAPTIONS[mine], torch.randint(published.K, (2, 2))


def work(rank: int, world: int, folder: str) -> None:
    """Run a step of every setting in each process; rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    found = {}
    for name, settings in SETTINGS.items():
        model = DistributedDataParallel(tiny(**settings).train())
        out = model(**part(batch(), rank, world))
        out.loss.backward()
        losses = torch.stack([out.loss, out.loss_slide, out.loss_region]).detach()
        dist.all_reduce(losses)
        found[f"{name}/losses"] = losses / world
        for parameter, value in model.module.named_parameters():
            found[f"{name}/{parameter}"] = value.grad.clone()
    plain = tiny(**SETTINGS["mean"]).train()
    plain(**part(batch(), rank, world)).loss.backward()
    trainer.AT_ONCE = 5000  # several parts, some of one parameter
    average_gradients(plain, Worker(rank=rank, world=world))
    for parameter, value in plain.named_parameters():
        found[f"mean, without DDP/{parameter}"] = value.grad.clone()
    model = DistributedDataParallel(published.build()[0])
    path, captions, pieces, choice = of_process(rank)
    mask = torch.ones(path.shape[:3]).bool()
    out = model(path, mask, captions, pieces, negative_choice=choice)
    out.loss.backward()
    mine = torch.stack([out.loss_slide, out.loss_region]).detach()
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    found["published/losses"] = torch.stack(everyone)
    for parameter, value in model.module.named_parameters():
        found[f"published/{parameter}"] = value.grad.clone()
    tree_workers.work_on_trees(rank, world, found)
    if rank == 0:
        save_file(found, Path(folder, "found.safetensors"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("two")
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}):
        mp.spawn(work, args=(2, str(folder)), nprocs=2)
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_one_process(
    name: str, found: dict[str, torch.Tensor]
) -> None:
    model = tiny(**SETTINGS[name]).train()
    out = model(**batch())
    out.loss.backward()
    losses = torch.stack([out.loss, out.loss_slide, out.loss_region]).detach()
    assert torch.allclose(found[f"{name}/losses"], losses, atol=1e-5)
    for parameter, value in model.named_parameters():
        assert torch.allclose(found[f"{name}/{parameter}"], value.grad, atol=1e-5), parameter


def test_averaged_gradients_are_those_of_ddp(found: dict[str, torch.Tensor]) -> None:
    names = [name.split("/", 1)[1] for name in found if name.startswith("mean, without DDP/")]
    assert names
    for name in names:
        assert torch.equal(found[f"mean, without DDP/{name}"], found[f"mean/{name}"]), name


def test_official_v1_on_two_processes_is_the_published_formulation(
    found: dict[str, torch.Tensor],
) -> None:
    model, tensors = published.build()
    tensors = {
        name: value.requires_grad_() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    reference = published.Reference(tensors, heads=4)
    losses = reference.losses_of_processes([of_process(rank) for rank in range(2)])
    theirs = torch.stack([torch.stack(own) for own in losses])
    theirs.sum().div(2).backward()  # DDP takes the mean
    assert torch.allclose(found["published/losses"], theirs.detach(), atol=1e-5)
    grads = {name: value.grad for name, value in tensors.items() if value.grad is not None}
    load_official_v1(model, grads)  # the same names: what is loaded are the gradients
    for name, value in model.named_parameters():
        mine = found[f"published/{name}"]
        assert torch.allclose(mine, value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", tree_workers.SETTINGS)
def test_losses_and_gradients_of_trees_are_those_of_one_process(
    name: str, found: dict[str, torch.Tensor]
) -> None:
    model = patch_model(**tree_workers.SETTINGS[name]).train()
    given = tree_workers.whole(name)
    losses = tree_workers.step(model, given, model.counts(given))
    assert torch.allclose(found[f"trees, {name}/losses"], losses, atol=1e-5)
    for parameter, value in model.named_parameters():
        expected = found[f"trees, {name}/{parameter}"]
        assert torch.allclose(expected, value.grad, atol=2e-5), parameter


def test_micro_batches_of_trees_add_up() -> None:
    settings = tree_workers.SETTINGS["own"] | {"losses": ("itc", "mlm", "plm", "cvta")}
    batch = tree_workers.whole("own")
    one, two = (patch_model(**settings).train() for _ in range(2))
    for model, parts in ((one, [batch]), (two, [tree_workers.part(batch, i) for i in range(2)])):
        for micro in parts:  # all but the contrast, which looks at the micro-batch
            totals = model(micro).totals
            ((totals["mlm"] + totals["plm"]) / 9 + totals["cvta"] / 2).backward()
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        if first.grad is not None:
            assert torch.allclose(first.grad, second.grad, atol=1e-5), name


def test_local_negatives_stay_in_the_process() -> None:
    model = tiny(negatives="local", dropout=0.0)
    given = batch()
    halves = [part(given, rank, 2) for rank in range(2)]
    for half, start in zip(halves, (0, 2), strict=True):
        half["negative_choice"] = half["negative_choice"][:, start : start + 2]
    alone = sum(float(model(**half).loss.detach()) for half in halves) / 2
    assert alone < float(model(**given).loss.detach()) + 10  # fewer negatives: another loss
    assert alone != pytest.approx(float(model(**given).loss.detach()), abs=1e-3)
