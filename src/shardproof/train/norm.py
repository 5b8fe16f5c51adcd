"""The global gradient norm where some parameters are sharded over more mesh axes than others.

torch's `clip_grad_norm_` refuses parameters on different meshes (some on `dp_shard` and `tp`, others on `dp_shard`
only). Here every rank sums the squares of what it holds, per set of axes over which that is a shard; each sum is then
reduced over just those axes, so that nothing is counted twice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardproof.parallel.held import Held, plain, scale_

Groups = tuple[dist.ProcessGroup, ...]


def total_norm(parameters: list[Held], mesh: DeviceMesh) -> Tensor:
    """2-norm of all gradients as one device would compute it; shape `()`, the same on every rank."""
    gradients: dict[Groups, list[Tensor]] = {}
    for held in parameters:
        # In the order of the parameters, which is the same on every rank: names of groups are not. Every rank must take
        # part in the same reductions, also for a parameter of which it holds nothing.
        own = gradients.setdefault(_sharded_over(held, mesh), [])
        if held.leaf.grad is not None:
            local = held.local(held.leaf.grad).detach()
            own.append(torch.view_as_real(local) if local.is_complex() else local)
    sums = {groups: _squares(own) for groups, own in gradients.items() if own}
    device = plain(parameters[0].leaf).device
    dtype = max((s.dtype for s in sums.values()), key=lambda d: d.itemsize, default=torch.get_default_dtype())
    total = torch.zeros((), dtype=dtype, device=device)
    for groups in gradients:
        part = sums.get(groups, torch.zeros((), dtype=dtype, device=device)).to(dtype)
        for group in groups:
            dist.all_reduce(part, group=group)
        total = total + part
    return total.sqrt()


EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm before it divides by it."""


def clip_(parameters: list[Held], norm: Tensor, max_norm: float, epsilon: float = EPSILON) -> None:
    """Scale all gradients in place so that their norm is at most `max_norm`, by torch's formula."""
    coefficient = (max_norm / (norm + epsilon)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, dict[int, Tensor]] = {}
    for held in parameters:
        if held.leaf.grad is not None:
            by_dtype.setdefault(held.leaf.grad.dtype, {})[id(held.leaf)] = held.leaf.grad
    for dtype, grads in by_dtype.items():
        scale_(list(grads.values()), coefficient.to(dtype))


def _squares(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements; all gradients at once, as a loop in Python costs more than the sums."""
    dtype = max((_accumulate(gradient.dtype) for gradient in gradients), key=lambda d: d.itemsize)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).square().sum()


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    """Squares of half-precision gradients are summed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _sharded_over(held: Held, mesh: DeviceMesh) -> Groups:
    """The process groups over which this parameter's gradient is cut into pieces."""
    grad = held.leaf.grad
    tensor = held.leaf if grad is None else grad
    if isinstance(tensor, DTensor):
        groups: Groups = tuple(
            tensor.device_mesh.get_group(axis)
            for axis, placement in enumerate(tensor.placements)
            # FSDP's strided shard over a tp shard is a shard too, though `is_shard()` denies it.
            if isinstance(placement, Shard | _StridedShard) and tensor.device_mesh.size(axis) > 1
        )
        over_tp = held.split_by_hand
    else:
        groups = () if held.group is None else (held.group,)
        # A flat parameter may be a piece of a tp shard.
        over_tp = held.split_by_hand or held.piece.shape != held.piece.whole
    # What is smaller than the parameter on one device, and says nothing of tp itself, was split over it by hand.
    if over_tp and mesh["tp"].size() > 1:
        groups = (*groups, mesh.get_group("tp"))
    return groups
