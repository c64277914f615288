"""Sums that do not depend on how threads take turns."""

from __future__ import annotations

import torch
from torch import Tensor

from pathflip.training.trainer import reproducible


def gradient(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Gradient of rows that are each gathered many times."""
    taken = rows.clone().requires_grad_()
    (taken[places] * weights).sum().backward()
    assert taken.grad is not None
    return taken.grad


def test_gradients_of_gathered_rows_are_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 64, generator=generator)
    places = torch.randint(8, (20_000,), generator=generator)
    weights = torch.randn(20_000, 64, generator=generator)
    expected = torch.zeros_like(rows).index_add_(0, places, weights)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with reproducible(torch.device("cpu")):
            found = [gradient(rows, places, weights) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.allclose(found[0], expected, atol=1e-3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gpu_is_left_as_it_is() -> None:
    with reproducible(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()
