"""Tensor parallelism written by hand, as Megatron does it: plain tensors, no DTensor, all-reduces of one's own.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/by_hand_tp.py --layout tp_ddp
    torchrun --nproc-per-node 4 examples/frameworks/by_hand_tp.py --layout tp_ddp
"""

import sys
from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from task import batches, build, data, launch, options, record, report
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = ("single", "tp", "tp_ddp")

MISTAKES = {
    "data-over-world": ("tp", "tp_ddp"),
    "unwrapped": ("tp_ddp",),
    "optimizer-first": ("tp", "tp_ddp"),
    "accumulate-twice": LAYOUTS,
}


class Enter(torch.autograd.Function):
    """Into the split part: forward as it is, gradients summed over the peers (Megatron-LM's f)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Leave(torch.autograd.Function):
    """Out of it: partial sums added up, gradients as they are (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ColumnLinear(nn.Module):
    """A linear layer of which each peer holds some outputs."""

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, (rank, ranks) = group, (dist.get_rank(group), dist.get_world_size(group))
        self.weight = nn.Parameter(whole.weight.detach().chunk(ranks)[rank].clone())
        self.bias = nn.Parameter(whole.bias.detach().chunk(ranks)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:  # (batch, in) -> (batch, out / ranks)
        return F.linear(Enter.apply(x, self.group), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer of which each peer reads some inputs; the bias is everybody's, added once."""

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, (rank, ranks) = group, (dist.get_rank(group), dist.get_world_size(group))
        self.weight = nn.Parameter(whole.weight.detach().chunk(ranks, dim=1)[rank].clone())
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:  # (batch, in / ranks) -> (batch, out)
        return Leave.apply(F.linear(x, self.weight), self.group) + self.bias


def train(given: Namespace) -> None:
    """Three steps."""
    model = build(given.dtype)
    early = torch.optim.AdamW(model.parameters(), lr=1e-2) if given.mistake == "optimizer-first" else None
    if given.layout != "single":
        dist.init_process_group("gloo")
        peers = given.ranks if given.layout == "tp" else 2
        mesh = init_device_mesh("cpu", (given.ranks // peers, peers), mesh_dim_names=("dp", "tp"))
        for block in model.blocks:
            block.up = ColumnLinear(block.up, mesh.get_group("tp"))
            block.down = RowLinear(block.down, mesh.get_group("tp"))
    if given.layout == "tp_ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    optimizer = early or torch.optim.AdamW(model.parameters(), lr=1e-2)
    called = model.module if given.mistake == "unwrapped" else model

    with record(given, model, optimizer):
        for step, micro_batches in enumerate(batches(data(given.dtype), given)):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=given.dtype)
            for inputs, labels in micro_batches:
                loss = F.cross_entropy(called(inputs), labels) / given.accumulate
                total += loss.detach()
                if given.mistake == "accumulate-twice":
                    loss = loss / given.accumulate
                loss.backward()
            optimizer.step()
            report(step, total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
