"""Whether a strategy did what its name says, judged by where parameters lay and what ran."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardproof.diagnose.applied import check_applied, sharded_over, split_names
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import Parallelism

WHOLE = Piece(whole=(4, 4), offset=(0, 0), shape=(4, 4))
NONE: dict[str, dict[str, int]] = {}


def rows(part: int, parts: int) -> Piece:
    return Piece(whole=(4, 4), offset=(part * 4 // parts, 0), shape=(4 // parts, 4))


def columns(part: int, parts: int) -> Piece:
    return Piece(whole=(4, 4), offset=(0, part * 4 // parts), shape=(4, 4 // parts))


def held(layout: Parallelism, weight: Callable[[dict[str, int]], Piece]) -> list[dict[str, Piece]]:
    """A weight as each rank holds it, beside a norm that is whole everywhere."""
    return [{"norm": WHOLE, "weight": weight(layout.coordinates(rank))} for rank in range(layout.world_size)]


FSDP = Parallelism(dp_shard=2)
TP = Parallelism(tp=2)
HSDP = Parallelism(dp_replicate=2, dp_shard=2)
TP_FSDP = Parallelism(dp_shard=2, tp=2)


@pytest.mark.parametrize(
    ("layout", "weight"),
    [
        (Parallelism(), lambda at: WHOLE),
        (Parallelism(dp_replicate=2), lambda at: WHOLE),
        (FSDP, lambda at: rows(at["dp_shard"], 2)),
        (HSDP, lambda at: rows(at["dp_shard"], 2)),
        (TP, lambda at: columns(at["tp"], 2)),
        (TP_FSDP, lambda at: Piece(whole=(4, 4), offset=(at["dp_shard"] * 2, at["tp"] * 2), shape=(2, 2))),
        (FSDP, lambda at: Piece(whole=(4, 4), offset=(0, 0), shape=(4, 4), stretch=(at["dp"] * 8, at["dp"] * 8 + 8))),
    ],
    ids=["single", "ddp", "fsdp", "hsdp", "tp", "tp_fsdp", "fsdp1"],
)
def test_what_was_applied_is_no_finding(layout: Parallelism, weight: Callable[[dict[str, int]], Piece]) -> None:
    assert check_applied(held(layout, weight), NONE, layout) is None


@pytest.mark.parametrize(("layout", "axis"), [(FSDP, "dp_shard"), (HSDP, "dp_shard"), (TP, "tp")])
def test_whole_copies_on_every_rank_are_a_finding(layout: Parallelism, axis: str) -> None:
    ran = {"dp_replicate": {"allreduce": 3}}
    finding = check_applied(held(layout, lambda at: WHOLE), ran, layout)
    assert finding is not None
    assert (finding.cause, finding.stage, finding.step) == ("strategy-not-applied", "initial-state", -1)
    assert (finding.axis, finding.where) == (axis, "norm")
    assert finding.ranks == tuple(range(layout.world_size))
    assert "none of 2 parameters" in finding.evidence
    assert "3 allreduce over dp_replicate" in finding.evidence


def test_sharding_over_the_wrong_axis_is_a_finding_for_both() -> None:
    finding = check_applied(held(HSDP, lambda at: rows(at["dp"], 4)), NONE, HSDP)
    assert finding is not None
    assert (finding.axis, finding.where) == ("dp_replicate", "weight")
    assert "1 of 2 parameters are sharded over it" in finding.evidence
    swapped = check_applied(held(HSDP, lambda at: rows(at["dp_replicate"], 2)), NONE, HSDP)
    assert swapped is not None
    assert swapped.axis == "dp_shard"


def test_tensor_parallelism_may_split_activations_only_if_it_talks_over_tp() -> None:
    assert check_applied(held(TP, lambda at: WHOLE), {"tp": {"allgather": 1}}, TP) is None
    assert check_applied(held(TP, lambda at: WHOLE), {"dp_shard+tp": {"allreduce": 1}}, TP) is None
    assert check_applied(held(TP, lambda at: WHOLE), {"other": {"allreduce": 1}}, TP) is not None


def test_plain_slices_written_by_hand_count_for_tp() -> None:
    by_hand = Piece(whole=(4, 4), offset=(0, 0), shape=(2, 4), declared=False)
    assert split_names("tp", held(TP, lambda at: by_hand), TP) == ["weight"]
    assert check_applied(held(TP, lambda at: by_hand), NONE, TP) is None
    assert check_applied(held(TP_FSDP, lambda at: by_hand), NONE, TP_FSDP) is not None


def test_an_empty_shard_beside_a_full_one_is_sharded() -> None:
    empty = Piece(whole=(4, 4), offset=(4, 0), shape=(0, 4))
    assert check_applied(held(FSDP, lambda at: empty if at["dp_shard"] else WHOLE), NONE, FSDP) is None


def test_parameters_are_counted_for_each_axis_in_use() -> None:
    def weight(at: dict[str, int]) -> Piece:
        return Piece(whole=(4, 4), offset=(at["dp_shard"] * 2, at["tp"] * 2), shape=(2, 2))

    assert sharded_over(held(TP_FSDP, weight), TP_FSDP) == {"dp_shard": 1, "tp": 1}
    assert sharded_over(held(TP, lambda at: WHOLE), TP) == {"tp": 0}
    assert sharded_over([{}], Parallelism()) == {}
