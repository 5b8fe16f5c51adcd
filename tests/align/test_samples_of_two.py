"""Which samples two runs read."""

from __future__ import annotations

from shardproof.align.samples import misread, places
from shardproof.spec.parallelism import Parallelism

LABELS = ("runs/a", "runs/b")


def test_the_same_samples_in_any_order_are_no_finding() -> None:
    got = [[("c", "a")], [("d", "b")]]
    assert misread(got, ["a", "b", "c", "d"], Parallelism(dp_replicate=2), step=0, labels=LABELS) is None


def test_data_ranks_that_read_the_same_are_named() -> None:
    got = [[("a", "b")], [("a", "b")]]
    found = misread(got, ["a", "b", "c", "d"], Parallelism(dp_shard=2), step=1, labels=LABELS)
    assert found is not None
    assert (found.cause, found.axis, found.ranks, found.step) == ("batch-repeated-across-dp", "dp_shard", (0, 1), 1)


def test_another_batch_is_told_with_the_number_of_samples_that_differ() -> None:
    got = [[("a",), ("x",)], [("c",), ("d",)]]
    found = misread(got, ["a", "b", "c", "d"], Parallelism(dp_replicate=2), step=0, labels=LABELS)
    assert found is not None
    assert (found.cause, found.ranks) == ("data-order", (0,))
    assert "1 of the first were not read by the second, 1 of the second not by the first" in found.evidence


def test_equal_samples_take_their_places_one_by_one() -> None:
    assert places(["a", "b", "a"], ["a", "a", "b"]) == [0, 2, 1]
    assert places(["a", "a"], ["a", "b"]) is None
