"""From values alone to where plain slices lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardproof.compare.layouts import in_order, nearest, slices, split_dim

WHOLE = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cut(whole: Tensor, dim: int, *slices: list[int]) -> list[Tensor]:
    return [whole.index_select(dim, torch.tensor(chosen, dtype=torch.int64)) for chosen in slices]


def rearranged(pieces: list[Tensor], whole: Tensor, dim: int, floor: float) -> list[Tensor] | None:
    found = slices(pieces, whole, dim, floor)
    return None if found is None else [whole.index_select(dim, index) for index in found]


@given(st.permutations(range(12)), st.integers(0, 12), st.booleans())
def test_any_slices_that_tile_the_whole_are_found(order: list[int], first: int, transposed: bool) -> None:
    whole, dim = (WHOLE.t().contiguous(), 1) if transposed else (WHOLE, 0)
    pieces = cut(whole, dim, order[:first], order[first:])
    found = rearranged(pieces, whole, dim, 1e-15)
    assert found is not None
    for piece, want in zip(pieces, found, strict=True):
        assert torch.equal(piece, want)


def test_fused_blocks_are_cut_per_block() -> None:
    # Query, key and value in one matrix: each rank holds a half of each.
    pieces = cut(WHOLE, 0, [0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    assert rearranged(pieces, WHOLE, 0, 1e-15) is not None
    assert not torch.equal(pieces[0], in_order(pieces, WHOLE, 0)[0])


@pytest.mark.parametrize(
    "slices",
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]),
        ([0, 1, 2, 3, 4, 4], [6, 7, 8, 9, 10, 11]),
    ],
    ids=["the same slice twice", "one overlaps", "one twice in a piece"],
)
def test_slices_that_do_not_tile_the_whole_are_not_accepted(slices: tuple[list[int], list[int]]) -> None:
    assert rearranged(cut(WHOLE, 0, *slices), WHOLE, 0, 1e-15) is None


def test_wrong_values_are_not_accepted_however_they_are_arranged() -> None:
    pieces = cut(WHOLE, 0, list(range(6)), list(range(6, 12)))
    assert rearranged([pieces[0] * 2, pieces[1]], WHOLE, 0, 1e-15) is None
    assert rearranged([pieces[0], torch.full_like(pieces[1], float("nan"))], WHOLE, 0, 1e-15) is None


def test_rounding_does_not_hide_an_arrangement() -> None:
    pieces = cut(WHOLE, 0, [3, 1, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10])
    assert rearranged([piece + 1e-15 for piece in pieces], WHOLE, 0, 1e-15) is not None


def test_slices_that_occur_several_times_may_lie_anywhere_once() -> None:
    constant = torch.ones(4, 2)
    assert rearranged([constant[:2], constant[2:]], constant, 0, 1e-7) is not None
    twice = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert rearranged([twice[[0, 2]], twice[[1, 3]]], twice, 0, 1e-7) is not None
    assert rearranged([twice[[2, 2]], twice[[1, 3]]], twice, 0, 1e-7) is None


def test_nothing_can_be_rearranged_where_there_is_nothing() -> None:
    assert rearranged([torch.empty(0, 3)], torch.empty(0, 3), 0, 0.0) is None


@pytest.mark.parametrize(
    ("shapes", "whole", "dim"),
    [
        ([(2, 3), (2, 3)], (4, 3), 0),
        ([(4, 1), (4, 2)], (4, 3), 1),
        ([(3,), (0,)], (3,), 0),
        ([(2, 3), (2, 3)], (2, 3), None),
        ([(2, 3), (2, 2)], (4, 3), None),
        ([(2,), (2,)], (4, 1), None),
        ([(), ()], (), None),
    ],
)
def test_the_dim_along_which_pieces_lie_is_told_by_shapes(
    shapes: list[tuple[int, ...]], whole: tuple[int, ...], dim: int | None
) -> None:
    assert split_dim([torch.zeros(shape) for shape in shapes], whole) == dim


def test_in_order_means_one_after_the_other() -> None:
    pieces = [torch.zeros(1, 5), torch.zeros(0, 5), torch.zeros(11, 5)]
    wants = in_order(pieces, WHOLE, 0)
    assert [tuple(want.shape) for want in wants] == [(1, 5), (0, 5), (11, 5)]
    assert torch.equal(torch.cat(wants), WHOLE)


def test_slices_are_found_where_rounding_swaps_their_order() -> None:
    """In bfloat16 neighbours in any one projection change places; in all of them together they do not."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(36, 96, generator=generator, dtype=torch.float64)
    floor = 0.05
    noisy = whole + floor * (2 * torch.rand(whole.shape, generator=generator, dtype=torch.float64) - 1)
    thirds = [part.chunk(2, 1) for part in noisy.chunk(3, 1)]
    pieces = [torch.cat([third[rank] for third in thirds], 1) for rank in range(2)]
    found = slices(pieces, whole, 1, floor)
    assert found is not None
    blocks = torch.arange(96).chunk(3)
    assert [index.tolist() for index in found] == [
        torch.cat([block.chunk(2)[rank] for block in blocks]).tolist() for rank in range(2)
    ]


def test_slices_that_are_all_alike_are_no_endless_search() -> None:
    whole = torch.randn(4, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert slices([torch.zeros(4, 32), torch.zeros(4, 32)], whole, 1, 1e-9) is None


def test_rows_that_are_all_alike_have_a_place_each_also_where_there_are_more_places() -> None:
    places = nearest(torch.zeros(40, 2), torch.zeros(100, 2))
    assert len(set(places.tolist())) == 40
