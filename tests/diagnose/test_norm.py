"""Right gradients before clipping and wrong ones after it: whose norm, and counted how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import shardproof as sp
from diagnose.models import GATED, PICTURES, edited, found, named, passes

CUT = ("attn.q", "attn.k", "attn.v", "attn.proj.weight", "gate", "up", "down.weight")
"""What `split` cuts over tp."""


def clip(step: sp.Step, square: Tensor) -> None:
    scale = (step.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in step.model.parameters():
        local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        local *= scale


def squares(step: sp.Step) -> tuple[Tensor, Tensor]:
    """Sum of squares of what is cut over tp, and of what is whole."""
    cut, whole = torch.zeros(()), torch.zeros(())
    for name, parameter in step.model.named_parameters():
        (cut if name.startswith(CUT) else whole).add_(parameter.grad.square().sum())
    return cut, whole


def once(step: sp.Step) -> None:
    cut, whole = squares(step)
    dist.all_reduce(cut, group=step.mesh["tp"].get_group())
    clip(step, cut + whole)


def whole_k_times(step: sp.Step) -> None:
    square = sum(squares(step))
    dist.all_reduce(square, group=step.mesh["tp"].get_group())
    clip(step, square)


def own_alone(step: sp.Step) -> None:
    clip(step, sum(squares(step)))


CLIPPED = replace(GATED, max_grad_norm=0.05)


def test_the_norm_over_slices_counts_what_is_whole_once() -> None:
    passes(replace(CLIPPED, train_step=edited(once)), "tp=2")


@pytest.mark.parametrize(
    ("edit", "axes", "said"),
    [
        (whole_k_times, (None, "tp"), "the norm is that of what is whole counted 2 times"),
        (own_alone, ("tp",), "each by a norm of its own"),
    ],
)
def test_a_norm_that_counts_otherwise_is_found_after_right_gradients(
    edit: Callable[[sp.Step], None], axes: tuple[str | None, ...], said: str
) -> None:
    first = found(replace(CLIPPED, train_step=edited(edit)), "tp=2", steps=1)
    assert (first.cause, first.stage) == ("grad-norm", "grad-norm")
    assert first.axis in axes
    assert said in first.evidence
    assert first.ranks == (0, 1)


def test_a_limit_of_another_size_clips_all_ranks_by_one_wrong_number() -> None:
    def loose(step: sp.Step) -> None:
        nn.utils.clip_grad_norm_(step.model.parameters(), 2 * step.max_grad_norm)

    first = found(replace(PICTURES, max_grad_norm=0.05, train_step=edited(loose)), "dp_replicate=2", steps=1)
    assert (named(first), first.stage) == (("grad-norm", None), "grad-norm")
    assert first.factor == pytest.approx(2, rel=1e-4)
    assert "all ranks clipped by 2" in first.evidence


def test_the_norm_of_the_own_shard_clips_each_rank_by_a_number_of_its_own() -> None:
    def layout(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return fully_shard(model, mesh=mesh["dp_shard"])

    def own(step: sp.Step) -> None:
        clip(step, sum(p.grad.to_local().square().sum() for p in step.model.parameters()))

    first = found(
        replace(PICTURES, parallelize=layout, max_grad_norm=0.05, train_step=edited(own)), "dp_shard=2", steps=1
    )
    assert (named(first), first.stage) == (("grad-norm", "dp_shard"), "grad-norm")
    assert "ranks clipped by different coefficients" in first.evidence
