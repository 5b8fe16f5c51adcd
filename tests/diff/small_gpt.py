"""A small decoder and its loop as somebody writes them: tensor parallelism by hand, and the mistakes made in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from somebodys_loop import Copy, Sum
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from shardproof.ranks import Place

TOKENS, WIDTH, LENGTH, BATCH, STEPS, HEAD, HEADS = 11, 16, 6, 8, 2, 4, 4


class Rows(nn.Module):
    """A row-parallel layer by hand."""

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup, *, bias_on_each: bool = False) -> None:
        super().__init__()
        self.group, self.bias_on_each = group, bias_on_each
        own = whole.weight.detach().chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]
        self.weight, self.bias = nn.Parameter(own.clone()), nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.bias_on_each:
            return Sum.apply(F.linear(x, self.weight, self.bias), self.group)
        return Sum.apply(F.linear(x, self.weight), self.group) + self.bias


class Attention(nn.Module):
    """Query, key and value in one matrix; with fewer key heads than query heads where `kv` says so."""

    def __init__(self, kv: int, dropout: float) -> None:
        super().__init__()
        self.kv = kv
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * kv) * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.group: dist.ProcessGroup | None = None
        self.sizes = [HEADS * HEAD, kv * HEAD, kv * HEAD]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.group is None else Copy.apply(x, self.group)
        query, key, value = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in self.qkv(x).split(self.sizes, -1)
        )
        again = query.shape[1] // key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key.repeat_interleave(again, 1), value.repeat_interleave(again, 1), is_causal=True
        )
        return self.drop(self.out(mixed.transpose(1, 2).flatten(-2)))

    def split(self, group: dist.ProcessGroup) -> None:
        """Each rank gets its query heads, and the key and value heads that they need."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        rows, start = [], 0
        for whole in self.sizes:
            own = max(whole // size, HEAD)
            first = start + rank * whole // size // HEAD * HEAD
            rows.append(torch.arange(first, first + own))
            start += whole
        self.sizes = [len(own) for own in rows]
        index = torch.cat(rows)
        self.qkv.weight = nn.Parameter(self.qkv.weight.detach()[index].clone())
        self.qkv.bias = nn.Parameter(self.qkv.bias.detach()[index].clone())
        self.out, self.group = Rows(self.out, group), group

    def sum_shared(self) -> None:
        """Add up the gradients of key and value heads that several ranks hold."""
        size = dist.get_world_size(self.group)
        copies = size // self.kv
        if copies < 2:
            return
        first = dist.get_rank(self.group) // copies * copies
        for parameter in (self.qkv.weight, self.qkv.bias):
            all_ranks = [torch.empty_like(parameter.grad) for _ in range(size)]
            dist.all_gather(all_ranks, parameter.grad, group=self.group)
            shared = torch.stack(all_ranks[first : first + copies]).sum(0)
            parameter.grad[self.sizes[0] :] = shared[self.sizes[0] :]


class Block(nn.Module):
    def __init__(self, kv: int, dropout: float) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention(kv, dropout)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        inner = self.norm(x)
        if self.group is not None:
            inner = Copy.apply(inner, self.group)
        return x + self.down(F.gelu(self.up(inner)))

    def split(self, group: dist.ProcessGroup, mistake: str) -> None:
        self.attention.split(group)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        for name in ("weight", "bias"):
            own = getattr(self.up, name).detach().chunk(size)[rank].clone()
            setattr(self.up, name, nn.Parameter(own))
        self.down = Rows(self.down, group, bias_on_each=mistake == "bias-on-each-rank")
        self.group = None if mistake == "no-sum-in-backward" else group


class Gpt(nn.Module):
    def __init__(self, kv: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block, self.last = Block(kv, dropout), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.last(self.block(x)))


@dataclass(frozen=True)
class Loop:
    """How somebody trains it."""

    kind: str = "single"
    """`single`, `ddp`, `by-hand-ddp`, `fsdp`, `by-hand-tp` or `tp`."""
    tp: int = 2
    tp_outside: bool = False
    """Whether tensor-parallel peers are 0 and 2, 1 and 3."""
    microbatches: int = 1
    kv: int = HEADS
    dropout: float = 0.0
    counted: bool = False
    """Whether labels are left out, so that parts of the batch hold unequally many tokens."""
    clip: bool = False
    padded: bool = False
    """Whether each part is padded to a length of its own."""
    single: bool = False
    """Whether it trains in float32."""
    mistake: str = ""


def averaged(model: nn.Module, group: dist.ProcessGroup | None, *, divide: bool = True) -> None:
    for parameter in model.parameters():
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        dist.all_reduce(grad, group=group)
        grad /= dist.get_world_size(group) if divide else 1


def data(loop: Loop) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, TOKENS, (STEPS * BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, TOKENS, ids.shape, generator=generator)
    lengths = torch.arange(STEPS * BATCH) % 4 + 2
    if loop.counted or loop.padded:
        labels[torch.arange(LENGTH) >= lengths[:, None]] = -100
    if loop.padded:
        ids[torch.arange(LENGTH) >= lengths[:, None]] = 0
    return ids, labels


@dataclass
class Laid:
    """The model as it is laid out, and which part of the data this rank is to read."""

    model: nn.Module
    inner: Gpt
    readers: int
    reader: int
    mesh: DeviceMesh | None = None


def lay_out(inner: Gpt, loop: Loop) -> Laid:
    world, rank = dist.get_world_size(), dist.get_rank()
    if not loop.kind.endswith("tp"):
        wrapped = {"ddp": DistributedDataParallel, "fsdp": fully_shard}.get(loop.kind, nn.Module.train)
        return Laid(wrapped(inner), inner, world, rank)
    sizes, names = (world // loop.tp, loop.tp), ("dp", "tp")
    order = slice(None, None, -1 if loop.tp_outside else 1)
    mesh = init_device_mesh("cpu", sizes[order], mesh_dim_names=names[order])
    if loop.kind == "tp":
        parallelize_module(inner.block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        inner.block.split(mesh.get_group("tp"), loop.mistake)
    return Laid(inner, inner, mesh["dp"].size(), mesh["dp"].get_local_rank(), mesh)


def train(path: Path, loop: Loop) -> None:
    """Two steps in the current world, recorded at `path`."""
    torch.manual_seed(0)
    model = Gpt(loop.kv, loop.dropout)
    laid = lay_out(model if loop.single else model.double(), loop)
    optimizer = torch.optim.SGD(laid.model.parameters(), lr=1e-2)
    if loop.mistake == "evaluation-mode":
        laid.inner.block.attention.drop.eval()
    with sp.record(path, laid.model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            whole = torch.arange(step * BATCH, (step + 1) * BATCH)
            parts = whole[laid.reader :: laid.readers].chunk(loop.microbatches)
            for number, part in enumerate(parts):
                if loop.mistake == "micro-batch-lost":
                    optimizer.zero_grad()
                with unsynchronised(laid.model, loop, last=number == len(parts) - 1):
                    loss_of(laid, loop, part, whole).backward()
                if loop.mistake == "sum-in-bfloat16" and number < len(parts) - 1:
                    for parameter in laid.model.parameters():
                        parameter.grad = parameter.grad.bfloat16().double()
            reduce(laid, loop)
            if loop.clip:
                clip(laid.model, everywhere=loop.mistake != "norm-of-the-rank")
            optimizer.step()


def unsynchronised(model: nn.Module, loop: Loop, *, last: bool) -> contextlib.AbstractContextManager[None]:
    alone = last if loop.mistake == "all-but-last-synchronised" else not last
    return model.no_sync() if loop.kind == "ddp" and alone else contextlib.nullcontext()


def loss_of(laid: Laid, loop: Loop, part: Tensor, whole: Tensor) -> Tensor:
    ids, labels = data(loop)
    length = int((labels[part] != -100).sum(1).max()) if loop.padded else LENGTH
    logits, wanted = laid.model(ids[part, :length]).flatten(0, 1), labels[part, :length].flatten()
    if loop.mistake == "mean-of-means":
        return F.cross_entropy(logits, wanted) / loop.microbatches
    return F.cross_entropy(logits, wanted, reduction="sum") * laid.readers / (labels[whole] != -100).sum()


def reduce(laid: Laid, loop: Loop) -> None:
    if loop.kind == "by-hand-tp":
        laid.inner.block.attention.sum_shared()
    if loop.kind == "by-hand-ddp" or (laid.mesh is not None and loop.mistake != "not-averaged"):
        group = None if laid.mesh is None else laid.mesh.get_group("dp")
        averaged(laid.model, group, divide=loop.mistake != "summed")


def clip(model: nn.Module, *, everywhere: bool) -> None:
    """To a norm that somebody computes by himself."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    square = torch.stack([grad.square().sum() for grad in grads]).sum()
    if everywhere and any(isinstance(p.grad, DTensor) for p in model.parameters()):
        dist.all_reduce(square)
    for grad in grads:
        grad *= 0.1 / square.sqrt()


class OnRanks:
    """What `start` runs on each rank."""

    def train(self, place: Place, path: Path, world: int, loop: Mapping[str, object]) -> None:
        with place.world(path.name, world), warnings.catch_warnings():
            train(path, Loop(**loop))
