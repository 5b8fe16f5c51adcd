"""The mesh of a recorded run, from what its ranks wrote."""

from __future__ import annotations

import pytest

import shardproof as sp
from shardproof.align.apart import split_over
from shardproof.align.understood import declared, from_groups


def groups(**axes: list[list[int]]) -> dict[int, dict[str, list[int]]]:
    found: dict[int, dict[str, list[int]]] = {}
    for axis, sets in axes.items():
        for ranks in sets:
            for rank in ranks:
                found.setdefault(rank, {})[axis] = ranks
    return found


def test_the_usual_mesh_has_tp_peers_next_to_each_other() -> None:
    layout = from_groups(groups(dp_shard=[[0, 2], [1, 3]], tp=[[0, 1], [2, 3]]), 4)
    assert layout.parallelism.degrees == (1, 2, 2)
    assert layout.order == (0, 1, 2, 3)


def test_a_mesh_with_tp_outside_is_brought_into_order() -> None:
    layout = from_groups(groups(dp_shard=[[0, 1], [2, 3]], tp=[[0, 2], [1, 3]]), 4)
    assert layout.parallelism.degrees == (1, 2, 2)
    assert layout.order == (0, 2, 1, 3)


def test_ranks_about_which_nothing_is_known_are_data_parallel() -> None:
    assert from_groups({}, 4).parallelism.degrees == (4, 1, 1)
    assert from_groups(groups(tp=[[0, 1], [2, 3]]), 4).parallelism.degrees == (2, 1, 2)


def test_parts_of_plain_parameters_tell_a_tp_axis() -> None:
    layout = from_groups({}, 4, split=((0, 1), (2, 3)))
    assert layout.parallelism.degrees == (2, 1, 2)
    assert layout.order == (0, 1, 2, 3)


def test_peers_that_are_no_neighbours_stand_next_to_each_other_on_the_mesh() -> None:
    for layout in (from_groups(groups(tp=[[0, 2], [1, 3]]), 4), from_groups({}, 4, split=((0, 2), (1, 3)))):
        assert layout.parallelism.degrees == (2, 1, 2)
        assert layout.order == (0, 2, 1, 3)


WHOLE, NEIGHBOURS, APART = ((0, 1, 2, 3),), ((0, 2), (1, 3)), ((0, 1), (2, 3))
"""Ranks by what they hold: all the same; tp peers next to each other; tp peers with the data ranks between them."""


def test_ranks_that_hold_the_same_parts_tell_who_their_peers_are() -> None:
    assert split_over({"norm": WHOLE, "up": NEIGHBOURS}, 4) == ((0, 1), (2, 3))
    assert split_over({"norm": WHOLE, "up": APART}, 4) == ((0, 2), (1, 3))


def test_heads_that_several_peers_hold_do_not_hide_the_split() -> None:
    assert split_over({"norm": WHOLE, "query": ((0,), (1,), (2,), (3,)), "key": APART}, 4) == ((0, 1, 2, 3),)


def test_ranks_built_under_seeds_of_their_own_are_not_split() -> None:
    assert split_over({"norm": ((0,), (1,)), "up": ((0,), (1,))}, 2) == ()
    assert split_over({"norm": WHOLE, "up": NEIGHBOURS, "down": APART}, 4) == ()


def test_groups_that_make_no_mesh_ask_for_the_layout() -> None:
    with pytest.raises(sp.UsageError, match="say how it was laid out, as --layout-b"):
        from_groups(groups(tp=[[0, 1, 2], [3]]), 4, option="--layout-b")
    with pytest.raises(sp.UsageError, match="groups of tp=3, no mesh of 4 ranks"):
        from_groups(groups(tp=[[0, 1, 2]]), 4)


def test_a_declared_layout_has_the_ranks_of_the_recording() -> None:
    with pytest.raises(sp.UsageError, match="--layout-b tp=2 is 2 ranks, and runs/tp is a recording of 4 ranks"):
        declared(sp.Parallelism(tp=2), 4, "runs/tp", "--layout-b")
