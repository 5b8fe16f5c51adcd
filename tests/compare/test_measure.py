"""How far one tensor is from another, and what that means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardproof.compare.measure import (
    MULTIPLE,
    SHOWN,
    Pair,
    constant_ratio,
    distance,
    furthest,
    judge,
    largest,
    look,
    scale,
    ulp,
    within,
    worst,
)
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.parallel.piece import Piece

NAN, INF = float("nan"), float("inf")


def pair(got: list[float], want: list[float], rank: int = 0, **where: object) -> Pair:
    return Pair(rank=rank, got=torch.tensor(got), want=torch.tensor(want), **where)


@pytest.mark.parametrize("floor", [0.0, 1.0, 1e300, INF])
@pytest.mark.parametrize(
    ("got", "want"),
    [([NAN], [1.0]), ([1.0], [NAN]), ([NAN], [NAN]), ([1.0, NAN], [1.0, 2.0]), ([NAN, 9.0], [1.0, 2.0])],
)
def test_nan_never_passes(got: list[float], want: list[float], floor: float) -> None:
    outcome = judge([pair(got, want)], floor)
    assert outcome.verdict is Verdict.DIFFERENT
    assert math.isnan(outcome.error)
    assert outcome.ranks == (0,)


def test_nan_on_one_rank_is_not_hidden_by_a_larger_error_on_another() -> None:
    outcome = judge([pair([9.0], [1.0], rank=0), pair([NAN], [1.0], rank=3), pair([8.0], [1.0], rank=1)], 1e-9)
    assert math.isnan(outcome.error)
    assert outcome.ranks == (0, 1, 3)


def test_equal_infinities_are_equal_and_others_are_not() -> None:
    assert judge([pair([INF, -INF, 1.0], [INF, -INF, 1.0])], 0.0).verdict is Verdict.EQUAL
    assert judge([pair([INF], [-INF])], 1e300).verdict is Verdict.DIFFERENT
    assert judge([pair([INF], [1.0])], 1e300).verdict is Verdict.DIFFERENT
    assert judge([pair([1.0], [INF])], 1e300).verdict is Verdict.DIFFERENT


def test_inside_a_multiple_of_the_floor_it_is_rounding_and_outside_it_is_not() -> None:
    assert judge([pair([1.0], [1.0])], 0.0).verdict is Verdict.EQUAL
    assert judge([pair([1.5], [1.0])], 0.5 / MULTIPLE).verdict is Verdict.ROUNDING
    assert judge([pair([1.5], [1.0])], 0.49 / MULTIPLE).verdict is Verdict.DIFFERENT
    assert within(0.0, 0.0)
    assert not within(NAN, INF)


def test_negative_zero_and_empty_tensors_are_equal() -> None:
    assert judge([pair([0.0], [-0.0])], 0.0).verdict is Verdict.EQUAL
    assert judge([pair([], [])], 0.0).verdict is Verdict.EQUAL
    assert judge([], 0.0).verdict is Verdict.EQUAL


def test_whole_numbers_and_booleans_are_compared() -> None:
    whole = Pair(rank=0, got=torch.tensor([2, 3]), want=torch.tensor([2, 4]))
    assert judge([whole], 0.0).verdict is Verdict.DIFFERENT
    large = Pair(rank=0, got=torch.tensor([2**60 + 1]), want=torch.tensor([2**60 + 2]))
    assert judge([large], 0.0).verdict is Verdict.DIFFERENT
    flags = Pair(rank=0, got=torch.tensor([True]), want=torch.tensor([True]))
    assert judge([flags], 0.0).verdict is Verdict.EQUAL


def test_complex_numbers_are_compared_in_both_parts() -> None:
    """A trace keeps them as pairs of reals, and so they arrive here."""
    want = torch.view_as_real(torch.tensor([1 + 2j]))
    got = torch.view_as_real(torch.tensor([1 + 3j]))
    assert judge([Pair(rank=0, got=got, want=want)], 0.0).verdict is Verdict.DIFFERENT


FINITE = st.floats(-1e3, 1e3, allow_nan=False).filter(lambda x: abs(x) > 1e-3)


@given(st.lists(FINITE, min_size=1, max_size=5), st.sampled_from([2.0, 0.5, 4.0, 1 / 3, -1.0, 8.0]))
def test_a_constant_ratio_is_found(values: list[float], ratio: float) -> None:
    want = torch.tensor(values, dtype=torch.float64)
    pairs = [Pair(rank=0, got=ratio * want, want=want)]
    assert constant_ratio(pairs, ulp(want)) == pytest.approx(ratio)


def test_a_ratio_is_constant_over_all_ranks_or_there_is_none() -> None:
    assert constant_ratio([pair([2.0], [1.0]), pair([6.0], [3.0], rank=1)], 1e-12) == pytest.approx(2.0)
    assert constant_ratio([pair([2.0], [1.0]), pair([9.0], [3.0], rank=1)], 1e-12) is None
    assert constant_ratio([pair([2.0, 4.0], [1.0, 3.0])], 1e-12) is None


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([NAN, 2.0], [1.0, 1.0]),
        ([INF, 2.0], [1.0, 1.0]),
        ([1.0], [1.0]),
    ],
)
def test_zero_one_and_what_is_not_finite_are_no_ratio(got: list[float], want: list[float]) -> None:
    assert constant_ratio([pair(got, want)], 1e-12) is None


def test_an_infinite_reference_is_no_ratio_either() -> None:
    assert constant_ratio([pair([2.0, 2.0], [1.0, INF])], 1e-12) is None


def test_the_worst_elements_come_from_each_wrong_rank_in_turn() -> None:
    shown = worst([pair([1.0, 5.0, 2.0], [1.0, 1.0, 1.0]), pair([1.0, 1.0, 9.0], [1.0, 1.0, 1.0], rank=2)])
    assert [(s.rank, s.index, s.got, s.want) for s in shown] == [
        (0, (1,), 5.0, 1.0),
        (2, (2,), 9.0, 1.0),
        (0, (2,), 2.0, 1.0),
    ]


def test_no_more_than_a_few_elements_are_shown_nan_first_and_equal_ones_never() -> None:
    many = [float(i) for i in range(20)]
    assert len(worst([pair(many, [0.0] * 20)])) == SHOWN
    assert [s.index for s in worst([pair([7.0, NAN, 1.0], [0.0, 0.0, 1.0])])] == [(1,), (0,)]
    assert worst([pair([], [])]) == []


def test_a_sample_is_numbered_as_in_the_whole_tensor() -> None:
    where = Piece(whole=(4, 3), offset=(2, 0), shape=(2, 3))
    got, want = torch.zeros(2, 3), torch.zeros(2, 3)
    got[1, 2] = 1.0
    assert worst([Pair(rank=1, got=got, want=want, piece=where)])[0].index == (3, 2)
    assert worst([Pair(rank=1, got=got, want=want, offset=(0, 6))])[0].index == (1, 8)
    flat = Piece(whole=(4, 3), offset=(0, 0), shape=(4, 3), stretch=(5, 7))
    assert worst([Pair(rank=1, got=torch.tensor([0.0, 1.0]), want=torch.zeros(2), piece=flat)])[0].index == (2, 0)


def test_scale_and_ulp_look_past_what_is_not_finite() -> None:
    assert scale(torch.tensor([NAN, -3.0, INF])) == 3.0
    assert scale(torch.tensor([INF])) == 0.0
    assert scale(torch.empty(0)) == 0.0
    assert ulp(torch.tensor([4.0], dtype=torch.float32)) == pytest.approx(4 * 2**-23)
    assert ulp(torch.tensor([4])) == 0.0


@pytest.mark.parametrize(
    ("got", "want"), [([1.0, 2.0], [1.5, 2.0]), ([INF, 1.0], [INF, 3.0]), ([NAN], [NAN]), ([INF], [1.0]), ([], [])]
)
def test_the_furthest_element_is_that_of_the_distances(got: list[float], want: list[float]) -> None:
    a, b = torch.tensor(got), torch.tensor(want)
    assert furthest(a, b) == pytest.approx(largest(distance(a, b)), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("odd", [0.0, NAN, INF])
def test_one_look_tells_distance_and_size(dtype: torch.dtype, odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardproof.compare.stream.CHUNK_BYTES", 2**8)
    want = (torch.linspace(-3, 5, 600) * 100).to(dtype)
    if odd and dtype.is_floating_point:
        want[7] = want[300] = odd
    got = want.clone()
    got[[5, 301, 599]] += torch.tensor([2, 8, 4]).to(dtype)
    found = look(got, want)
    assert found.far == largest(distance(got, want)) or (math.isnan(odd) and math.isnan(found.far))
    assert found.size == scale(want) == 500


def test_distances_are_taken_in_float64() -> None:
    got: Tensor = torch.tensor([1.0], dtype=torch.bfloat16)
    assert largest(distance(got, torch.tensor([1.0 + 1e-12], dtype=torch.float64))) == pytest.approx(1e-12, rel=1e-3)


def test_floors_are_a_pure_number() -> None:
    base = {"step": 0, "stage": "gradient", "name": "w", "verdict": Verdict.ROUNDING}
    assert Comparison(**base, error=0.0, floor=0.0).floors == 0.0
    assert Comparison(**base, error=1.0, floor=0.0).floors == INF
    assert Comparison(**base, error=3.0, floor=2.0).floors == 1.5
