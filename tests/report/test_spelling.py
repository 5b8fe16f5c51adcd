from __future__ import annotations

import pytest

from shardproof.report import spelling


@pytest.mark.parametrize(
    ("ranks", "spelled"), [((0, 1, 2, 3, 7), "0-3,7"), ((5,), "5"), ((), ""), ((3, 1, 2), "1-3"), ((0, 2), "0,2")]
)
def test_runs_of_ranks_are_joined(ranks: tuple[int, ...], spelled: str):
    assert spelling.ranks(ranks) == spelled


@pytest.mark.parametrize(
    ("value", "spelled"),
    [(0.5, "0.5"), (1 / 3, "0.3333 (1/3)"), (2.0, "2"), (0.333331, "0.3333 (1/3)"), (float("nan"), "nan"), (0.0, "0")],
)
def test_a_factor_is_also_given_as_the_fraction_that_it_stands_for(value: float, spelled: str):
    assert spelling.factor(value) == spelled


def test_as_many_digits_are_shown_as_tell_two_values_apart():
    digits = spelling.digits_apart([(1.00000000124, 1.00000000123), (float("nan"), float("nan")), (2.0, 2.0)])
    assert spelling.number(1.00000000124, digits) != spelling.number(1.00000000123, digits)


def test_only_the_axes_in_use_are_named_outermost_first():
    assert spelling.degrees({"tp": 2, "dp_shard": 4, "dp_replicate": 1}) == "dp_shard 4 x tp 2"
    assert spelling.degrees({"dp_replicate": 1, "dp_shard": 1, "tp": 1}) == "1 rank"


def test_a_name_is_cut_in_the_middle():
    short = spelling.shorten("model.encoder.layers.11.attention.q_proj.weight", 30)
    assert len(short) <= 30
    assert short.startswith("model.")
    assert short.endswith("q_proj.weight")


@pytest.mark.parametrize(("seconds", "spelled"), [(0.31, "0.3 s"), (42.4, "42 s"), (201.0, "3 min 21 s")])
def test_durations_are_as_exact_as_matters(seconds: float, spelled: str):
    assert spelling.duration(seconds) == spelled


@pytest.mark.parametrize(
    ("distance", "spelled"),
    [(1.0, "1.0 floors"), (4.1e14, "4.1e+14 floors"), (float("nan"), "NaN"), (float("inf"), "not bitwise equal")],
)
def test_distances_are_in_units_of_the_noise_floor(distance: float, spelled: str):
    assert spelling.floors(distance) == spelled
