"""Which ranks of a mesh hold the same elements of a tensor, as far as the tensor itself tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from shardproof.errors import UsageError
from shardproof.parallel.held import Held

DATA_AXES = ("dp", "data", "ddp", "fsdp", "hsdp", "replicate", "shard", "batch")
"""Beginnings of the names of axes along which ranks read different data."""

PEER_AXES = ("tp", "tensor", "model", "mp")
"""Beginnings of the names of axes along which ranks read the same data."""

Axes = int
"""A set of mesh axes: bit i stands for axis i."""


class Grid:
    """The ranks that are compared: a box with an axis for each axis of a mesh."""

    def __init__(self, mesh: DeviceMesh | None, data_axes: Iterable[str] | None = None) -> None:
        """`mesh` None is one axis `dp` over all ranks. Raises `UsageError` for a mesh that cannot be meant."""
        self.mesh = mesh
        if mesh is None:
            self.names: tuple[str, ...] = ("dp",)
            self.ranks = torch.arange(dist.get_world_size())
            device_type = "cuda" if "nccl" in dist.get_backend() else "cpu"
        else:
            if not mesh.mesh_dim_names:
                raise UsageError("the mesh's axes have no names; build it with mesh_dim_names, as ('dp', 'tp')")
            self.names, self.ranks, device_type = tuple(mesh.mesh_dim_names), mesh.mesh.cpu(), mesh.device_type
        cuda = device_type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(device_type)
        self.size = self.ranks.numel()
        self.own = dist.get_rank()
        at = (self.ranks == self.own).nonzero()
        if len(at) != 1:
            raise UsageError(f"rank {self.own} is not part of the mesh; let only the mesh's own ranks call")
        self._at = tuple(at[0].tolist())
        chosen = [name for name in self.names if name.startswith(DATA_AXES)] if data_axes is None else list(data_axes)
        lacking = [name for name in chosen if name not in self.names]
        if lacking:
            raise UsageError(f"data_axes: the mesh has no axis {lacking[0]!r}; it has {', '.join(self.names)}")
        self.data = self.axes(chosen)
        self.every = self.axes(self.names)
        self.peers = self.axes(name for name in self.names if name.startswith(PEER_AXES)) & ~self.data

    def axes(self, names: Iterable[str]) -> Axes:
        """The axes of these names."""
        chosen = set(names)
        return sum(1 << axis for axis, name in enumerate(self.names) if name in chosen)

    def covered(self, ranks: Iterable[int]) -> Axes:
        """The axes along which all peers of this rank are among `ranks`."""
        among = set(ranks)
        return sum(1 << axis for axis in range(len(self.names)) if among.issuperset(self._line(axis)))

    def touched(self, ranks: Iterable[int]) -> Axes:
        """The axes along which some peer of this rank, other than itself, is among `ranks`."""
        among = set(ranks) - {self.own}
        return sum(1 << axis for axis in range(len(self.names)) if among.intersection(self._line(axis)))

    def lines(self, axes: Axes) -> Iterator[list[int]]:
        """Groups of global ranks that differ on nothing but these axes."""
        inner = [axis for axis in range(len(self.names)) if axes >> axis & 1]
        outer = [axis for axis in range(len(self.names)) if not axes >> axis & 1]
        length = int(torch.tensor([self.ranks.shape[axis] for axis in inner]).prod())
        yield from self.ranks.permute(*outer, *inner).reshape(-1, length).tolist()

    def between(self, ranks: Iterable[int]) -> str:
        """The names of the axes on which these ranks differ, joined by `+`."""
        found = torch.stack([(self.ranks == rank).nonzero()[0] for rank in ranks])
        return "+".join(name for axis, name in enumerate(self.names) if len(set(found[:, axis].tolist())) > 1)

    def groups(self) -> list[dist.ProcessGroup]:
        """Process groups that, gathered over one after the other, reach all ranks of the grid."""
        if self.mesh is None or self.size == dist.get_world_size():
            world = dist.group.WORLD
            return [] if world is None else [world]
        return [self.mesh.get_group(axis) for axis in range(len(self.names)) if self.mesh.size(axis) > 1]

    def _line(self, axis: int) -> list[int]:
        index: list[int | slice] = list(self._at)
        index[axis] = slice(None)
        ranks: list[int] = self.ranks[tuple(index)].tolist()
        return ranks


def parameter_axes(held: Held, grid: Grid) -> Axes:
    """The axes along which ranks that say the same of where their part of a parameter lies hold the same elements.

    Metadata tells, or the shape that the parameter has on one device, where that is known. Along the data axes a
    tensor that says nothing is a replica. Along any other axis it may be a slice that was cut by hand.
    """
    piece, leaf = held.piece, held.leaf
    if held.canonical == piece.whole and (piece.declared or piece.shape == piece.whole):
        return grid.every
    if isinstance(leaf, DTensor):
        return grid.data | grid.covered(leaf.device_mesh.mesh.flatten().tolist())
    by_hand = held.canonical is not None and piece.shape != held.canonical
    if by_hand and not any(size > 1 and not grid.data >> axis & 1 for axis, size in enumerate(grid.ranks.shape)):
        # Cut by hand, and there is nothing but data axes that it can be cut along.
        return 0
    return grid.data


def buffer_axes(buffer: Tensor, grid: Grid, shape: Sequence[int] | None) -> Axes:
    """The axes along which a buffer must be the same; `shape` is the one that it has on one device, where known."""
    axes = 0
    if isinstance(buffer, DTensor):
        axes = grid.covered(buffer.device_mesh.mesh.flatten().tolist()) & ~pending_axes(buffer, grid)
    elif shape is not None and tuple(shape) == tuple(buffer.shape):
        axes = grid.every
    if buffer.is_floating_point() or buffer.is_complex():
        # A running statistic is of the samples that the rank has seen; nothing tells it from a constant.
        return axes & ~grid.data
    return axes | grid.data


def pending_axes(tensor: Tensor, grid: Grid) -> Axes:
    """The axes over which a tensor is still a partial sum, so that ranks rightly hold different numbers."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, axes = tensor.device_mesh, 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Partial):
            index: list[int | slice] = list(mesh.get_coordinate() or ())
            index[axis] = slice(None)
            axes |= grid.touched(mesh.mesh[tuple(index)].tolist())
    return axes


def gradients_are_reduced(model: nn.Module) -> bool:
    """False while DDP's last backward pass did not reduce: inside `no_sync`, and after it until the next one that does.

    FSDP keeps such gradients to itself.
    """
    return all(
        module.require_backward_grad_sync and module.require_forward_param_sync
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    )


def whole_shapes(shapes: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as tuples."""
    return {name: tuple(shape) for name, shape in (shapes or {}).items()}
