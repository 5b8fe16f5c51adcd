"""Combinations of contributions: which micro-batches, which ranks, and with which weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from diagnose.models import (
    EVEN,
    NEARLY_EVEN,
    PICTURES,
    RAGGED,
    TEXT,
    at,
    found,
    named,
    passes,
    token_sum,
)
from shardproof.zoo.fixtures.steps import plain_step

THREE = replace(PICTURES, microbatches=3)


def sharded(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return fully_shard(model, mesh=mesh["dp_shard"])


def silent_at_the_end(step: sp.Step) -> Tensor:
    """Synchronises all micro-batches but the last."""

    def quiet(step: sp.Step, m: int) -> None:
        step.model.set_requires_gradient_sync(m + 1 < len(step.microbatches) - 1)

    step.model.set_requires_gradient_sync(True)
    return plain_step(step, after_backward=quiet)


def test_the_same_mistake_splits_ddps_ranks_and_loses_fsdps_micro_batch() -> None:
    """C3 beside C4: no synchronisation in the last micro-batch."""
    step = partial(plain_step, syncs=lambda m, count: m < count - 1)
    ddp = found(replace(THREE, train_step=step), "dp_replicate=2", steps=1)
    assert (named(ddp), at(ddp)) == (("grad-partly-reduced", "micro-batch"), ("gradient", 0, "head.bias"))
    assert "micro-batch 0, 1 was reduced over the data ranks, and of micro-batch 2 each rank" in ddp.evidence
    fsdp = found(replace(THREE, parallelize=sharded, train_step=silent_at_the_end), "dp_shard=2", steps=1)
    assert (named(fsdp), fsdp.stage) == (("microbatch-misweighted", "micro-batch"), "gradient")
    assert "nothing of micro-batch 2 (of 3) is left" in fsdp.evidence


def test_micro_batches_that_are_never_synchronised_are_not_partly_reduced() -> None:
    """C1 beside C3."""
    step = partial(plain_step, syncs=lambda m, count: False)
    first = found(replace(THREE, train_step=step), "dp_replicate=2", steps=1)
    assert (named(first), first.stage) == (("grad-not-reduced", "dp_replicate"), "gradient")


def test_a_gradient_halved_after_every_micro_batch_counts_each_by_half_of_the_next() -> None:
    def halved(step: sp.Step, m: int) -> None:
        if m < len(step.microbatches) - 1:
            for parameter in step.model.parameters():
                parameter.grad *= 0.5

    step = partial(plain_step, after_backward=halved)
    first = found(replace(TEXT, microbatches=3, train_step=step), "dp_replicate=2", steps=1)
    assert (named(first), first.stage) == (("microbatch-misweighted", "micro-batch"), "gradient")
    assert "each counts 2 times as much as the one before" in first.evidence


SUMS = replace(TEXT, loss=token_sum)


def own_means(step: sp.Step) -> Tensor:
    """Each rank divides by its own tokens, DDP averages; what it logs is the right mean."""
    step.optimizer.zero_grad()
    total, count = 0.0, 0.0
    for batch in step.microbatches:
        own = step.loss(step.model, batch)
        (own.total / own.count / len(step.microbatches)).backward()
        total, count = total + own.total.detach(), count + own.count
    step.optimizer.step()
    for part in (total, count):
        dist.all_reduce(part, group=step.mesh["dp"].get_group())
    return total / count


@pytest.mark.parametrize("data", [RAGGED, NEARLY_EVEN], ids=["ragged", "nearly even"])
def test_a_mean_of_means_is_told_from_one_factor_however_even_the_counts(data: Any) -> None:
    """C5 beside C6."""
    first = found(replace(SUMS, data=data, train_step=own_means), "dp_replicate=3", steps=1)
    assert (named(first), at(first)) == (("mean-of-means", "dp_replicate"), ("gradient", 0, "head.bias"))
    assert first.factor is None


def doubled_means(step: sp.Step) -> Tensor:
    """Divides by half of the tokens of the whole batch."""
    step.optimizer.zero_grad()
    own = step.loss(step.model, step.microbatches[0])
    count, total = own.count.clone(), own.total.detach().clone()
    for part in (count, total):
        dist.all_reduce(part, group=step.mesh["dp"].get_group())
    (own.total * step.parallelism.dp / count * 2).backward()
    step.optimizer.step()
    return total / count


def test_nearly_even_counts_divided_by_the_wrong_number_of_tokens_are_one_factor() -> None:
    first = found(replace(SUMS, data=NEARLY_EVEN, train_step=doubled_means), "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("grad-scale", None), "gradient")
    assert first.factor == pytest.approx(2)


def test_a_mean_of_means_is_right_where_all_counts_are_equal() -> None:
    passes(replace(SUMS, data=EVEN, train_step=own_means), "dp_replicate=3")


def test_the_means_of_micro_batches_averaged_on_one_rank_are_a_mean_of_means_too() -> None:
    first = found(replace(SUMS, data=RAGGED, microbatches=3, train_step=own_means), "dp_replicate=2", steps=1)
    assert (first.cause, first.stage) == ("mean-of-means", "gradient")


def in_groups(model: nn.Module, mesh: Any, parallelism: sp.Parallelism, *, groups: list[list[int]]) -> nn.Module:
    made = [dist.new_group(ranks) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    return DistributedDataParallel(model, process_group=own)


def test_ranks_reduced_in_pairs_are_in_the_wrong_group() -> None:
    """C8 beside C1: not each for itself, and no mesh axis either."""
    layout = partial(in_groups, groups=[[0, 2], [1, 3]])
    first = found(replace(PICTURES, parallelize=layout), "dp_replicate=4", steps=1)
    assert (named(first), first.stage) == (("wrong-group", "dp_replicate"), "gradient")
    assert "rank 0 holds those of 0, 2" in first.evidence


def test_one_rank_left_out_of_the_reduction_is_in_the_wrong_group() -> None:
    layout = partial(in_groups, groups=[[0, 1], [2]])
    first = found(replace(PICTURES, parallelize=layout), "dp_replicate=3", steps=1)
    assert (first.cause, first.stage) == ("wrong-group", "gradient")


def last_twice(step: sp.Step) -> Tensor:
    """The last micro-batch is run twice, and what is returned shows it as well."""
    step.microbatches.append(step.microbatches[-1])
    return plain_step(step, divide=lambda count: count - 1.0)


def test_a_logged_loss_with_the_same_fault_does_not_hide_a_micro_batch_that_counts_twice() -> None:
    first = found(replace(PICTURES, microbatches=2, train_step=last_twice), "dp_replicate=3", steps=1)
    assert (named(first), at(first)) == (("microbatch-misweighted", "micro-batch"), ("gradient", 0, "head.bias"))
    assert "count micro-batches 1, 2 times their right share" in first.evidence
