"""From values alone to the layout of plain tensors: every kind, what leaves it open, and what is none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardproof.compare.infer import Inferred, infer

FLOOR = 1e-15


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(whole: Tensor, *chosen: list[int] | range, dim: int = 0) -> dict[int, Tensor]:
    """Rank -> the slices of `whole` that it holds."""
    return {
        rank: whole.index_select(dim, torch.tensor(list(own), dtype=torch.int64)) for rank, own in enumerate(chosen)
    }


def inferred(pieces: dict[int, Tensor], whole: Tensor, **more: object) -> Inferred:
    """What is inferred, which must be able to put every piece together again if it fits."""
    found = infer(pieces, whole, FLOOR, **more)
    if found.fits and not found.sums:
        for rank, piece in pieces.items():
            torch.testing.assert_close(found.take(rank, whole), piece, rtol=0, atol=6 * FLOOR)
    return found


def test_copies_are_replicated() -> None:
    whole = random(6, 5)
    found = inferred({3: whole, 7: whole.clone()}, whole)
    assert (found.kind, found.text, found.dim, found.groups) == ("replicated", "replicated", None, ((3, 7),))
    assert (found.residual, found.ambiguous) == (0.0, False)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_slices_in_order_are_found_however_uneven_they_are(dim: int, ranks: int) -> None:
    whole = random(12, 6, 7)
    pieces = dict(enumerate(torch.tensor_split(whole, ranks, dim)))
    found = inferred(pieces, whole)
    assert (found.kind, found.dim, found.text, found.ambiguous) == ("slice", dim, f"slices of dim {dim}", False)
    assert found.groups == tuple((rank,) for rank in range(ranks))


def test_torch_chunk_may_leave_a_rank_with_nothing() -> None:
    whole = random(9, 4)
    chunks = [*torch.chunk(whole, 6), whole[:0]]
    found = inferred(dict(enumerate(chunks)), whole)
    assert (found.kind, found.dim) == ("slice", 0)
    assert found.take(5, whole).shape == (0, 4)


def test_slices_may_belong_to_the_ranks_in_another_order() -> None:
    whole = random(8, 3)
    found = inferred(rows(whole, [4, 5], [0, 1], [6, 7], [2, 3]), whole)
    assert found.text == "slices of dim 0, in the order of ranks 1, 3, 0, 2"


@pytest.mark.parametrize(
    ("order", "groups"),
    [([0, 0, 1, 1], ((0, 1), (2, 3))), ([0, 1, 0, 1], ((0, 2), (1, 3))), ([0, 1, 1, 0], ((0, 3), (1, 2)))],
    ids=["neighbours", "every second", "neither"],
)
def test_ranks_that_hold_the_same_slice_are_told_from_those_that_share_the_tensor(
    order: list[int], groups: tuple[tuple[int, ...], ...]
) -> None:
    whole = random(8, 3)
    found = inferred(rows(whole, *(range(4 * part, 4 * part + 4) for part in order)), whole)
    assert (found.kind, found.dim, found.groups, found.ambiguous) == ("slice", 0, groups, False)
    assert found.text == f"slices of dim 0, each on ranks {groups[0]}, {groups[1]}"


@pytest.mark.parametrize("dim", [0, 1])
def test_fused_blocks_of_unequal_sizes_are_named_with_their_sizes(dim: int) -> None:
    whole = random(32, 6) if dim == 0 else random(6, 32)
    own = [[*range(8 * r, 8 * r + 8), *range(16 + 4 * r, 20 + 4 * r), *range(24 + 4 * r, 28 + 4 * r)] for r in (0, 1)]
    found = inferred(rows(whole, *own, dim=dim), whole)
    assert (found.kind, found.dim) == ("fused", dim)
    assert found.text == f"fused: 3 blocks (16, 8, 8) of dim {dim}, a slice of each per rank"
    assert found.cuts[0].blocks == (16, 8, 8)


def test_gate_and_up_are_two_blocks() -> None:
    whole = random(24, 3)
    found = inferred(
        rows(whole, *([*range(3 * r, 3 * r + 3), *range(12 + 3 * r, 15 + 3 * r)] for r in range(4))), whole
    )
    assert found.text == "fused: 2 blocks (12, 12) of dim 0, a slice of each per rank"


def test_key_heads_of_a_fused_matrix_may_be_held_by_several_ranks() -> None:
    # 4 query heads, 2 key and 2 value heads of 2 rows each, on 4 ranks.
    whole = random(16, 3)
    own = [[*range(2 * r, 2 * r + 2), *(8 + r // 2 * 2 + i for i in (0, 1)), *(12 + r // 2 * 2 + i for i in (0, 1))]
           for r in range(4)]  # fmt: skip
    found = inferred(rows(whole, *own), whole)
    assert found.text == "fused: 3 blocks (8, 4, 4) of dim 0, a slice of each per rank"
    assert len(found.groups) == 4


def test_a_single_key_head_cannot_be_told_from_the_value_head_beside_it() -> None:
    # Both are whole on every rank, one after the other: two blocks are all that values tell.
    whole = random(12, 3)
    found = inferred(rows(whole, *([*range(2 * r, 2 * r + 2), *range(8, 12)] for r in range(4))), whole)
    assert found.cuts[0].blocks == (8, 4)
    hinted = inferred(rows(whole, *([*range(2 * r, 2 * r + 2), *range(8, 12)] for r in range(4))), whole,
                      hint={"fused": [8, 2, 2]})  # fmt: skip
    assert (hinted.cuts[0].blocks, hinted.contradicts) == ((8, 2, 2), "")


@pytest.mark.parametrize("size", [8, 9])
def test_samples_dealt_out_in_turn_are_interleaved(size: int) -> None:
    whole = random(size, 3, 2)
    found = inferred(rows(whole, *(range(r, size, 2) for r in (0, 1))), whole)
    assert (found.kind, found.text) == ("interleaved", "interleaved: every 2nd of dim 0")


def test_blocks_dealt_out_in_turn_are_interleaved() -> None:
    whole = random(160, 3)
    own = [[row for row in range(160) if row // 2 % 4 == rank] for rank in range(4)]
    assert inferred(rows(whole, *own), whole).text == "interleaved: every 4th of dim 0 in blocks of 2"


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 11), st.booleans())
def test_any_places_that_tile_the_whole_are_found(order: list[int], first: int, transposed: bool) -> None:
    whole, dim = (random(5, 12), 1) if transposed else (random(12, 5), 0)
    found = inferred(rows(whole, order[:first], order[first:], dim=dim), whole)
    assert found.fits
    assert not found.ambiguous
    assert found.dim == dim


def test_a_permutation_of_many_rows_is_found() -> None:
    whole = random(6000, 4)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(0))
    found = inferred({0: whole[order[:2500]], 1: whole[order[2500:]]}, whole)
    assert (found.kind, found.text) == ("permuted", "permuted slices of dim 0")
    assert torch.equal(found.cuts[0].index[0], order[:2500])


def test_whole_tensors_in_another_order_are_permuted() -> None:
    # Rotary halves against neighbouring pairs: the same weights, in another order of rows on every rank.
    whole = random(8, 3)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    found = inferred(rows(whole, order, order), whole)
    assert (found.kind, found.dim, found.groups) == ("permuted", 0, ((0, 1),))


def test_two_dims_can_be_cut_at_once() -> None:
    whole = random(4, 6, 5)
    pieces = {2 * d + t: whole[2 * d : 2 * d + 2, 3 * t : 3 * t + 3] for d in (0, 1) for t in (0, 1)}
    found = inferred(pieces, whole)
    assert (found.kind, found.text) == ("grid", "slices of dim 0 and slices of dim 1")
    assert found.groups == ((0,), (1,), (2,), (3,))


def test_samples_dealt_out_in_turn_may_be_cut_along_the_sequence_too() -> None:
    whole = random(6, 8, 5)
    pieces = {2 * d + t: whole[d::2, 4 * t : 4 * t + 4] for d in (0, 1) for t in (0, 1)}
    found = inferred(pieces, whole)
    assert found.text == "interleaved: every 2nd of dim 0 and slices of dim 1"


def test_parts_of_the_flattened_tensor_are_found() -> None:
    whole = random(5, 3)
    pieces = dict(enumerate(whole.reshape(-1).split([8, 7])))
    found = inferred(pieces, whole)
    assert (found.flat, found.text, found.dim) == (True, "slices of the flattened tensor", None)


def test_terms_of_a_sum_are_partial() -> None:
    whole, first = random(4, 5), random(4, 5, seed=2)
    found = inferred({0: first, 1: whole - first}, whole)
    assert (found.kind, found.text, found.sums) == ("partial", "partial sums over all ranks", ((0, 1),))
    assert not found.ambiguous


@pytest.mark.parametrize("sums", [((0, 1), (2, 3)), ((0, 2), (1, 3))], ids=["neighbours", "every second"])
def test_which_ranks_add_up_is_found(sums: tuple[tuple[int, int], ...]) -> None:
    whole = random(4, 5)
    pieces = {}
    for number, (first, second) in enumerate(sums):
        pieces[first] = random(4, 5, seed=2 + number)
        pieces[second] = whole - pieces[first]
    found = inferred(pieces, whole)
    assert (found.kind, found.sums) == ("partial", sums)
    assert infer(pieces, whole, FLOOR, groups=sums).sums == sums


def test_slices_of_partial_sums_are_both() -> None:
    # A reduce-scatter that was not done: tp peers 0, 1 and 2, 3 add up to one half each.
    whole = random(8, 3)
    first, second = random(4, 3, seed=2), random(4, 3, seed=3)
    found = inferred({0: first, 1: whole[:4] - first, 2: second, 3: whole[4:] - second}, whole)
    assert (found.kind, found.dim, found.sums) == ("partial", 0, ((0, 1), (2, 3)))
    assert found.text == "slices of dim 0, partial sums over ranks (0, 1), (2, 3)"
    assert torch.equal(found.take(3, whole), whole[4:])


def test_terms_of_a_mean_are_told_from_terms_of_a_sum() -> None:
    whole, first = random(4, 5), random(4, 5, seed=2)
    found = inferred({0: first, 1: 2 * whole - first}, whole)
    assert (found.kind, found.text) == ("mean", "means over all ranks")


def test_a_factor_is_no_layout() -> None:
    whole = random(4, 5)
    found = inferred({0: 3 * whole, 1: 3 * whole}, whole)
    assert (found.kind, found.factor, found.ambiguous) == ("scaled", 3.0, False)


def test_single_numbers_are_copies_or_terms_but_no_multiples() -> None:
    whole, one, two = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 1.0, 2.0))
    assert inferred({0: whole, 1: whole}, whole).kind == "replicated"
    assert inferred({0: one, 1: two}, whole).kind == "partial"
    assert inferred({0: two, 1: two}, whole).kind == "unknown"


def test_equal_terms_of_a_sum_may_as_well_be_scaled_copies() -> None:
    whole = random(4, 5)
    found = inferred({0: whole / 2, 1: whole / 2}, whole)
    assert (found.kind, found.factor) == ("scaled", 0.5)
    assert found.alternatives == ("partial sums over all ranks",)


# What the values leave open.


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("cut", [True, False])
def test_constants_and_zeros_are_ambiguous(value: float, cut: bool) -> None:
    whole = torch.full((4, 3), value, dtype=torch.float64)
    found = inferred({0: whole[:2], 1: whole[2:]} if cut else {0: whole, 1: whole}, whole)
    assert found.kind == ("slice" if cut else "replicated")
    assert found.ambiguous
    assert ("all zero" if value == 0 else "all elements of the whole are the same") in found.reason


def test_equal_slices_are_ambiguous() -> None:
    half = random(2, 3)
    whole = torch.cat([half, half])
    found = inferred({0: half, 1: half}, whole)
    assert (found.kind, found.groups) == ("slice", ((0,), (1,)))
    assert found.ambiguous
    assert "occurs more than once" in found.reason


@pytest.mark.parametrize("grid", [False, True])
def test_parts_of_zeros_are_put_where_nobody_elses_part_lies(grid: bool) -> None:
    """As rows of a gradient that no token reached: others' parts say where they belong, but not in which order."""
    whole = random(8, 4)
    whole[2:6] = 0
    if grid:
        pieces = {2 * d + t: whole[2 * d : 2 * d + 2, 2 * t : 2 * t + 2] for d in range(4) for t in range(2)}
    else:
        pieces = dict(enumerate(whole.chunk(4)))
    found = inferred(pieces, whole)
    assert (found.kind, found.ambiguous) == ("grid" if grid else "slice", True)
    assert len(found.groups) == len(pieces)


def test_one_row_that_occurs_twice_leaves_nothing_open() -> None:
    whole = random(8, 3)
    whole[5] = whole[1]
    assert not inferred({0: whole[:4], 1: whole[4:]}, whole).ambiguous


def test_rows_that_look_alike_leave_a_permutation_open() -> None:
    whole = random(8, 3)
    whole[5] = whole[2]
    found = inferred(rows(whole, [7, 2, 0, 4], [5, 1, 6, 3]), whole)
    assert (found.kind, found.ambiguous) == ("permuted", True)


def test_a_tensor_no_larger_than_rounding_is_ambiguous() -> None:
    whole = random(4, 3)
    assert infer({0: whole, 1: whole}, whole, 1.0).ambiguous


def test_a_zero_term_leaves_open_who_adds_up() -> None:
    whole = random(4, 5)
    found = inferred({0: whole, 1: 0 * whole, 2: whole, 3: 0 * whole}, whole)
    assert found.kind == "partial"
    assert found.ambiguous


# What is no layout.


def test_nan_fits_nowhere() -> None:
    whole = random(4, 3)
    broken = whole.clone()
    broken[1, 1] = math.nan
    for pieces, against in (({0: whole, 1: broken}, whole), ({0: broken, 1: broken}, broken)):
        found = infer(pieces, against, FLOOR)
        assert (found.kind, found.fits) == ("unknown", False)
        assert math.isnan(found.residual)
        assert "NaN" in found.reason


def test_an_infinity_that_both_hold_is_equal() -> None:
    whole = random(4, 3)
    whole[1, 1] = -math.inf
    assert inferred({0: whole, 1: whole}, whole).kind == "replicated"
    assert inferred({0: whole[:2], 1: whole[2:]}, whole).text == "slices of dim 0"


@pytest.mark.parametrize("layout", ["replicated", "slices", "fused", "interleaved", "grid", "partial"])
@settings(max_examples=20, deadline=None)
@given(rank=st.integers(0, 3), place=st.integers(0, 10**6))
def test_one_wrong_element_of_any_rank_is_enough_for_no_layout(layout: str, rank: int, place: int) -> None:
    whole, first = random(16, 4), random(16, 4, seed=2)
    pieces = {
        "replicated": [whole] * 4,
        "slices": whole.chunk(4),
        "fused": [torch.cat([block.chunk(4)[r] for block in whole.split([8, 4, 4])]) for r in range(4)],
        "interleaved": [whole[r::4] for r in range(4)],
        "grid": [whole.chunk(2)[r // 2].chunk(2, 1)[r % 2] for r in range(4)],
        "partial": [first, whole, 0.5 * first, -1.5 * first],
    }[layout]
    assert inferred(dict(enumerate(pieces)), whole).fits
    wrong = [piece.clone() for piece in pieces]
    wrong[rank].view(-1)[place % wrong[rank].numel()] += 1e-9
    assert not inferred(dict(enumerate(wrong)), whole).fits


def test_a_wrong_value_is_unknown_with_the_nearest_reading_and_its_residual() -> None:
    whole = random(4, 3)
    wrong = whole[2:].clone()
    wrong[0, 0] += 1e-9
    found = inferred({0: whole[:2], 1: wrong}, whole)
    assert (found.kind, found.text) == ("unknown", "unknown; nearest: slices of dim 0")
    assert found.residual == pytest.approx(1e6, rel=1e-3)
    with pytest.raises(ValueError, match="not known"):
        found.take(0, whole)


def test_slices_that_leave_something_out_are_no_layout() -> None:
    whole = random(8, 3)
    found = inferred(rows(whole, range(4), range(4)), whole)
    assert not found.fits
    assert found.text == "unknown; right values, but nobody holds 4:8 of dim 0"


def test_slices_that_overlap_are_no_layout() -> None:
    whole = random(8, 3)
    found = inferred(rows(whole, range(5), range(3, 8)), whole)
    assert not found.fits
    assert "overlap" in found.text


def test_a_grid_with_a_corner_that_nobody_holds_is_no_layout() -> None:
    whole = random(4, 4)
    pieces = {0: whole[:2, :2], 1: whole[:2, 2:], 2: whole[2:, :2], 3: whole[2:, :2]}
    assert not inferred(pieces, whole).fits


def test_a_bias_that_every_rank_adds_is_named() -> None:
    whole, first, bias = random(4, 5), random(4, 5, seed=2), random(5, seed=3)
    found = inferred({0: first + bias, 1: whole - first}, whole)
    assert found.text == "unknown; nearest: partial sums over all ranks, each with a whole bias"


def test_shapes_that_are_no_parts_are_unknown() -> None:
    whole = random(4, 3)
    assert inferred({0: random(5, 3)}, whole).reason == "(5, 3) are no parts of (4, 3)"
    assert not inferred({0: random(3)}, torch.tensor(1.0)).fits


# Rounding.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_hide_a_layout(dtype: torch.dtype) -> None:
    whole = random(32, 64)
    floor = float(torch.finfo(dtype).eps) * float(whole.abs().max()) / 2
    low = whole.to(dtype)
    own = [[*range(8 * r, 8 * r + 8), *range(16 + 4 * r, 20 + 4 * r), *range(24 + 4 * r, 28 + 4 * r)] for r in (0, 1)]
    assert infer(rows(low, *own), whole, floor).kind == "fused"
    assert infer({0: low[::2], 1: low[1::2]}, whole, floor).kind == "interleaved"
    assert infer({0: low, 1: low}, whole, floor).kind == "replicated"
    found = infer({0: low[:, :32], 1: low[:, 32:]}, whole, floor)
    assert (found.kind, found.ambiguous) == ("slice", False)
    assert 0 < found.residual <= 1


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([2, 4]),
    heads=st.integers(1, 4),
    width=st.sampled_from([1, 3]),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_a_place_is_right_or_said_to_be_open(
    ranks: int, heads: int, width: int, shared: bool, dtype: torch.dtype, seed: int
) -> None:
    """Of few numbers in low precision several may look alike: then nothing is told apart without saying so."""
    kv = ranks // 2 if shared else ranks
    whole = random(heads * (ranks + 2 * kv), width, seed=seed)
    query, key, value = torch.arange(len(whole)).split([heads * ranks, heads * kv, heads * kv])
    index = {
        rank: torch.cat([query.chunk(ranks)[rank], *(block.chunk(kv)[rank * kv // ranks] for block in (key, value))])
        for rank in range(ranks)
    }
    floor = float(torch.finfo(dtype).eps) * float(whole.abs().max()) / 2
    found = infer({rank: whole[own].to(dtype) for rank, own in index.items()}, whole, floor)
    if found.fits and not found.ambiguous:
        assert all(torch.equal(found.cuts[0].index[rank], own) for rank, own in index.items())
    if dtype == torch.float32:
        assert found.fits


# Hints.


def test_a_hint_decides_where_values_leave_a_choice() -> None:
    whole = torch.ones(4, 3)
    found = infer({0: whole[:2], 1: whole[2:]}, whole, 1e-7, hint={"dim": 0})
    assert (found.kind, found.ambiguous, found.contradicts) == ("slice", False, "")
    found = infer({0: whole, 1: whole}, whole, 1e-7, hint={"replicated": True})
    assert (found.kind, found.ambiguous, found.contradicts) == ("replicated", False, "")


def test_a_hint_that_the_values_contradict_is_said() -> None:
    whole = random(8, 3)
    found = inferred(rows(whole, range(0, 8, 2), range(1, 8, 2)), whole, hint={"dim": 0})
    assert found.kind == "interleaved"
    assert found.contradicts.startswith("the hint says slices of dim 0, but so laid out, the values are ")
    assert found.contradicts.endswith("the values say interleaved: every 2nd of dim 0")
    assert (
        "cut along other dims" in inferred({0: whole[:4], 1: whole[4:]}, whole, hint={"replicated": True}).contradicts
    )
    assert "cut along no dim" in inferred({0: whole, 1: whole}, whole, hint={"dim": 1}).contradicts


@pytest.mark.parametrize(
    "hint", [{"dim": 2}, {"fused": [3, 4]}, {"what": 1}, {"replicated": True, "dim": 0}, {"replicated": False}]
)
def test_a_hint_that_makes_no_sense_is_refused(hint: dict[str, object]) -> None:
    whole = random(8, 3)
    with pytest.raises(ValueError, match="hint"):
        infer({0: whole[:4], 1: whole[4:]}, whole, FLOOR, hint=hint)


def test_groups_must_be_the_ranks() -> None:
    whole = random(8, 3)
    with pytest.raises(ValueError, match="each once"):
        infer({0: whole, 1: whole}, whole, FLOOR, groups=[[0], [2]])
    with pytest.raises(ValueError, match="no pieces"):
        infer({}, whole, FLOOR)
