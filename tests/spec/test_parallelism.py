"""Ranks per axis, and where a rank lies."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardproof.errors import StrategyError
from shardproof.spec.parallelism import AXES, Parallelism

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES)
def test_coordinates_count_as_a_mesh_counts_with_tp_innermost(replicate: int, shard: int, tp: int) -> None:
    p = Parallelism(dp_replicate=replicate, dp_shard=shard, tp=tp)
    places = [tuple(p.coordinates(rank)[axis] for axis in AXES) for rank in range(p.world_size)]
    assert places == list(product(range(replicate), range(shard), range(tp)))
    assert [p.coordinates(rank)["dp"] for rank in range(p.world_size)] == [rank // tp for rank in range(p.world_size)]
    assert (p.dp, p.degrees) == (replicate * shard, (replicate, shard, tp))


def test_a_name_is_made_of_the_degrees_where_none_is_given() -> None:
    assert Parallelism().strategy == "single"
    assert Parallelism(tp=2, dp_shard=3).strategy == "dp_shard=3,tp=2"
    assert str(Parallelism(tp=2, strategy="tp")) == "tp (tp=2)"
    assert str(Parallelism(strategy="single")) == "single (one rank)"


@pytest.mark.parametrize("degree", [0, -1, 1.0, True, "2", None])
@pytest.mark.parametrize("axis", AXES)
def test_a_degree_is_a_whole_number_of_at_least_one(axis: str, degree: object) -> None:
    with pytest.raises(StrategyError, match=axis):
        Parallelism(**{axis: degree})


def test_a_parallelism_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Parallelism().tp = 2  # type: ignore[misc]
