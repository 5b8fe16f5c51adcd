"""Not reduced (the mean of what ranks hold is right) beside divided and not summed (their sum is)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, all_tokens, at, bare, edited, found, named, same, split


def past_the_wrapper(model: Any, batch: Any) -> Any:
    return all_tokens(getattr(model, "module", model), batch)


def test_a_recurrent_model_called_past_its_wrapper_keeps_each_ranks_own_gradients() -> None:
    first = found(replace(TEXT, loss=past_the_wrapper), "dp_replicate=3")
    assert (named(first), at(first)) == (("grad-not-reduced", "dp_replicate"), ("gradient", 0, "head.bias"))
    assert first.ranks == (0, 1, 2)
    assert first.factor is None


def divided_only(step: sp.Step) -> None:
    for parameter in step.model.parameters():
        parameter.grad /= step.parallelism.dp


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_that_are_divided_and_not_summed_are_told_from_those_of_the_own_samples(ranks: int) -> None:
    strategy, nobody = f"dp_replicate={ranks}", replace(PICTURES, parallelize=bare)
    divided = found(replace(nobody, train_step=edited(divided_only)), strategy, steps=1)
    assert (named(divided), divided.stage) == (("grad-not-summed", "dp_replicate"), "gradient")
    own = found(nobody, strategy, steps=1)
    assert (named(own), own.stage) == (("grad-not-reduced", "dp_replicate"), "gradient")


def within_shards(
    model: nn.Module, mesh: Any, parallelism: sp.Parallelism, *, divide: Callable[[sp.Parallelism], int]
) -> nn.Module:
    """Sharded over one data axis, divided by some number, and never reduced over the other axis."""
    sharded = fully_shard(model, mesh=mesh["dp_shard"])
    sharded.set_gradient_divide_factor(float(divide(parallelism)))
    return sharded


@pytest.mark.parametrize(
    ("divide", "cause"), [(lambda p: p.dp_shard, "grad-not-reduced"), (lambda p: p.dp, "grad-not-summed")]
)
def test_what_shards_lack_from_other_replicas_depends_on_what_they_were_divided_by(
    divide: Callable[[sp.Parallelism], int], cause: str
) -> None:
    """C1 beside C2: named after what is missing, the mean over replicas or their sum."""
    layout = partial(within_shards, divide=divide)
    first = found(replace(PICTURES, parallelize=layout), "dp_replicate=3,dp_shard=2", steps=1)
    assert (named(first), first.stage) == ((cause, "dp_replicate"), "gradient")


def test_a_layer_outside_the_wrapper_is_not_reduced_and_the_others_are() -> None:
    """As a parameter that FSDP ignores, or one that was replaced after DDP had looked at it."""

    def layout(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return fully_shard(model, mesh=mesh["dp_shard"], ignored_params={model.norm2.weight})

    first = found(replace(GATED, parallelize=layout), "dp_shard=3", steps=1)
    assert (named(first), at(first)) == (("grad-not-reduced", "dp_shard"), ("gradient", 0, "norm2.weight"))
    assert "1 of" in first.evidence


@pytest.mark.parametrize(
    ("forgotten", "sender", "norm"), [("v", "attn.v", "norm1"), ("qk", "attn.k", "norm1"), (["gate"], "gate", "norm2")]
)
def test_one_path_among_several_that_nobody_sums_over_tp_is_named_by_its_layer(
    forgotten: Any, sender: str, norm: str
) -> None:
    """The others are summed: the sum of the copies is no right gradient either."""
    layout = partial(split, enter=dict.fromkeys(forgotten, same))
    first = found(replace(GATED, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("grad-not-summed", "tp"), ("gradient", 0, f"{norm}.weight"))
    assert f"another gradient of {sender}'s input" in first.evidence
    assert first.ranks == (0, 1)


def to_rank_0(step: sp.Step) -> None:
    """As all_reduce would, but the sum arrives at one rank."""
    for parameter in step.model.parameters():
        own = parameter.grad.clone()
        dist.reduce(own, 0)
        if step.mesh.get_rank() == 0:
            parameter.grad = own / step.parallelism.dp


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_reduction_to_one_rank_alone_names_the_ranks_that_lack_it(microbatches: int) -> None:
    experiment = replace(PICTURES, parallelize=bare, microbatches=microbatches, train_step=edited(to_rank_0))
    first = found(experiment, "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("grad-not-reduced", "dp_replicate"), "gradient")
    assert first.ranks == (1, 2)
