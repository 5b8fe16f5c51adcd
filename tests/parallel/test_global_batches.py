"""The global batch of every step, and how it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardproof.errors import StrategyError
from shardproof.parallel.data import GlobalBatches, cast
from shardproof.spec.experiment import Experiment

CASES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30), st.booleans())


def made(
    *,
    data_ranks: int,
    microbatches: int,
    each: int,
    extra: int,
    shuffle: bool = False,
    seed: int = 0,
    **changes: object,
) -> GlobalBatches:
    """`each` samples a part, `extra` samples beyond the first batch."""
    size = data_ranks * microbatches * each
    data: Sequence[int] = range(size + extra)
    experiment = Experiment(model=dict, data=data, loss=max, optimizer=list, batch_size=size, seed=seed)
    return GlobalBatches(
        replace(experiment, **changes), data_ranks=data_ranks, microbatches=microbatches, shuffle=shuffle
    )


@given(CASES)
def test_parts_are_disjoint_and_cover_the_global_batch_in_order(case: tuple[int, int, int, int, bool]) -> None:
    data_ranks, microbatches, each, extra, shuffle = case
    batches = made(data_ranks=data_ranks, microbatches=microbatches, each=each, extra=extra, shuffle=shuffle)
    for step in range(2 * batches.steps_per_epoch):
        parts = batches.parts(step)
        assert len(parts) == data_ranks * microbatches
        # A part of weight 0 is only there so that the rank takes part.
        assert [sample for own, weight in parts if weight for sample in own] == batches.indices(step)
        assert all(own for own, _ in parts)
        assert sum(weight for _, weight in parts) == pytest.approx(data_ranks)


@given(CASES)
def test_the_weighted_means_of_the_parts_are_the_mean_of_the_batch(case: tuple[int, int, int, int, bool]) -> None:
    data_ranks, microbatches, each, extra, shuffle = case
    batches = made(data_ranks=data_ranks, microbatches=microbatches, each=each, extra=extra, shuffle=shuffle)
    for step in range(batches.steps_per_epoch):
        whole = batches.indices(step)
        mean = sum(sum(own) / len(own) * weight for own, weight in batches.parts(step)) / data_ranks
        assert mean == pytest.approx(sum(whole) / len(whole))


@given(CASES)
def test_every_epoch_reads_every_sample_once(case: tuple[int, int, int, int, bool]) -> None:
    data_ranks, microbatches, each, extra, shuffle = case
    batches = made(data_ranks=data_ranks, microbatches=microbatches, each=each, extra=extra, shuffle=shuffle)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(i for step in steps for i in batches.indices(step)) == list(range(len(batches.data)))


@given(CASES)
def test_equal_parts_weigh_one_over_the_micro_batches(case: tuple[int, int, int, int, bool]) -> None:
    data_ranks, microbatches, each, extra, shuffle = case
    batches = made(data_ranks=data_ranks, microbatches=microbatches, each=each, extra=extra, shuffle=shuffle)
    for own, weight in batches.parts(0):
        assert len(own) == each
        assert weight == pytest.approx(1 / microbatches)


@given(CASES)
def test_the_order_does_not_depend_on_the_layout(case: tuple[int, int, int, int, bool]) -> None:
    data_ranks, microbatches, each, extra, shuffle = case
    batches = made(data_ranks=data_ranks, microbatches=microbatches, each=each, extra=extra, shuffle=shuffle)
    alone = made(data_ranks=1, microbatches=1, each=data_ranks * microbatches * each, extra=extra, shuffle=shuffle)
    assert [batches.indices(step) for step in range(7)] == [alone.indices(step) for step in range(7)]


def test_an_epoch_is_shuffled_under_seed_and_epoch() -> None:
    def orders(seed: int) -> list[list[int]]:
        batches = made(data_ranks=1, microbatches=1, each=64, extra=0, shuffle=True, seed=seed)
        return [batches.indices(step) for step in range(3)]

    first, second, third = orders(0)
    assert first != second != third != first
    assert orders(0) == [first, second, third]
    assert orders(1)[0] != first
    assert sorted(first) == list(range(64))


def test_the_last_batch_of_an_epoch_may_be_short() -> None:
    batches = made(data_ranks=2, microbatches=2, each=2, extra=3)
    assert batches.steps_per_epoch == 2
    assert batches.parts(1) == [([8], 2 / 3), ([9], 2 / 3), ([10], 2 / 3), ([8], 0.0)]
    assert batches.indices(2) == list(range(8))


def test_a_users_own_step_gets_equal_parts_only() -> None:
    batches = made(data_ranks=2, microbatches=2, each=2, extra=3, train_step=print)
    assert batches.steps_per_epoch == 1
    assert batches.indices(1) == list(range(8))


def test_a_rank_reads_its_parts_one_after_the_other_without_end() -> None:
    batches = made(data_ranks=2, microbatches=2, each=1, extra=0)
    read = [part.batch.tolist() for part in islice(batches.of_rank(1), 5)]
    assert read == [[2], [3], [2], [3], [2]]


@pytest.mark.parametrize(("size", "ranks", "way_out"), [(8, 3, "use 6 or 9"), (2, 3, "use 3"), (7, 2, "use 6 or 8")])
def test_a_batch_that_does_not_divide_names_the_sizes_around_it(size: int, ranks: int, way_out: str) -> None:
    experiment = Experiment(model=dict, data=range(20), loss=max, optimizer=list, batch_size=size)
    with pytest.raises(StrategyError) as caught:
        GlobalBatches(experiment, data_ranks=ranks, microbatches=1)
    assert str(caught.value).endswith(way_out)


def test_only_floating_tensors_are_cast() -> None:
    batch = {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.bool), "n": 3}
    done = cast(batch, torch.bfloat16, torch.device("cpu"))
    assert [done[key].dtype for key in ("x", "y", "mask")] == [torch.bfloat16, torch.int64, torch.bool]
    assert done["n"] == 3
