"""Verdicts from sketches and statistics: what passes, what does not, and what cannot be said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardproof.compare.fitted import factor
from shardproof.compare.sketched import Shown, Side, compare
from shardproof.compare.tiling import gap
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.parallel import piece as pieces
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.record import Record
from shardproof.trace.sketch import norm, sketch
from shardproof.trace.stats import Stats, combined, stats_of

GRADIENT = (0, "gradient", "fc.weight", "")
FORWARD = (0, "forward", "fc", "")
SAMPLES = tuple("abcdefgh")
FLOOR = 1e-12
KEEPS = ("sketch", "stats")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shown(rank: int, tensor: Tensor, piece: Piece | None, *, keep: str = "sketch", stage: str = "gradient") -> Shown:
    return Shown(
        rank=rank,
        record=Record(step=0, stage=stage, name="fc.weight", piece=piece),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        sketch=sketch(tensor, piece) if keep == "sketch" else None,
        stats=stats_of(tensor),
    )


def box(whole: Sequence[int], offset: Sequence[int], shape: Sequence[int], **more: object) -> Piece:
    return Piece(whole=tuple(whole), offset=tuple(offset), shape=tuple(shape), **more)  # type: ignore[arg-type]


def single(tensor: Tensor, keep: str = "sketch") -> Side:
    return Side(shown=[shown(0, tensor, pieces.whole(tensor.shape), keep=keep)])


def sharded(tensor: Tensor, tp: int = 2, shards: int = 2, replicas: int = 1, *, keep: str = "sketch") -> Side:
    """Columns over tp, rows over dp_shard, both uneven, and replicas of all of it."""
    rows, columns = tensor.shape
    held = []
    for rank in range(tp * shards * replicas):
        high, wide = -(-rows // shards), -(-columns // tp)
        top, left = min(rank // tp % shards * high, rows), min(rank % tp * wide, columns)
        piece = box(tensor.shape, (top, left), (min(high, rows - top), min(wide, columns - left)))
        held.append(shown(rank, piece.take(tensor), piece, keep=keep))
    return Side(shown=held, parallelism=Parallelism(dp_replicate=replicas, dp_shard=shards, tp=tp))


def changed(side: Side, rank: int, by: Tensor | float) -> Side:
    """The side with the values of one rank multiplied."""
    held = [
        one
        if one.rank != rank
        else replace(one, sketch=None if one.sketch is None else one.sketch * by, stats=scaled(one.stats, float(by)))
        for one in side.shown
    ]
    return replace(side, shown=held)


def scaled(stats: Stats | None, by: float) -> Stats | None:
    if stats is None:
        return None
    return replace(
        stats,
        min=min(stats.min * by, stats.max * by),
        max=max(stats.min * by, stats.max * by),
        sum=stats.sum * by,
        square_sum=stats.square_sum * by * by,
        absmax=stats.absmax * abs(by),
    )


def held_together(want: Side, got: Side, **more: float) -> Comparison:
    key = GRADIENT if want.shown[0].record.stage == "gradient" else FORWARD
    return compare(key, want, got, floor=FLOOR, **more)


WEIGHT = drawn(33, 70)


# Pieces of a parameter.


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("layout", [(1, 4, 1), (4, 1, 1), (2, 2, 1), (2, 2, 2), (1, 1, 3)], ids=str)
def test_right_pieces_pass_whatever_the_layout(layout: tuple[int, int, int], keep: str) -> None:
    found = held_together(single(WEIGHT, keep), sharded(WEIGHT, *layout, keep=keep))
    assert (found.verdict, found.ranks, found.shape) == (Verdict.ROUNDING, (), (33, 70))
    assert found.layout.endswith("by sketch" if keep == "sketch" else "by statistics")
    other = held_together(sharded(WEIGHT, 2, 2, keep=keep), sharded(WEIGHT, *layout, keep=keep))
    assert other.verdict is Verdict.ROUNDING


@pytest.mark.parametrize("keep", KEEPS)
def test_a_constant_ratio_is_told(keep: str) -> None:
    found = held_together(single(WEIGHT, keep), sharded(2 * WEIGHT, keep=keep))
    assert (found.verdict, found.ranks) == (Verdict.DIFFERENT, (0, 1, 2, 3))
    assert found.ratio == pytest.approx(2)
    size = float(WEIGHT.norm())
    assert found.error == pytest.approx(size, rel=0.25)
    right = held_together(single(WEIGHT, keep), sharded(2 * WEIGHT, keep=keep), factor=2.0)
    assert right.verdict is Verdict.ROUNDING


def test_a_turned_sign_is_a_ratio_too() -> None:
    assert held_together(single(WEIGHT), sharded(-WEIGHT)).ratio == pytest.approx(-1)


@pytest.mark.parametrize("keep", KEEPS)
def test_other_values_differ_and_have_no_ratio(keep: str) -> None:
    found = held_together(single(WEIGHT, keep), sharded(drawn(33, 70, seed=1), keep=keep))
    assert (found.verdict, found.ratio) == (Verdict.DIFFERENT, None)


def test_two_pieces_that_changed_places_show() -> None:
    side = sharded(WEIGHT[:32])
    first, second = side.shown[0], side.shown[1]
    assert first.record.piece is not None
    swapped = replace(
        side,
        shown=[
            shown(0, WEIGHT[:16, 35:], first.record.piece),
            shown(1, WEIGHT[:16, :35], second.record.piece),
            *side.shown[2:],
        ],
    )
    assert held_together(single(WEIGHT[:32]), swapped).verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("rank", [0, 3, 6])
def test_the_replica_that_is_wrong_is_named(rank: int, keep: str) -> None:
    want = sharded(WEIGHT, keep=keep)
    found = held_together(want, changed(sharded(WEIGHT, replicas=2, keep=keep), rank, 3.0))
    assert found.verdict is Verdict.DIFFERENT
    assert rank in found.ranks
    if keep == "sketch":
        assert found.ranks == (rank,)


def test_replicas_that_are_wrong_by_opposite_amounts_do_not_cancel() -> None:
    side = sharded(torch.ones(32, 64, dtype=torch.float64), replicas=2)
    other = drawn(16, 32)
    held = list(side.shown)
    for rank, sign in ((4, 1), (5, -1)):
        held[rank] = replace(held[rank], sketch=held[rank].sketch + sign * sketch(other))  # type: ignore[operator]
    found = held_together(single(torch.ones(32, 64, dtype=torch.float64)), replace(side, shown=held))
    assert found.verdict is Verdict.DIFFERENT
    assert set(found.ranks) & {4, 5}
    found = held_together(sharded(torch.ones(32, 64, dtype=torch.float64)), replace(side, shown=held))
    assert (found.verdict, found.ranks) == (Verdict.DIFFERENT, (4, 5))


def test_partial_sums_are_added_up_as_they_say() -> None:
    parts = [drawn(33, 70, seed=seed) for seed in (1, 2)]
    for operation, whole in (("sum", parts[0] + parts[1]), ("avg", (parts[0] + parts[1]) / 2)):
        piece = box((33, 70), (0, 0), (33, 70), pending=((operation, (0, 1)),))
        got = Side(shown=[shown(rank, part, piece) for rank, part in enumerate(parts)], parallelism=Parallelism(tp=2))
        assert held_together(single(whole), got).verdict is Verdict.ROUNDING
        assert held_together(single(2 * whole), got).ratio == pytest.approx(0.5)


@pytest.mark.parametrize("keep", KEEPS)
def test_what_sketches_cannot_carry_out_is_not_checked(keep: str) -> None:
    piece = box((33, 70), (0, 0), (33, 70), pending=(("max", (0, 1)),))
    got = Side(shown=[shown(rank, WEIGHT, piece, keep=keep) for rank in range(2)], parallelism=Parallelism(tp=2))
    found = held_together(single(WEIGHT), got)
    assert (found.verdict, "pending max" in found.reason) == (Verdict.NOT_CHECKED, True)
    lacking = box((33, 70), (0, 0), (33, 70), pending=(("sum", (0, 7)),))
    found = held_together(single(WEIGHT), Side(shown=[shown(0, WEIGHT, lacking, keep=keep)]))
    assert (found.verdict, "rank 7" in found.reason) == (Verdict.NOT_CHECKED, True)


def test_a_missing_rank_is_no_pass() -> None:
    side = sharded(WEIGHT)
    found = held_together(single(WEIGHT), replace(side, shown=side.shown[1:]))
    assert (found.verdict, found.reason) == (Verdict.NOT_CHECKED, "in this run: the ranks show 1715 of 2310 elements")


def test_pieces_that_overlap_are_no_pass() -> None:
    held = [
        shown(r, WEIGHT[:, start : start + 40], box((33, 70), (0, start), (33, 40))) for r, start in enumerate((0, 30))
    ]
    assert held_together(single(WEIGHT), Side(shown=held)).reason == "in this run: pieces of (33, 70) overlap"


def test_another_shape_is_different() -> None:
    found = held_together(single(WEIGHT), single(WEIGHT[:32]))
    assert (found.verdict, found.reason) == (Verdict.DIFFERENT, "shape (32, 70) against (33, 70) in the reference")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep", KEEPS)
def test_nan_and_infinities_never_pass(keep: str, bad: float) -> None:
    broken = WEIGHT.clone()
    broken[3, 4] = bad
    assert held_together(single(WEIGHT, keep), sharded(broken, keep=keep)).verdict is Verdict.DIFFERENT
    both = held_together(single(broken, keep), sharded(broken, keep=keep)).verdict
    assert both is Verdict.NOT_CHECKED or (keep, bad) == ("stats", math.inf)
    assert held_together(single(broken, keep), sharded(WEIGHT, keep=keep)).verdict is not Verdict.ROUNDING


def test_a_gradient_that_a_rank_lacks_is_named() -> None:
    side = sharded(WEIGHT, replicas=2)
    for rank in (1, 6):
        gone = replace(side.shown[rank], record=replace(side.shown[rank].record, missing=True), sketch=None, stats=None)
        got = replace(side, shown=[gone if one.rank == rank else one for one in side.shown])
        found = held_together(sharded(WEIGHT), got)
        assert (found.verdict, found.ranks) == (Verdict.DIFFERENT, (rank,))
        assert found.reason == "no gradient where the reference has one"


def missing(side: Side) -> Side:
    held = [replace(one, record=replace(one.record, missing=True), sketch=None, stats=None) for one in side.shown]
    return replace(side, shown=held)


def test_no_gradient_on_one_side() -> None:
    zeros = torch.zeros(33, 70, dtype=torch.float64)
    assert held_together(single(WEIGHT), missing(sharded(WEIGHT))).ranks == (0, 1, 2, 3)
    assert held_together(single(zeros), missing(sharded(zeros))).verdict is Verdict.NOT_CHECKED
    assert held_together(missing(single(WEIGHT)), sharded(WEIGHT)).verdict is Verdict.DIFFERENT
    assert held_together(missing(single(zeros)), sharded(zeros)).verdict is Verdict.NOT_CHECKED
    assert held_together(missing(single(zeros)), missing(sharded(zeros))).verdict is Verdict.NOT_CHECKED
    nobody = Side(shown=[])
    assert held_together(single(WEIGHT), nobody).reason == "this run shows no such tensor"


def test_zeros_and_noise_hide_bugs() -> None:
    zeros = torch.zeros(33, 70, dtype=torch.float64)
    assert "all zero" in held_together(single(zeros), sharded(zeros)).reason
    found = compare(GRADIENT, single(WEIGHT), sharded(8 * WEIGHT), floor=float(WEIGHT.norm()))
    assert (found.verdict, "as much as its own size" in found.reason) == (Verdict.NOT_CHECKED, True)


def test_a_difference_within_the_floor_is_rounding_and_beyond_it_is_not() -> None:
    noise = drawn(33, 70, seed=3)
    size = float(noise.norm())
    for times, verdict in ((3.0, Verdict.ROUNDING), (12.0, Verdict.DIFFERENT)):
        got = sharded(WEIGHT + 1e-6 * times * noise)
        assert compare(GRADIENT, single(WEIGHT), got, floor=1e-6 * size).verdict is verdict


def test_runs_in_float32_pass_on_the_rounding_of_their_sketches_alone() -> None:
    tensor = drawn(3000, 300).float() + 5
    found = compare((-1, "initial-state", "fc.weight", ""), single(tensor), sharded(tensor, 4, 4), floor=0.0)
    assert (found.verdict, found.floor > 0) == (Verdict.ROUNDING, True)
    other = tensor.clone()
    other[7, 7] *= 3
    assert compare(GRADIENT, single(tensor), sharded(other, 4, 4), floor=0.0).verdict is Verdict.DIFFERENT


def test_pieces_split_by_hand_have_statistics_and_no_place() -> None:
    held = []
    for rank, part in enumerate(WEIGHT.chunk(2, 1)):
        piece = Piece(whole=(33, 70), offset=(0, 0), shape=tuple(part.shape), declared=False)
        held.append(shown(rank, part, piece))
    side = Side(shown=held, parallelism=Parallelism(tp=2))
    found = held_together(single(WEIGHT), side)
    assert (found.verdict, found.layout) == (Verdict.ROUNDING, "tp: slices, by statistics")
    assert held_together(single(WEIGHT), changed(side, 1, 2.0)).verdict is Verdict.DIFFERENT
    bare = replace(side, shown=[replace(one, stats=None) for one in side.shown])
    assert "only values can tell" in held_together(single(WEIGHT), bare).reason


def test_plain_parts_of_a_split_that_nobody_knows_of_are_recognised_by_their_size() -> None:
    held = [shown(rank, part, pieces.whole(part.shape)) for rank, part in enumerate(WEIGHT.chunk(2, 1))]
    side = Side(shown=held, parallelism=Parallelism(tp=2))
    assert held_together(single(WEIGHT), side).layout == "tp: slices, by statistics"
    assert held_together(side, single(WEIGHT)).verdict is Verdict.ROUNDING
    odd = Side(shown=held[:1])
    assert held_together(single(WEIGHT), odd).reason == "shape (33, 35) against (33, 70) in the reference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_in_float64_tell_small_differences(dtype: torch.dtype) -> None:
    tensor = (drawn(60, 70) + 3).to(dtype)
    for times, told in ((1 + 1e-9, dtype == torch.float64), (1.001, True)):
        found = held_together(single(tensor, "stats"), single(tensor * times, "stats"))
        assert (found.verdict is Verdict.DIFFERENT) == told
    larger = tensor.clone()
    larger[0, 0] = tensor.max() + 0.01
    assert held_together(single(tensor, "stats"), single(larger, "stats")).verdict is Verdict.DIFFERENT


def test_replicas_of_the_reference_that_differ_are_no_reference() -> None:
    for keep in KEEPS:
        want = changed(sharded(WEIGHT, replicas=2, keep=keep), 5, 2.0)
        found = held_together(want, single(WEIGHT, keep))
        assert (found.verdict, "replicas differ" in found.reason) == (Verdict.NOT_CHECKED, True)


def test_a_sketch_against_statistics_alone_falls_back_or_says_so() -> None:
    assert held_together(single(WEIGHT), sharded(WEIGHT, keep="stats")).layout == "pieces added up, by statistics"
    bare = replace(single(WEIGHT), shown=[replace(one, stats=None) for one in single(WEIGHT).shown])
    assert held_together(bare, sharded(WEIGHT, keep="stats")).verdict is Verdict.NOT_CHECKED


# Outputs of modules.

OUTPUT = drawn(8, 5, 24)


def activations(
    cells: Sequence[Sequence[tuple[Tensor, Sequence[int]]]], *, keep: str = "sketch", samples: bool = True
) -> Side:
    """[data rank x micro-batch][tp peer] -> (tensor, its samples), of two micro-batches a rank."""
    tp = len(cells[0])
    held = []
    for number, cell in enumerate(cells):
        for peer, (tensor, own) in enumerate(cell):
            made = sketch(tensor, samples=[SAMPLES[i] for i in own] if samples else None)
            record = Record(step=0, stage="forward", name="fc", call=number % 2)
            held.append(
                Shown(
                    rank=number // 2 * tp + peer,
                    record=record,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    sketch=made if keep == "sketch" else None,
                    stats=stats_of(tensor),
                    by_sample=samples,
                )
            )
    return Side(shown=held, parallelism=Parallelism(dp_shard=len(cells) // 2, tp=tp), microbatches=2)


def alone(tensor: Tensor, keep: str = "sketch") -> Side:
    return activations([[(tensor[:4], range(4))], [(tensor[4:], range(4, 8))]], keep=keep)


PARTS = [[6, 7], [0, 3], [5, 2], [1, 4]]


@pytest.mark.parametrize("keep", KEEPS)
def test_parts_of_the_batch_add_up_whoever_read_them(keep: str) -> None:
    got = activations([[(OUTPUT[part], part)] * 2 for part in PARTS], keep=keep)
    found = held_together(alone(OUTPUT, keep), got)
    assert (found.verdict, found.layout.split(",")[0]) == (Verdict.ROUNDING, "replicated")
    wrong = activations([[(1.5 * OUTPUT[part], part)] * 2 for part in PARTS], keep=keep)
    found = held_together(alone(OUTPUT, keep), wrong)
    assert (found.verdict, found.ratio) == (Verdict.DIFFERENT, pytest.approx(1.5))
    assert found.ranks == (0, 1, 2, 3)


def test_the_peer_that_differs_is_named() -> None:
    got = activations([[(OUTPUT[part], part), (3 * OUTPUT[part], part)] for part in PARTS])
    found = held_together(alone(OUTPUT), got)
    assert (found.verdict, found.ranks) == (Verdict.DIFFERENT, (1, 3))


@pytest.mark.parametrize("keep", KEEPS)
def test_partial_sums_over_tp_are_read_as_such(keep: str) -> None:
    part_of = [drawn(8, 5, 24, seed=seed) for seed in (1, 2)]
    cells = [[(own[part], part) for own in part_of] for part in PARTS]
    got = activations(cells, keep=keep)
    found = held_together(alone(part_of[0] + part_of[1], keep), got)
    if keep == "stats":
        assert (found.verdict, "partial sums" in found.reason) == (Verdict.NOT_CHECKED, True)
    else:
        assert (found.verdict, found.layout) == (Verdict.ROUNDING, "partial sums over tp, by sketch")
        # As a reference they are no more and no less.
        assert held_together(got, alone(part_of[0] + part_of[1])).verdict is Verdict.ROUNDING
        assert held_together(got, alone(part_of[0])).verdict is Verdict.DIFFERENT


def test_slices_over_tp_have_statistics() -> None:
    cells = [[(half, part) for half in OUTPUT[part].chunk(2, -1)] for part in PARTS]
    found = held_together(alone(OUTPUT), activations(cells))
    assert (found.verdict, found.layout) == (Verdict.ROUNDING, "tp: slices, by statistics")
    wrong = [[(2 * half, part) for half in OUTPUT[part].chunk(2, -1)] for part in PARTS]
    assert held_together(alone(OUTPUT), activations(wrong)).verdict is not Verdict.ROUNDING


def test_slices_that_dtensor_declares_have_sketches() -> None:
    held = []
    for number, part in enumerate(PARTS):
        for peer in range(2):
            piece = box((2, 5, 24), (0, 0, 12 * peer), (2, 5, 12))
            tensor = piece.take(OUTPUT[part])
            record = Record(step=0, stage="forward", name="fc", call=number % 2, piece=piece)
            made = sketch(tensor, piece, [SAMPLES[i] for i in part])
            held.append(
                Shown(
                    rank=number // 2 * 2 + peer,
                    record=record,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    sketch=made,
                    by_sample=True,
                )
            )
    got = Side(shown=held, parallelism=Parallelism(dp_shard=2, tp=2), microbatches=2)
    found = held_together(alone(OUTPUT), got)
    assert (found.verdict, found.layout) == (Verdict.ROUNDING, "declared by DTensor, by sketch")
    assert held_together(alone(2 * OUTPUT), got).ratio == pytest.approx(0.5)


def test_sketches_by_index_and_by_sample_are_not_held_together() -> None:
    by_index = Side(shown=[replace(shown(0, OUTPUT, None, stage="forward"), stats=None)])
    found = held_together(by_index, alone(OUTPUT))
    assert found.verdict is Verdict.NOT_CHECKED


def test_what_does_not_depend_on_the_samples_is_the_same_in_every_part() -> None:
    table = drawn(5, 24)
    got = activations([[(table, [])] * 2 for _ in PARTS], samples=False)
    want = Side(shown=[shown(0, table, None, stage="forward")])
    assert held_together(want, got).verdict is Verdict.ROUNDING
    other = activations([[(table * (number + 1), [])] * 2 for number, _ in enumerate(PARTS)], samples=False)
    assert held_together(want, other).verdict is not Verdict.ROUNDING


def test_calls_of_a_shared_module_are_held_against_each_other_one_by_one() -> None:
    def twice(first: Tensor, second: Tensor) -> Side:
        sides = [alone(first), alone(second)]
        held = [
            replace(one, record=replace(one.record, call=2 * one.record.call + call))
            for call, side in enumerate(sides)
            for one in side.shown
        ]
        return replace(sides[0], shown=held)

    other = drawn(8, 5, 24, seed=1)
    assert held_together(twice(OUTPUT, other), twice(OUTPUT, other)).verdict is Verdict.ROUNDING
    assert held_together(twice(OUTPUT, other), twice(other, OUTPUT)).verdict is Verdict.DIFFERENT


def test_a_call_too_many_is_not_checked() -> None:
    got = activations([[(OUTPUT[part], part)] for part in PARTS])
    odd = replace(got, shown=[*got.shown, got.shown[0]])
    assert "shown 2 or 3 times" in held_together(alone(OUTPUT), odd).reason


# Tiling, and what diagnosis asks.


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ([box((4, 4), (0, 0), (4, 4))], ""),
        ([box((4, 4), (0, 0), (2, 4)), box((4, 4), (2, 0), (2, 1)), box((4, 4), (2, 1), (2, 3))], ""),
        ([box((4, 4), (0, 0), (4, 4), stretch=(0, 5)), box((4, 4), (0, 0), (4, 4), stretch=(5, 16))], ""),
        (
            [box((4, 4), (0, 0), (4, 4), stretch=(0, 8)), box((4, 4), (0, 0), (4, 4), stretch=(4, 12))],
            "overlap, or leave",
        ),
        ([box((4, 4), (0, 0), (2, 4)), box((4, 4), (1, 0), (2, 4))], "overlap"),
        ([box((4, 4), (0, 0), (2, 4))], "8 of 16"),
        ([box((), (), ())], ""),
        ([box((0, 3), (0, 0), (0, 3))], ""),
        ([box((4,), (3,), (2,)), box((4,), (0,), (2,))], "overlap"),
    ],
)
def test_pieces_make_up_a_whole_or_it_is_said_why_not(made: list[Piece], reason: str) -> None:
    found = gap(made)
    assert (found == "") == (reason == "")
    assert reason in found


def test_a_factor_is_told_and_what_it_leaves() -> None:
    want, other = drawn(40, 50), drawn(40, 50, seed=1)
    size = norm(sketch(want))
    assert factor(sketch(want), sketch(0.5 * want)) == pytest.approx(0.5)
    assert norm(sketch(0.5 * want) - 0.5 * sketch(want)) <= 1e-12 * size
    fitted = factor(sketch(want), sketch(other))
    assert norm(sketch(other) - fitted * sketch(want)) > 0.7 * float(other.norm())
    assert factor(sketch(want), sketch(want - other) + sketch(other)) == pytest.approx(1)
    assert math.isnan(factor(sketch(0 * want), sketch(want)))


def test_norms_are_estimated() -> None:
    want, other = drawn(200, 300), drawn(200, 300, seed=1)
    assert norm(sketch(want)) == pytest.approx(float(want.norm()), rel=0.2)
    assert combined([stats_of(want), stats_of(other)]).count == 2 * want.numel()
