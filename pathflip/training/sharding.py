"""Language models cut over several cards: each holds a part of every layer (FSDP).

A layer's weights are gathered when it is about to run and let go after it, and its gradients are
summed and cut again; a card keeps and updates its own part alone. What stands outside the layers
(embeddings, projector, slide model) is whole on every card. Checkpoints hold whole tensors under
the names they have in one process, so a run goes on with any number of cards.

Every process must run the layers equally often: see ``PathFLIPInstruct.one_pass``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathflip.training.objective import Worker


def shard_layers(causal: Any, worker: Worker) -> None:
    """Cut the layers of a causal language model over the workers, in place.

    Args:
        causal: Model of ``transformers``, on the CPU; its layers move to the worker's device one by
            one, so that no card ever holds it whole.
        worker: One of several workers.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = DeviceMesh.from_group(worker.group, worker.device.type)
    # As under autocast: products in bf16, gradients summed in fp32, activations as they come.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if worker.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    inner = causal.model
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    inside = {id(own) for own in inner.layers.parameters()}
    outside = {own for own in inner.parameters() if id(own) not in inside}
    # Embeddings and head are called by themselves: only a whole weight can be.
    fully_shard(inner, mesh=mesh, mp_policy=policy, ignored_params=outside)
    if worker.device.type == "cpu":  # gloo has no mean
        for module in inner.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def is_cut(tensor: Any) -> bool:
    """Return whether a tensor is cut over the workers: a ``DTensor``, whose import takes 0.5 s."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any, *, keep: bool = True) -> Tensor:
    """Return a tensor that may be cut as a whole one, on the CPU then; every worker must ask.

    Args:
        tensor: The tensor.
        keep: Whether this worker wants it; one that does not gets an empty one of what is cut.
    """
    found: Tensor = tensor
    if is_cut(tensor):
        with torch.no_grad():
            gathered = tensor.full_tensor()
            found = gathered.cpu() if keep else gathered.new_empty(0)
    return found


def like(tensor: Any, value: Tensor) -> Tensor:
    """Return a whole value on the device of a tensor, cut as it is."""
    if not is_cut(tensor):
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )


def clip_gradients(model: torch.nn.Module, most: float) -> Tensor:
    """Scale gradients, whole and cut ones, to a joint norm of at most ``most``; return the norm."""
    found: list[Any] = [own.grad for own in model.parameters() if own.grad is not None]
    if not any(map(is_cut, found)):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    cut = [grad for grad in found if is_cut(grad)]
    kept = [grad for grad in found if not is_cut(grad)]
    parts: list[Tensor] = [grad.to_local() for grad in cut]
    # Cut ones are square sums over the workers; whole ones are alike on all of them.
    squares = torch.stack([part.float().square().sum() for part in parts]).sum()
    torch.distributed.all_reduce(squares, group=cut[0].device_mesh.get_group())
    if kept:
        squares += torch.nn.utils.get_total_norm(kept).square()
    norm = squares.sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for grad in [*parts, *kept]:
        grad.mul_(scale)
    return norm
