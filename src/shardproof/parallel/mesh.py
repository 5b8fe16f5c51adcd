"""The device mesh of a run: always the same three axes, so that code never asks which of them exist."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardproof.spec.parallelism import AXES, Parallelism


def build(parallelism: Parallelism, device_type: str) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """A mesh with the axes `dp_replicate`, `dp_shard`, `tp` (size 1 included) over the default process group.

    `mesh["dp"]` is the two data axes flattened; its process group comes along.
    """
    mesh = init_device_mesh(device_type, parallelism.degrees, mesh_dim_names=AXES)
    data = mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return mesh, data.get_group()


def axis_of(ranks: frozenset[int], parallelism: Parallelism, rank: int) -> str:
    """The mesh axis whose peers of `rank` are exactly `ranks`; axes joined by `+` where several are meant.

    `self` for a group of one, `other` for a group that follows no axis.
    """
    if len(ranks) == 1:
        return "self"
    at = parallelism.coordinates(rank)
    for names in (
        ("tp",),
        ("dp_shard",),
        ("dp_replicate",),
        ("dp_replicate", "dp_shard"),
        ("dp_shard", "tp"),
        ("dp_replicate", "tp"),
        AXES,
    ):
        peers = frozenset(
            other
            for other in range(parallelism.world_size)
            if all(parallelism.coordinates(other)[axis] == at[axis] for axis in AXES if axis not in names)
        )
        if peers == ranks:
            return "+".join(names)
    return "other"
