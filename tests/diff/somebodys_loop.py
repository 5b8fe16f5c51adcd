"""Training loops as somebody writes them who has never heard of us: one network, many layouts, and some mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from shardproof.ranks import Place

WIDTH, HIDDEN, CLASSES, BATCH, STEPS = 16, 32, 4, 8, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.first(x)))
        return self.head(x + self.down(F.gelu(self.up(x))))


class Copy(torch.autograd.Function):
    """Megatron's f: the same input everywhere, the sum of what comes back."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Sum(torch.autograd.Function):
    """Megatron's g: the sum of the outputs, and its gradient for everybody."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None


class Split(nn.Module):
    """`Net.up` and `Net.down` split by hand: plain tensors, of which each rank has a part."""

    def __init__(self, whole: nn.Linear, dim: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.dim, self.group = dim, group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.weight = nn.Parameter(whole.weight.detach().chunk(size, dim)[rank].clone())
        bias = whole.bias.detach()
        self.bias = nn.Parameter((bias.chunk(size)[rank] if dim == 0 else bias).clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 0:
            return F.linear(Copy.apply(x, self.group), self.weight, self.bias)
        return Sum.apply(F.linear(x, self.weight), self.group) + self.bias


@dataclass
class Laid:
    """A model under a layout, and which part of the data this rank is to read."""

    model: nn.Module
    readers: int = 1
    reader: int = 0
    microbatches: int = 1
    after_backward: Callable[[], None] = lambda: None
    inner: nn.Module | None = None


def lay_out(kind: str, model: Net, world: int, rank: int) -> Laid:
    """`single`, `accumulated`, `ddp`, `ddp-accumulated`, `fsdp`, `fsdp1`, `tp`, `tp-fsdp`, `tp-by-hand`."""
    everyone = {"readers": world, "reader": rank}
    if kind in ("single", "accumulated"):
        return Laid(model, microbatches=1 if kind == "single" else 2)
    if kind.startswith("ddp"):
        many = 2 if kind.endswith("accumulated") else 1
        return Laid(DistributedDataParallel(model), **everyone, microbatches=many, inner=model)
    if kind == "fsdp":
        fully_shard(model.up)
        return Laid(fully_shard(model), **everyone)
    if kind == "fsdp1":
        return Laid(FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True), **everyone)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    part = {"readers": world // 2, "reader": rank // 2}
    if kind == "tp-by-hand":
        group = mesh.get_group("tp")
        model.up, model.down = Split(model.up, 0, group), Split(model.down, 1, group)
    else:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind == "tp-fsdp":
        return Laid(fully_shard(model, mesh=mesh["dp"]), **part)
    return Laid(model, **part, after_backward=lambda: _averaged(model, mesh["dp"]))


def _averaged(model: nn.Module, mesh: DeviceMesh) -> None:
    for parameter in model.parameters():
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        dist.all_reduce(grad, group=mesh.get_group())
        grad /= mesh.size()


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, WIDTH, generator=generator)
    return inputs.to(dtype), torch.randint(0, CLASSES, (STEPS * BATCH,), generator=generator)


def train(
    path: Path,
    kind: str,
    *,
    mistake: str = "",
    dtype: torch.dtype = torch.float64,
    what: str = "full",
    disturb: int | None = None,
) -> None:
    """Three steps in the current world, recorded at `path`; samples go round robin, as DistributedSampler does it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank if mistake == "seeds" else 0)
    model = Net().to(dtype)
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    laid = lay_out(kind, model, world, rank)
    optimizer = early if mistake == "optimizer-first" else torch.optim.AdamW(laid.model.parameters(), lr=1e-2)
    inputs, labels = data(dtype)
    readers, reader = (world, rank) if mistake == "data-over-world" else (laid.readers, laid.reader)
    with sp.record(path, laid.model, optimizer, what=what, disturb=disturb):
        for step in range(STEPS):
            own = torch.arange(step * BATCH, (step + 1) * BATCH)[0 if mistake == "repeated" else reader :: readers]
            optimizer.zero_grad()
            for part in own.chunk(laid.microbatches):
                model = laid.inner if mistake == "unwrapped" else laid.model
                loss = F.cross_entropy(model(inputs[part]), labels[part]) / laid.microbatches
                if mistake == "accumulate-twice":
                    loss = loss / laid.microbatches
                loss.backward()
            if mistake != "not-averaged":
                laid.after_backward()
            optimizer.step()


class OnRanks:
    """What `start` runs on each rank."""

    def train(self, place: Place, path: Path, kind: str, world: int, mistake: str = "", what: str = "full") -> None:
        with place.world(path.name, world), warnings.catch_warnings():
            if mistake == "optimizer-first":
                warnings.filterwarnings("ignore", "record: AdamW does not hold a single parameter")
            train(path, kind, mistake=mistake, what=what)

    def train_disturbed(self, place: Place, path: Path, kind: str, disturb: int | None, dtype: torch.dtype) -> None:
        with place.world(path.name, 1):
            train(path, kind, dtype=dtype, disturb=disturb)

    def train_in(self, place: Place, path: Path, kind: str, world: int, dtype: torch.dtype) -> None:
        with place.world(path.name, world):
            train(path, kind, dtype=dtype)


def kinds() -> Iterator[tuple[str, int]]:
    """Every layout, and on how many ranks."""
    yield from (("single", 1), ("accumulated", 1), ("ddp", 4), ("ddp-accumulated", 2), ("fsdp", 4), ("fsdp1", 2))
    yield from (("tp", 2), ("tp", 4), ("tp-fsdp", 4), ("tp-by-hand", 2), ("tp-by-hand", 4))
