"""Tensors that are cut over workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pathflip.training.sharding import is_cut, like, whole


@pytest.fixture(scope="module")
def cut() -> Iterator[torch.Tensor]:
    """A tensor of 3 x 2 numbers, cut over the one worker there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    dist.destroy_process_group()


def test_one_that_is_cut_is_made_whole_where_it_is_kept(cut: torch.Tensor) -> None:
    assert is_cut(cut)
    assert whole(cut).tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert not is_cut(whole(cut))
    assert whole(cut, keep=False).numel() == 0
    assert like(cut, torch.ones(3, 2)).to_local().sum() == 6  # type: ignore[attr-defined]


def test_one_that_is_not_cut_is_itself() -> None:
    tensor = torch.ones(2)
    assert whole(tensor, keep=False) is tensor
