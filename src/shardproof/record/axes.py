"""Which ranks this rank shares what with: found in wrappers and DTensors, or told by the user's mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardproof.errors import UsageError
from shardproof.parallel.held import Held, fsdp2_groups
from shardproof.spec.parallelism import AXES

WORDS = {
    "dp_shard": ("dp_shard", "fsdp", "shard", "data_parallel_shard"),
    "dp_replicate": ("dp_replicate", "replicate", "ddp", "data_parallel", "data", "dp", "batch"),
    "tp": ("tp", "tensor_parallel", "tensor", "model_parallel", "model", "mp"),
}
"""Axis -> what users and frameworks call it, the plainest word last."""

EITHER = frozenset({"dp", "data", "data_parallel", "batch"})
"""Words that say that ranks read different data, and not who holds the parameters."""

Axes = dict[str, list[int]]
"""Axis -> global ranks of this rank's group along it, in order."""


def axis_named(name: str) -> str | None:
    """The axis that a mesh dimension of this name is."""
    return next((axis for axis, words in WORDS.items() if name.lower() in words), None)


def told(mesh: DeviceMesh, found: Axes) -> Axes:
    """The axes of a user's mesh, by the names of its dimensions; `found` tells what "dp" is.

    Raises `UsageError` for a mesh without names, with unknown ones, or without this rank.
    """
    names = mesh.mesh_dim_names
    if not names:
        raise UsageError("mesh: its axes have no names; build it with mesh_dim_names, as ('dp_shard', 'tp')")
    axes: Axes = {}
    for dim, name in enumerate(names):
        axis = axis_named(name)
        if axis is None:
            known = "; ".join(f"{axis}: {', '.join(words)}" for axis, words in WORDS.items())
            raise UsageError(f"mesh: {name!r} is no axis that is known; name it one of ({known})")
        group = _along(mesh, dim)
        if group is None:
            raise UsageError(f"mesh: rank {dist.get_rank()} is not part of it; let only its own ranks record")
        if name.lower() in EITHER:
            axis = next((a for a in ("dp_shard", "dp_replicate") if found.get(a) == group), axis)
        if axis in axes:
            raise UsageError(f"mesh: two of its axes mean {axis}: {', '.join(names)}")
        axes[axis] = group
    return axes


def found_axes(model: nn.Module, parameters: Iterable[Held]) -> Axes:
    """What the wrappers and the DTensors of a model say; empty where there is one process."""
    axes: Axes = {}
    if not (dist.is_available() and dist.is_initialized()):
        return axes
    for axis, ranks in (*_of_wrappers(model), *_of_tensors(parameters)):
        known = any(ranks == group for name, group in axes.items() if name != axis)
        # A data axis may show twice: as FSDP's own group, and in the mesh of its parameters.
        if axis not in axes and not known:
            axes[axis] = ranks
    return {axis: axes[axis] for axis in AXES if axis in axes}


def _of_wrappers(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            yield "dp_replicate", dist.get_process_group_ranks(module.process_group)
        elif isinstance(module, FullyShardedDataParallel):
            whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            yield "dp_replicate" if whole else "dp_shard", dist.get_process_group_ranks(module.process_group)
            between = getattr(module, "_inter_node_pg", None)
            if between is not None:
                yield "dp_replicate", dist.get_process_group_ranks(between)
        elif isinstance(module, FSDPModule):
            for group in fsdp2_groups(module):
                info = group.mesh_info
                for axis, dim in (("dp_shard", info.shard_mesh_dim), ("dp_replicate", info.replicate_mesh_dim)):
                    ranks = None if dim is None else _along(info.mesh, dim)
                    if ranks is not None:
                        yield axis, ranks


def _of_tensors(parameters: Iterable[Held]) -> Iterator[tuple[str, list[int]]]:
    """Along the axes of their meshes; what no wrapper cut over, tensor parallelism did."""
    seen: set[int] = set()
    for held in parameters:
        if not isinstance(held.leaf, DTensor) or id(held.leaf.device_mesh) in seen:
            continue
        mesh = held.leaf.device_mesh
        seen.add(id(mesh))
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        for dim, name in enumerate(names):
            ranks = _along(mesh, dim)
            if ranks is not None and (len(ranks) > 1 or axis_named(name)):
                yield axis_named(name) or "tp", ranks


def _along(mesh: DeviceMesh, dim: int) -> list[int] | None:
    """Global ranks of this rank's group along one dimension of a mesh; None on a rank outside."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    index: list[int | slice] = list(coordinate)
    index[dim] = slice(None)
    return [int(rank) for rank in mesh.mesh[tuple(index)].tolist()]
