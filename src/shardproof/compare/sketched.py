"""Verdicts from sketches and statistics alone: two runs held together without any of their values.

Either side may be laid out over many ranks. What a side shows of a tensor is first made one whole: distinct pieces add
up, replicas must agree, what is pending is carried out, parts of the batch add up where signs follow samples. The two
wholes are then held against each other, by sketch where both have one, else by statistics. All errors and floors here
are 2-norms of the whole tensor, in its own unit. Nothing is ever `equal`: 256 numbers cannot tell bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardproof.compare.fitted import factor as fit_factor
from shardproof.compare.measure import DROWNED, drowned, within
from shardproof.compare.parameters import ZERO_HIDES
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key
from shardproof.compare.wholes import (
    OF_BATCH,
    PARTIAL,
    ROUNDING,
    SLICES,
    STATS_ROUNDING,
    WIDE_ROUNDING,
    Read,
    Whole,
    ranks_of,
    read,
)
from shardproof.compare.wholes import Shown as Shown
from shardproof.compare.wholes import Side as Side
from shardproof.parallel.piece import Piece
from shardproof.trace.sketch import SIDE, norm
from shardproof.trace.stats import Stats

BY_SKETCH, BY_STATISTICS = "by sketch", "by statistics"

WORSE = (Verdict.EQUAL, Verdict.ROUNDING, Verdict.NOT_CHECKED, Verdict.DIFFERENT)
"""Of several results the last of these counts."""


def compare(key: Key, want: Side, got: Side, *, floor: float, factor: float = 1.0) -> Comparison:
    """One tensor of a run against the reference's.

    `floor` is how far rounding alone moves the whole tensor, as a 2-norm. `factor` is what the run's tensor may carry
    rightly (a gradient of an output that is divided later).
    """
    step, stage, name, part = key
    base = Comparison(step=step, stage=stage, name=name, part=part, verdict=Verdict.NOT_CHECKED, floor=floor)
    if not want.shown or not got.shown:
        reason = "the reference has no such tensor" if got.shown else "this run shows no such tensor"
        return replace(base, reason=reason)
    if all(one.record.missing for one in want.shown):
        return _nothing_expected(base, [one for one in got.shown if not one.record.missing])
    if all(one.record.missing for one in got.shown):
        return _nothing_shown(base, want, got)
    want, got = _recast(want, got), _recast(got, want)
    misfit = _misfit(want, got)
    if misfit:
        return replace(base, verdict=Verdict.DIFFERENT, error=math.inf, reason=misfit, ranks=ranks_of(got.shown))
    calls = [_calls(side) for side in (want, got)]
    if stage in OF_BATCH and calls[0] == calls[1] > 1:
        results = [
            _compared(base, _of_call(want, call, calls[0]), _of_call(got, call, calls[0]), floor=floor, factor=factor)
            for call in range(calls[0])
        ]
        return max(results, key=lambda result: WORSE.index(result.verdict))
    return _compared(base, want, got, floor=floor, factor=factor)


def _compared(base: Comparison, want: Side, got: Side, *, floor: float, factor: float) -> Comparison:
    """One tensor of which both sides show something."""
    wants, gots = read(want), read(got)
    for side, where in ((wants, "the reference"), (gots, "this run")):
        if side.reason:
            return replace(base, reason=f"in {where}: {side.reason}")
    expected, ways = _counterparts(wants, gots)
    if expected is None:
        counts = [min(whole.elements for whole in side.wholes) for side in (gots, wants)]
        return replace(base, reason=f"{counts[0]} elements against {counts[1]} in the reference")
    if sum(whole.layout == expected.layout for whole in wants.wholes) > 1:
        return replace(base, reason="in the reference: replicas differ from each other")
    base = replace(base, shape=expected.shape or ways[0].shape or want.shown[0].shape)
    by_sketch = [way for way in ways if way.sketch is not None and way.by_sample == expected.by_sample]
    if expected.sketch is not None and by_sketch:
        found = _by_sketch(base, expected, by_sketch, floor=floor, factor=factor)
    elif expected.stats is not None and any(way.stats is not None for way in ways):
        found = _by_statistics(base, expected, ways, floor=floor, factor=factor)
        if found.verdict is Verdict.DIFFERENT and gots.apart and not math.isnan(found.error):
            reason = "tensor-parallel peers differ: statistics do not tell partial sums from wrong values"
            return replace(found, verdict=Verdict.NOT_CHECKED, reason=reason, ranks=(), ratio=None)
    else:
        return replace(base, reason="the two sides keep no sketches of one kind, and not both of them statistics")
    lost = {one.rank for one in got.shown if one.record.missing} & set(found.ranks)
    if lost:
        return replace(found, ranks=tuple(sorted(lost)), reason="no gradient where the reference has one")
    return found


def _counterparts(wants: Read, gots: Read) -> tuple[Whole | None, list[Whole]]:
    """What the run is held against, and the ways of reading the run that have as many elements."""
    # Peers of the reference that differ hold partial sums, if anything that adds up.
    candidates = sorted(wants.wholes, key=lambda whole: wants.apart and whole.layout != PARTIAL)
    for whole in candidates:
        ways = [way for way in gots.wholes if way.elements == whole.elements]
        if ways:
            return whole, ways
    return None, []


def _calls(side: Side) -> int:
    """How often a module was called on each micro-batch; 0 where that is no whole number, or not one for all ranks."""
    times = Counter(one.rank for one in side.shown if not one.record.missing)
    found = {divmod(count, side.microbatches) for count in times.values()}
    calls, rest = found.pop() if len(found) == 1 else (0, 0)
    return 0 if rest else calls


def _of_call(side: Side, call: int, calls: int) -> Side:
    """What a side shows of one of several calls of a module on each micro-batch."""
    seen: Counter[int] = Counter()
    chosen = []
    for one in sorted(side.shown, key=lambda one: one.record.call):
        if not one.record.missing:
            if seen[one.rank] % calls == call:
                chosen.append(one)
            seen[one.rank] += 1
    return replace(side, shown=chosen)


# Two wholes.


def _by_sketch(base: Comparison, want: Whole, ways: list[Whole], *, floor: float, factor: float) -> Comparison:
    """Every replica must be right; or else the sum of all tensor-parallel peers."""
    expected = (want.sketch if want.sketch is not None else torch.zeros(SIDE, SIDE)) * factor
    size = norm(expected)
    if not math.isfinite(size):
        return _not_finite(base, want, ways)
    # The numbers themselves were rounded in both runs, and a sum of large terms as much as these.
    sizes = [size, *(way.largest for way in ways), *(norm(way.sketch) for way in ways if way.sketch is not None)]
    rounded = max(want.eps, *(way.eps for way in ways)) * max(filter(math.isfinite, sizes))
    limit = max(floor * abs(factor), ROUNDING * rounded)
    found = _errors(want, expected, ways, factor=factor, limit=limit)
    apart = [(error, way) for error, way in found if way.layout != PARTIAL]
    partial = [(error, way) for error, way in found if way.layout == PARTIAL]
    wrong = [(error, way) for error, way in apart if not within(error, limit)]
    if partial and (wrong or not apart) and within(partial[0][0], limit):
        wrong, apart = [], partial
    error = max((error for error, _ in apart or partial), key=_nan_last)
    layout = f"{(apart or partial)[0][1].layout}, {BY_SKETCH}"
    result = replace(base, verdict=Verdict.ROUNDING, error=error, floor=limit, layout=layout)
    if wrong:
        bad = [way for _, way in wrong]
        right = {rank for _, way in apart if all(way is not other for other in bad) for rank in way.ranks}
        ranks = {rank for way in bad for rank in _wrong_ranks(want, way, factor, limit)}
        ratio = _ratio(expected, bad, limit)
        result = replace(result, verdict=Verdict.DIFFERENT, ranks=tuple(sorted(ranks - right or ranks)), ratio=ratio)
    return _weighed(result, size, zero=size == 0)


def _errors(
    want: Whole, expected: Tensor, ways: list[Whole], *, factor: float, limit: float
) -> list[tuple[float, Whole]]:
    """How far each way of reading the run is off: its sum, and, where replicas differ, any of its pieces too, as two
    wrong ones may cancel each other in the sum."""
    found = [(norm(way.sketch - expected), way) for way in ways if way.sketch is not None]
    if len(ways) == 1 or not all(way.parts for way in ways):
        return found
    right = {piece: sketch * factor for piece, sketch in want.parts.items()}
    if not set(ways[0].parts) <= set(right):
        # No partner for single pieces: what most ranks hold, of what fits in sum.
        _, best = min(found, key=lambda one: (not within(one[0], limit), -len(one[1].ranks)))
        right = dict(best.parts)
    return [
        (max([error, *(norm(sketch - right[piece]) for piece, sketch in way.parts.items())], key=_nan_last), way)
        for error, way in found
    ]


def _nan_last(value: float) -> tuple[bool, float]:
    """NaN compares with nothing: it is the furthest of all."""
    return value != value, value


def _wrong_ranks(want: Whole, way: Whole, factor: float, floor: float) -> set[int]:
    """Whose pieces are wrong, where the reference is cut into the same ones; else all that the whole is made of."""
    ranks = set(way.ranks)
    if not way.parts or not set(way.parts) <= set(want.parts):
        return ranks
    wrong = {
        piece for piece, sketch in way.parts.items() if not within(norm(sketch - factor * want.parts[piece]), floor)
    }
    return {rank for rank in ranks if way.places[rank] in wrong} or ranks


def _ratio(want: Tensor, wrong: list[Whole], floor: float) -> float | None:
    """got / want where it is one number for all that is wrong, not 1 and not 0; as `measure.constant_ratio`."""
    size = norm(want)
    sketches = [way.sketch for way in wrong if way.sketch is not None]
    ratios = [fit_factor(want, sketch) for sketch in sketches]
    for ratio, sketch in zip(ratios, sketches, strict=True):
        allowed = floor * max(1.0, abs(ratio))
        fits = within(norm(sketch - ratio * want), allowed) and within(abs(ratio - ratios[0]) * size, allowed)
        if not fits or within(abs(ratio - 1) * size, floor) or within(abs(ratio) * size, floor):
            return None
    return ratios[0] if ratios else None


def _by_statistics(base: Comparison, expected: Whole, ways: list[Whole], *, floor: float, factor: float) -> Comparison:
    """Norms, sums, counts and extremes: they cannot tell where a value stands, nor a sign where sums cancel."""
    results = [
        _one_by_statistics(base, expected, way, floor=floor, factor=factor) for way in ways if way.stats is not None
    ]
    # Replicas must all be right; what may be slices instead must only be right in that way.
    slices = [one for one in results if one.layout.startswith(SLICES)]
    replicas = [one for one in results if one not in slices]
    worst = [max(some, key=lambda one: WORSE.index(one.verdict)) for some in (replicas, slices) if some]
    result = min(worst, key=lambda one: WORSE.index(one.verdict))
    wrong = [one for one in results if one.verdict is Verdict.DIFFERENT]
    if result.verdict is Verdict.DIFFERENT:
        result = replace(result, ranks=tuple(sorted({rank for one in wrong for rank in one.ranks})))
    return result


def _one_by_statistics(base: Comparison, expected: Whole, whole: Whole, *, floor: float, factor: float) -> Comparison:
    want, got = expected.stats or Stats(), whole.stats or Stats()
    base = replace(base, layout=f"{whole.layout}, {BY_STATISTICS}")
    if want.nans:
        return replace(base, reason="NaN in the reference")
    size = want.norm * abs(factor)
    limits = _limits(want, size, floor=floor * abs(factor), wide=expected.wide and whole.wide)
    root = math.sqrt(max(want.count, 1))
    should = {
        "2-norm": size,
        "sum": want.sum * factor / root,
        "minimum": min(want.min * factor, want.max * factor),
        "maximum": max(want.min * factor, want.max * factor),
    }
    have = {"2-norm": got.norm, "sum": got.sum / root, "minimum": got.min, "maximum": got.max}
    errors = {what: abs(have[what] - should[what]) for what in should}
    odd = [
        what for what, name in (("NaN", "nans"), ("infinities", "infs")) if getattr(got, name) != getattr(want, name)
    ]
    wrong = [what for what in errors if not within(errors[what], limits[what])]
    worst = max(wrong or errors, key=lambda what: _nan_last(errors[what]))
    error = math.nan if odd else errors[worst]
    result = replace(base, error=error, floor=limits[worst], verdict=Verdict.ROUNDING)
    if odd or wrong:
        ratio = got.norm / size if size > 0 and not odd else math.nan
        fits = all(within(abs(have[what] - ratio * should[what]), limits[what] * max(1.0, ratio)) for what in should)
        result = replace(
            result,
            verdict=Verdict.DIFFERENT,
            ranks=tuple(sorted(set(whole.ranks))),
            reason=f"statistics differ: {' and '.join(odd) or worst}",
            ratio=ratio if fits and ratio > 0 and not within(abs(ratio - 1) * size, limits["2-norm"]) else None,
        )
    return _weighed(result, size, zero=not want.absmax)


def _limits(want: Stats, size: float, *, floor: float, wide: bool) -> dict[str, float]:
    """How far rounding moves each: a difference whose 2-norm is d moves a norm by d at most, an extreme too, and a sum
    by sqrt(n) d; and the statistics themselves were rounded."""
    summed = max(floor, (WIDE_ROUNDING if wide else STATS_ROUNDING) * size)
    extreme = max(floor, torch.finfo(torch.float64 if wide else torch.float32).eps * want.absmax)
    return {"2-norm": summed, "sum": summed, "minimum": extreme, "maximum": extreme}


def _weighed(result: Comparison, size: float, *, zero: bool) -> Comparison:
    """A verdict that says nothing, where rounding or zeros leave nothing to compare, becomes none."""
    different = result.verdict is Verdict.DIFFERENT
    if different and drowned(result.error, result.floor, size):
        return replace(result, verdict=Verdict.NOT_CHECKED, reason=DROWNED)
    if not different and zero and result.stage in ZERO_HIDES | OF_BATCH:
        return replace(result, verdict=Verdict.NOT_CHECKED, reason="all zero in the reference: a wrong scale is hidden")
    return result


def _not_finite(base: Comparison, want: Whole, ways: list[Whole]) -> Comparison:
    """The reference itself is not finite, so that its sketch is no number. Where it is infinite and this run is not,
    or holds NaN, statistics can say so."""
    told = [(way, way.stats) for way in ways if way.stats is not None]
    for way, stats in told:
        if want.stats is not None and not want.stats.nans and (stats.nans, stats.infs) != (0, want.stats.infs):
            found = f"{stats.nans} NaN and {stats.infs} infinities against {want.stats.infs} infinities"
            ranks = tuple(sorted(set(way.ranks)))
            return replace(base, verdict=Verdict.DIFFERENT, error=math.nan, ranks=ranks, reason=found)
    return replace(base, reason="NaN or infinities in the reference, which leave no number in its sketch")


# What is not there.


def _nothing_expected(base: Comparison, got: Sequence[Shown]) -> Comparison:
    """The reference has no gradient here: zeros are as good as none."""
    sizes = {one.rank: _shown_size(one) for one in got}
    wrong = tuple(sorted(rank for rank, size in sizes.items() if size is not None and size != 0))
    if wrong:
        error = max((size for size in sizes.values() if size is not None), key=_nan_last)
        reason = "a gradient where the reference has none"
        return replace(base, verdict=Verdict.DIFFERENT, error=error, ranks=wrong, reason=reason)
    return replace(base, reason="no gradient in the reference")


def _nothing_shown(base: Comparison, want: Side, got: Side) -> Comparison:
    size = max((_shown_size(one) or 0.0 for one in want.shown if not one.record.missing), default=0.0)
    if size == 0:
        return replace(base, reason="all zero in the reference, or nothing kept of it, and none in this run")
    reason = "no gradient where the reference has one" if base.stage != "checkpoint" else "lost between two steps"
    return replace(base, verdict=Verdict.DIFFERENT, error=size, ranks=ranks_of(got.shown), reason=reason)


def _shown_size(shown: Shown) -> float | None:
    if shown.sketch is not None:
        return norm(shown.sketch)
    return None if shown.stats is None else (math.nan if shown.stats.nans else shown.stats.norm)


def _recast(side: Side, other: Side) -> Side:
    """The side with plain pieces that nobody declared as parts of the other side's whole, where their sizes say so."""
    wholes = [{one.record.piece.whole for one in some.shown if one.record.piece is not None} for some in (side, other)]
    declared = any(one.record.piece is None or one.record.piece.declared for one in side.shown)
    if declared or len(wholes[1]) != 1 or wholes[0] == wholes[1]:
        return side
    (whole,) = wholes[1]
    counts = {math.prod(one.shape) for one in side.shown if not one.record.missing}
    if len(counts) != 1 or counts.pop() * side.parallelism.tp != math.prod(whole):
        return side
    shown = [
        replace(
            one,
            record=replace(
                one.record, piece=Piece(whole=whole, offset=(0,) * len(whole), shape=one.shape, declared=False)
            ),
        )
        for one in side.shown
    ]
    return replace(side, shown=shown)


def _misfit(want: Side, got: Side) -> str:
    """What is wrong with the shapes, where both sides know the shape of the whole."""
    if want.shown[0].record.stage in OF_BATCH:
        return ""
    shapes = [{one.record.piece.whole for one in side.shown if one.record.piece is not None} for side in (want, got)]
    other = shapes[1] - shapes[0]
    return f"shape {min(other)} against {min(shapes[0])} in the reference" if shapes[0] and other else ""
