"""Which samples a run read: what the reference replays, and what is a finding."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardproof.compare.reads import Reads, data_axis, digest_of, understand
from shardproof.spec.parallelism import Parallelism

DDP = Parallelism(dp_replicate=2)
TP = Parallelism(tp=2)
TP_FSDP = Parallelism(dp_shard=2, tp=2)
DATA = Counter("abcdefgh")


def read(*ranks: str, layout: Parallelism = DDP, data: Counter[str] | None = DATA, may_split: bool = False) -> Reads:
    """`"ab cd|ef gh"`: steps split by `|`, micro-batches by spaces, a letter for each sample."""
    parsed = [[[tuple(part) for part in step.split(" ")] for step in rank.split("|")] for rank in ranks]
    return understand(parsed, layout, may_split=may_split, data=data)


def test_data_ranks_make_up_the_global_batch_in_order() -> None:
    found = read("a b|e f", "c d|g h")
    assert found.batches == (tuple("abcd"), tuple("efgh"))
    assert found.sources == (((0, 0), (0, 1), (1, 0), (1, 1)),) * 2
    assert found.samples == {0: ((1, 1), (1, 1)), 1: ((1, 1), (1, 1))}
    assert found.misread is None
    assert not found.split_over_tp


def test_tp_peers_are_read_once() -> None:
    found = read("ab", "ab", "cd", "cd", layout=TP_FSDP)
    assert found.batches == (tuple("abcd"),)
    assert found.sources == (((0, 0), (2, 0)),)
    assert found.misread is None


@pytest.mark.parametrize("data", [DATA, None])
def test_tp_peers_that_differ_are_named_by_step_and_group(data: Counter[str] | None) -> None:
    found = read("ab|ef", "ab|ef", "cd|gh", "cd|hg", layout=TP_FSDP, data=data)
    assert found.misread is not None
    assert (found.misread.cause, found.misread.step, found.misread.axis) == ("batch-differs-in-group", 1, "tp")
    assert found.misread.ranks == (2, 3)
    assert "1 of 2 groups" in found.misread.evidence


def test_a_batch_that_the_plan_splits_over_tp_is_read_by_all_peers() -> None:
    found = read("a", "b", "c", "d", layout=TP_FSDP, may_split=True)
    assert found.split_over_tp
    assert found.batches == (tuple("abcd"),)
    assert found.samples == {0: ((2,), (2,))}
    assert found.misread is None
    assert not read("a", "a", "b", "b", layout=TP_FSDP, may_split=True).split_over_tp


def test_peers_of_a_split_batch_are_joined_micro_batch_by_micro_batch() -> None:
    found = read("a b", "c d", layout=TP, may_split=True)
    assert found.batches == (tuple("acbd"),)
    assert found.sources == (((0, 0), (1, 0), (0, 1), (1, 1)),)


def test_data_ranks_that_read_the_same_are_named() -> None:
    found = read("ab", "ba")
    assert found.misread is not None
    assert (found.misread.cause, found.misread.axis) == ("batch-repeated-across-dp", "dp_replicate")
    assert found.misread.ranks == (0, 1)


def test_only_the_data_ranks_that_read_the_same_are_named() -> None:
    found = read("ab", "cd", "ab", layout=Parallelism(dp_shard=3))
    assert found.misread is not None
    assert (found.misread.ranks, found.misread.axis) == ((0, 2), "dp_shard")


def test_data_ranks_that_share_some_samples_are_out_of_order() -> None:
    found = read("ab", "bc")
    assert found.misread is not None
    assert found.misread.cause == "data-order"
    assert found.misread.ranks == (0, 1)


def test_a_sample_read_twice_in_one_epoch_is_out_of_order() -> None:
    found = read("ab|ab", "cd|ef")
    assert found.misread is not None
    assert (found.misread.cause, found.misread.step, found.misread.ranks) == ("data-order", 1, (0,))
    assert found.misread.evidence.startswith("2 samples of step 1")
    assert "while 2 had not been read" in found.misread.evidence


@given(st.lists(st.permutations("abcdefgh"), min_size=1, max_size=3))
def test_epochs_in_any_order_are_right(epochs: list[list[str]]) -> None:
    order = "".join("".join(epoch) for epoch in epochs)
    steps = [order[start : start + 4] for start in range(0, len(order), 4)]
    found = read("|".join(step[:2] for step in steps), "|".join(step[2:] for step in steps))
    assert found.misread is None


def test_an_epoch_may_end_within_a_batch_that_is_then_filled_from_the_next() -> None:
    # Six samples, four a step: the second step takes two of the next epoch. Or drops the last two.
    six = Counter("abcdef")
    assert read("ab|ef", "cd|ab", data=six).misread is None
    assert read("ab|ab", "cd|cd", data=six).misread is None
    assert read("ab|cd", "ef|ab", data=six).misread is None


def test_a_sampler_that_fills_its_last_batch_with_samples_of_its_own_epoch_is_right() -> None:
    # torch's DistributedSampler, drop_last=False: ten samples on four ranks; the next epoch starts anew.
    letters = "abcdefghij"
    reads = [f"{letters[r]}|{letters[4 + r]}|{'ijab'[r]}|{letters[r]}|{letters[4 + r]}" for r in range(4)]
    assert read(*reads, layout=Parallelism(dp_replicate=4), data=Counter(letters)).misread is None
    # The same with two micro-batches a step, so that the fill and the next epoch's start fall into one step.
    reads = [f"{letters[r]} {letters[4 + r]}|{'iabc'[r]} {letters[r]}|{letters[4 + r]} {'iabc'[r]}" for r in range(4)]
    assert read(*reads, layout=Parallelism(dp_replicate=4), data=Counter("abcdefghi")).misread is None


def test_content_that_the_data_set_holds_twice_may_be_read_twice() -> None:
    assert read("aa|bc", "bd|cd", data=Counter("aabbccdd")).misread is None
    assert read("ab", "ab", data=Counter("aabb")).misread is None
    found = read("ab", "ab", "ab", data=Counter("aabb"), layout=Parallelism(dp_shard=3))
    assert found.misread is not None


def test_content_that_cannot_be_traced_back_is_not_judged_by_order_but_said_to_be_so() -> None:
    found = read("xy|xy", "zw|zw")
    assert found.misread is None
    assert "not found in Experiment.data" in found.note


def test_data_ranks_that_read_the_same_batch_are_seen_without_the_data_set() -> None:
    found = read("xy|xy", "xy|xy").misread
    assert found is not None
    assert (found.cause, found.ranks) == ("batch-repeated-across-dp", (0, 1))
    assert read("ab|ab", "ab|ab", data=None).misread is None


def test_a_filler_part_is_left_out_of_the_replay() -> None:
    reads = [[[("a",), ("b",)]], [[("c",), ()]]]
    found = understand(reads, DDP, may_split=False, data=DATA)
    assert found.sources == (((0, 0), (0, 1), (1, 0)),)
    assert found.samples == {0: ((1, 1), (1, 0))}


def test_runs_that_read_the_same_share_a_digest_however_they_are_cut() -> None:
    assert digest_of(read("ab|ef", "cd|gh")) == digest_of(read("a b|e f", "c d|g h"))
    assert digest_of(read("ab", "cd")) != digest_of(read("ab", "dc"))
    assert digest_of(read("ab|cd", "ef|gh")) != digest_of(read("ab", "ef"))


@pytest.mark.parametrize(
    ("layout", "axis"),
    [(DDP, "dp_replicate"), (TP_FSDP, "dp_shard"), (Parallelism(dp_replicate=2, dp_shard=2), "dp")],
)
def test_the_data_axis_has_the_name_of_the_one_in_use(layout: Parallelism, axis: str) -> None:
    assert data_axis(layout) == axis
