"""What `check` makes of fused matrices that were split by hand: query, key and value in one, with few key heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 8, 4, 2, 2, 4
TP = 4
QUERY, KEY = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
BLOCKS = "fused: 3 blocks (8, 4, 4)"


class Attention(nn.Module):
    """Grouped-query attention with one matrix for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, QUERY + 2 * KEY, bias=False)
        self.wo = nn.Linear(QUERY, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        own = self.wo.weight.shape[1]
        key = (self.wqkv.weight.shape[0] - own) // 2
        heads = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in self.wqkv(x).split([own, key, key], -1))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Alike(torch.autograd.Function):
    """The same input on all peers, each of which makes one term of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Summed(torch.autograd.Function):
    """Terms of an output, added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def by_hand(*, added: bool) -> Any:
    """4 peers: a query head each, and a key and a value head for two of them, whose gradients are `added` up."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        group, rank = mesh["tp"].get_group(), mesh["tp"].get_local_rank()
        query, key, value = model.wqkv.weight.detach().split([QUERY, KEY, KEY])
        shared = rank * KV_HEADS // TP
        own = [query.chunk(TP)[rank], key.chunk(KV_HEADS)[shared], value.chunk(KV_HEADS)[shared]]
        model.wqkv.weight = nn.Parameter(torch.cat(own))
        model.wo.weight = nn.Parameter(model.wo.weight.detach().chunk(TP, 1)[rank].clone())
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]

        def add(grad: Tensor) -> Tensor:
            both = grad[HEAD_DIM:].contiguous()
            dist.all_reduce(both, group=pairs[shared])
            return torch.cat([grad[:HEAD_DIM], both])

        if added:
            model.wqkv.weight.register_hook(add)
        model.wqkv.register_forward_pre_hook(lambda _module, args: Alike.apply(args[0], group))
        model.wo.register_forward_hook(lambda _module, _args, output: Summed.apply(output, group))
        return model

    return parallelize


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def checked(*, added: bool) -> sp.Report:
    samples = torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    experiment = sp.Experiment(
        model=Attention,
        data=list(samples),
        loss=loss,
        optimizer=optimizer,
        batch_size=4,
        steps=2,
        parallelize=by_hand(added=added),
    )
    return sp.check(experiment, strategies=("tp",), ranks=TP)


def test_fused_blocks_with_shared_key_heads_are_right_and_named() -> None:
    report = checked(added=True)
    assert report.ok, str(report)
    layouts = {(c.stage, c.name): c.layout for c in report.runs[0].comparisons if c.step < 1}
    assert layouts["initial-state", "wqkv.weight"] == f"tp: {BLOCKS} of dim 0, a slice of each per rank"
    assert layouts["gradient", "wqkv.weight"] == layouts["initial-state", "wqkv.weight"]
    assert layouts["forward", "wqkv"] == f"tp: {BLOCKS} of dim 2, a slice of each per rank"
    assert layouts["initial-state", "wo.weight"] == "tp: slices of dim 1"


def test_gradients_of_shared_key_heads_that_nobody_adds_up_are_a_finding() -> None:
    report = checked(added=False)
    assert report.first is not None
    assert (report.first.stage, report.first.where, report.first.step) == ("gradient", "wqkv.weight", 0)
