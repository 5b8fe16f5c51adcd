"""Fewer digits than the run has, beside a factor near one and beside noise of the same size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import GATED, TEXT, at, edited, found, named, numbers
from shardproof.zoo.fixtures.megatron import replicated


def reduced_in_bfloat16(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> Any:
    ddp: Any = replicated(model, mesh, parallelism)

    def narrow(group, bucket):  # DDP reads annotations, and takes no strings
        sent = (bucket.buffer() / parallelism.dp).to(torch.bfloat16)
        work = dist.all_reduce(sent, group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0].to(bucket.buffer().dtype))

    ddp.register_comm_hook(mesh["dp"].get_group(), narrow)
    return ddp


def test_gradients_reduced_in_bfloat16_have_lost_precision() -> None:
    first = found(replace(TEXT, parallelize=reduced_in_bfloat16), "dp_replicate=3", steps=1)
    assert (named(first), at(first)) == (("precision", None), ("gradient", 0, "head.bias"))
    assert "bfloat16" in first.evidence
    assert first.factor is None


def test_a_factor_as_near_to_one_as_bfloat16_is_a_factor() -> None:
    """C18 beside C6."""

    def nearly(step: sp.Step) -> None:
        for parameter in step.model.parameters():
            parameter.grad *= 1 + 2**-9

    first = found(replace(TEXT, train_step=edited(nearly)), "dp_replicate=3", steps=1)
    assert named(first) == ("grad-scale", None)
    assert first.factor == pytest.approx(1 + 2**-9)


def test_noise_as_small_as_bfloat16s_is_no_rounding() -> None:
    def noisy(step: sp.Step) -> None:
        for number, parameter in enumerate(step.model.parameters()):
            parameter.grad *= 1 + 2**-9 * numbers(*parameter.shape, seed=number)

    first = found(replace(TEXT, train_step=edited(noisy)), "dp_replicate=3", steps=1)
    assert named(first) == ("unexplained", None)


class Single(nn.Module):
    """A module that computes in float32 whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight.float()).double()


def test_a_norm_computed_in_float32_has_lost_precision_in_the_forward_pass() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.norm2 = Single(model.norm2)
        return replicated(model, mesh, parallelism)

    first = found(replace(GATED, parallelize=layout), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("precision", None), ("forward", 0, "norm2"))
    assert "float32" in first.evidence


def test_weights_loaded_from_bfloat16_have_lost_precision_before_the_first_step() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return replicated(model.to(torch.bfloat16).double(), mesh, parallelism)

    first = found(replace(GATED, parallelize=layout), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("precision", None), ("initial-state", -1, "norm1.weight"))
