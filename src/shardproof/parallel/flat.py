"""FullyShardedDataParallel, the older form that flattens the parameters of a unit into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions


def flat(
    model: nn.Module, units: list[nn.Module], mesh: DeviceMesh, mixed_precision: MixedPrecision | None = None
) -> nn.Module:
    """Wrap `units` and then `model` over the `dp_shard` axis of `mesh`."""
    chosen = {id(unit) for unit in units}
    with _ties_kept(model):
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh["dp_shard"],
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in chosen) if chosen else None,
            # Left out, FSDP picks an accelerator even where the model lies on the CPU.
            device_id=torch.cuda.current_device() if mesh.device_type == "cuda" else torch.device("cpu"),
            # Keeps the user's own parameters, so that param groups and frozen parameters keep their meaning.
            use_orig_params=True,
            mixed_precision=mixed_precision,
        )


@contextlib.contextmanager
def _ties_kept(model: nn.Module) -> Iterator[None]:
    """Keep tied tensor-parallel parameters tied while FSDP flattens them.

    FSDP (seen in torch 2.13, `_init_flat_param_and_metadata`) remembers a parameter by the local tensor that it makes
    of a DTensor, and so does not know the same DTensor again when it meets it a second time: a tied embedding and head
    train apart. Handed the local tensor in both places, with its DTensor layout beside it, it sees the tie.
    """
    layouts: dict[int, Any] = {}
    local: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in local:
                    plain = nn.Parameter(parameter._local_tensor.detach(), requires_grad=parameter.requires_grad)
                    local[id(parameter)] = plain
                    layouts[id(plain)] = parameter._spec
                module._parameters[name] = local[id(parameter)]
    before = DTensorExtensions.pre_flatten_transform

    def with_layout(self: DTensorExtensions, tensor: Tensor) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = (tensor, layouts[id(tensor)]) if id(tensor) in layouts else before(self, tensor)
        return found

    if layouts:
        DTensorExtensions.pre_flatten_transform = with_layout  # type: ignore[method-assign]
    try:
        yield
    finally:
        DTensorExtensions.pre_flatten_transform = before  # type: ignore[method-assign]
