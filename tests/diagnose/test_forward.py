"""The first wrong output: not summed, averaged, a bias too often, a branch too often."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, BiasedRow, Pictures, at, drawn, found, named, same, split
from shardproof.zoo.fixtures.megatron import Column, Row, copy, own_slice, reduce

DOWN = ("forward", 0, "down")


def gated(**fault: Any) -> sp.Finding:
    return found(replace(GATED, parallelize=partial(split, **fault)), "tp=2,dp_replicate=3", steps=1)


def mean(x: Tensor, group: Any) -> Tensor:
    return reduce(x, group) / dist.get_world_size(group)


def test_partial_outputs_that_are_not_summed_are_told_from_those_that_are_averaged_and_from_a_bias() -> None:
    """C11 beside C12."""
    missing = gated(leave=same)
    assert (named(missing), at(missing), missing.factor) == (("forward-not-reduced", "tp"), DOWN, None)
    averaged = gated(leave=mean)
    assert (named(averaged), at(averaged), averaged.factor) == (("forward-not-reduced", "tp"), DOWN, 0.5)
    assert "averaged over tp" in averaged.evidence
    assert "nobody" not in averaged.evidence
    biased = gated(row=BiasedRow)
    assert (named(biased), at(biased), biased.factor) == (("bias-counted-k-times", "tp"), DOWN, 2.0)
    assert missing.ranks == averaged.ranks == biased.ranks == tuple(range(6))


class BiaslessRow(Row):
    """Nobody adds the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, self.weight), self.group) + 0 * self.bias


def test_a_bias_that_nobody_adds_is_counted_no_times() -> None:
    first = gated(row=BiaslessRow)
    assert (named(first), at(first), first.factor) == (("bias-counted-k-times", "tp"), DOWN, 0.0)
    assert "added 0 times instead of once" in first.evidence


class ConstantRow(Row):
    """Adds one and the same number, which is no multiple of its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.25


def test_an_offset_that_is_no_multiple_of_the_bias_is_unexplained() -> None:
    first = gated(row=ConstantRow)
    assert (named(first), at(first)) == (("unexplained", None), DOWN)


class Picked(nn.Module):
    """Words, of which each rank of a group holds some features' share of all: partial sums over features."""

    def __init__(self, whole: nn.Linear, group: Any, leave: Any) -> None:
        super().__init__()
        self.group, self.leave = group, leave
        self.weight = nn.Parameter(own_slice(whole.weight.detach(), group, 1).clone())
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        own = own_slice(copy(x, self.group), self.group, -1)
        return self.leave(F.linear(own, self.weight), self.group) + self.bias


@pytest.mark.parametrize("leave", [same, mean])
def test_a_recurrent_models_head_split_by_inputs_is_summed(leave: Any) -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.head = Picked(model.head, mesh["tp"].get_group(), leave)
        return model

    first = found(replace(TEXT, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("forward-not-reduced", "tp"), ("forward", 0, "head"))
    assert first.factor == (0.5 if leave is mean else None)


class WordShare(nn.Module):
    """Some of the words: others are zero here, and nobody adds up the ranks' outputs."""

    def __init__(self, whole: nn.Embedding, group: Any) -> None:
        super().__init__()
        self.start = dist.get_rank(group) * 6
        self.weight = nn.Parameter(whole.weight.detach()[self.start : self.start + 6].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens - self.start
        own = (index >= 0) & (index < len(self.weight))
        return F.embedding(index * own, self.weight) * own.unsqueeze(-1)


def test_words_split_over_tp_whose_embeddings_are_not_summed() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.words = WordShare(model.words, mesh["tp"].get_group())
        return model

    first = found(replace(TEXT, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("forward-not-reduced", "tp"), ("forward", 0, "words"))


class Unbiased(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.mix.bias = None


class ChannelShare(nn.Module):
    """A convolution that holds some of the input channels."""

    def __init__(self, whole: nn.Conv2d, group: Any, leave: Any) -> None:
        super().__init__()
        self.group, self.leave = group, leave
        self.weight = nn.Parameter(own_slice(whole.weight.detach(), group, 1).clone())

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 3, 3) -> (batch, 6, 2, 2)
        own = own_slice(copy(x, self.group), self.group, 1)
        return self.leave(F.conv2d(own, self.weight), self.group)


@pytest.mark.parametrize("leave", [same, mean])
def test_a_convolution_split_by_input_channels_is_summed(leave: Any) -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.mix = ChannelShare(model.mix, mesh["tp"].get_group(), leave)
        return model

    first = found(replace(PICTURES, model=Unbiased, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("forward-not-reduced", "tp"), ("forward", 0, "mix"))


class BiasedShare(nn.Module):
    """Some of the input channels and the whole bias, on every rank before the sum."""

    def __init__(self, whole: nn.Conv2d, group: Any) -> None:
        super().__init__()
        self.group, self.bias = group, nn.Parameter(whole.bias.detach().clone())
        self.weight = nn.Parameter(own_slice(whole.weight.detach(), group, 1).clone())

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 3, 3) -> (batch, 6, 2, 2)
        own = own_slice(copy(x, self.group), self.group, 1)
        return reduce(F.conv2d(own, self.weight, self.bias), self.group)


def test_the_bias_of_a_convolution_lies_along_its_channels() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.mix = BiasedShare(model.mix, mesh["tp"].get_group())
        return model

    first = found(replace(PICTURES, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("bias-counted-k-times", "tp"), ("forward", 0, "mix"))
    assert first.factor == 2.0


class Summing(nn.Module):
    """A perceptron that sums what its split layer gives, outside of that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 8)
        self.narrow = nn.Linear(8, 5)
        self.leave = lambda x: x
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, 12) -> (batch, length, 5)
        return self.leave(self.narrow(self.wide(x).tanh()))


def test_a_bias_that_each_rank_adds_to_its_partial_sum_counts_k_times_after_a_sum_outside_the_module() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        group = mesh["tp"].get_group()
        model.wide = Column(model.wide, group)
        model.narrow.weight = nn.Parameter(own_slice(model.narrow.weight.detach(), group, 1).clone())
        model.leave = lambda x: reduce(x, group)
        return model

    first = found(replace(GATED, model=Summing, parallelize=layout), "tp=2", steps=1)
    assert (named(first), first.stage, first.factor) == (("bias-counted-k-times", "tp"), "forward", 2.0)
    assert "narrow.bias" in first.evidence


class Branches(nn.Module):
    """Two ways from one input, added up inside."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(8, 12, bias=False)
        self.short = nn.Linear(12, 12)
        self.leave = lambda x: x

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:  # (..., 8) and (..., 12) -> (..., 12)
        return self.leave(F.linear(hidden, self.narrow.weight) + self.short(x))


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 8)
        self.branches = Branches()
        self.head = nn.Linear(12, 5)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, 12) -> (batch, length, 5)
        return self.head(self.branches(self.wide(x).tanh(), x))


def test_a_branch_that_every_rank_adds_whole_before_the_sum_is_counted_k_times() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        group = mesh["tp"].get_group()
        model.wide = Column(model.wide, group)
        model.branches.narrow = Row(model.branches.narrow, group)
        model.branches.leave = lambda x: reduce(x, group)
        return model

    first = found(replace(GATED, model=Branched, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first), first.factor) == (
        ("bias-counted-k-times", "tp"),
        ("forward", 0, "branches"),
        2.0,
    )
    assert "what branches.short gives" in first.evidence
