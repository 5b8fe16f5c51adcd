"""Right values in wrong places: before the first step, in fused blocks, and never a matter of which samples came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import shardproof as sp
from diagnose.models import (
    BATCH,
    GATED,
    HIDDEN,
    POINTS,
    TEXT,
    WIDTH,
    at,
    drawn,
    edited,
    found,
    gradient,
    named,
    passes,
    split,
    squares,
)
from shardproof.zoo.fixtures.megatron import Column, Row, replicated


def reordered_words(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    with torch.no_grad():
        model.words.weight.copy_(model.words.weight.roll(1, 0).clone())
    return replicated(model, mesh, parallelism)


def test_words_loaded_in_another_order_are_permuted_and_samples_in_another_order_are_no_fault() -> None:
    """C14 beside C21."""
    first = found(replace(TEXT, parallelize=reordered_words), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("layout-permuted", None), ("initial-state", -1, "words.weight"))
    assert "along dim 0 are the reference's in another order: 0 holds 10, 1 holds 0" in first.evidence
    passes(replace(TEXT, batches=partial(batches, order=backwards)), "dp_replicate=2")


def batches(data: Any, mesh: Any, parallelism: sp.Parallelism, *, order: Any) -> Iterator[Any]:
    own, each = mesh["dp"].get_local_rank(), BATCH // parallelism.dp
    for step in range(2):
        yield default_collate([data[i] for i in order(step)[own * each : (own + 1) * each]])


def backwards(step: int) -> list[int]:
    return list(range(step * BATCH, (step + 1) * BATCH))[::-1]


def one_of_the_step_before(step: int) -> list[int]:
    samples = list(range(step * BATCH, (step + 1) * BATCH))
    return samples if step == 0 else [*samples[:-1], 3]


def test_a_sample_of_the_step_before_is_a_matter_of_data() -> None:
    first = found(replace(TEXT, batches=partial(batches, order=one_of_the_step_before)), "dp_replicate=2")
    assert (first.cause, first.stage, first.step) == ("data-order", "batch", 1)


def test_weights_drawn_under_another_seed_are_no_permutation() -> None:
    """C9 beside C14."""

    def layout(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        with torch.no_grad():
            model.words.weight.normal_(std=0.4)
        return replicated(model, mesh, parallelism)

    first = found(replace(TEXT, parallelize=layout), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("initial-state", None), ("initial-state", -1, "words.weight"))


def swapped_halves(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    """The ranks of a tensor-parallel group load each other's slice of `up`, and nothing else of each other's."""
    half = HIDDEN // 2
    wrong = torch.cat([torch.arange(half, HIDDEN), torch.arange(half)])
    with torch.no_grad():
        model.up.weight.copy_(model.up.weight[wrong].clone())
        model.up.bias.copy_(model.up.bias[wrong].clone())
    return split(model, mesh, parallelism)


def test_slices_exchanged_between_ranks_are_permuted_where_they_meet_other_slices() -> None:
    first = found(replace(GATED, parallelize=swapped_halves), "tp=2", steps=1)
    assert named(first) == ("layout-permuted", "tp")
    assert first.ranks == (0, 1)


class FusedGate(nn.Module):
    """Gate and up in one matrix, as many checkpoints hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, 5)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, 5)
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return self.down(F.gelu(gate) * up)


def split_fused(model: Any, mesh: Any, parallelism: sp.Parallelism, *, blocks: int) -> nn.Module:
    group = mesh["tp"].get_group()
    model.gate_up = Column(model.gate_up, group, blocks=blocks)
    model.down = Row(model.down, group)
    return replicated(model, mesh, parallelism)


FUSED = replace(GATED, model=FusedGate, data=POINTS, loss=squares)


def test_fused_gate_and_up_cut_as_one_matrix_are_permuted() -> None:
    first = found(replace(FUSED, parallelize=partial(split_fused, blocks=1)), "tp=2", steps=1)
    assert (named(first), at(first)) == (("layout-permuted", "tp"), ("forward", 0, "down"))
    assert "gate_up.weight" in first.evidence
    passes(replace(FUSED, parallelize=partial(split_fused, blocks=2)), "tp=2")


def test_two_ranks_that_hold_the_same_slice_are_permuted() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model = split(model, mesh, parallelism)
        dist.broadcast(model.up.weight.detach(), 0, group=mesh["tp"].get_group())
        return model

    first = found(replace(GATED, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == (("layout-permuted", "tp"), ("initial-state", -1, "up.weight"))


def exchanged(step: sp.Step) -> None:
    """Both ranks of a tensor-parallel group take each other's gradient."""
    grad, group = gradient(step, "up.weight"), step.mesh["tp"].get_group()
    both = [torch.empty_like(grad) for _ in range(2)]
    dist.all_gather(both, grad, group=group)
    grad.copy_(both[1 - step.mesh["tp"].get_local_rank()])


def test_gradients_exchanged_between_tp_ranks_are_right_ones_of_other_ranks_pieces() -> None:
    first = found(replace(GATED, train_step=edited(exchanged)), "tp=2", steps=1)
    assert (named(first), at(first)) == (("layout-permuted", "tp"), ("gradient", 0, "up.weight"))
    assert "rank 0 holds that of rank 1; rank 1 holds that of rank 0" in first.evidence
