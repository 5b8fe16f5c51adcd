"""Outputs of modules and their gradients: each rank shows a part of the batch, and perhaps a slice of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from shardproof.compare.infer import infer
from shardproof.compare.infer.placed import spelled
from shardproof.compare.layouts import in_order, slices, split_dim
from shardproof.compare.measure import (
    DROWNED,
    Outcome,
    Pair,
    by_rank,
    clear,
    drowned,
    judge,
    largest,
    products,
    scale,
    ulp,
    within,
    within_ratio,
)
from shardproof.compare.pending import settled
from shardproof.compare.stream import wide
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, Reference
from shardproof.trace.record import Record

LARGEST_DIVISOR = 1024
"""Of the simple fractions that a factor on activation gradients is tried as: counts of ranks and micro-batches."""

PARTIAL = "partial sums over tp"
"""Layout of an output whose TP peers only add up to the right value."""

PARTIAL_AND_BIAS = "partial sums over tp, each with a whole bias"
"""The same where every peer has added the bias: the sum is off by one vector, the same for every token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What the TP peers of one data rank showed in one call: tensors of one part of the batch."""

    data_rank: int
    microbatch: int
    call: int
    """Which call within the micro-batch."""
    ranks: tuple[int, ...]
    records: tuple[Record, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The best reading of a cell: how its tensors make up their part of the reference."""

    outcome: Outcome
    layout: str
    of_part: bool = True
    """Whether it was held against its own part of the batch, and not against the whole for lack of a dim to cut."""
    unit: float = 1.0
    """By how much its numbers, and so its error and its floor, are larger than the reference's."""


def compare(
    key: Key, observed: Observed, reference: Reference, factors: Mapping[tuple[int, int], float] | None = None
) -> Comparison:
    """One output (or output gradient) over all ranks and micro-batches.

    `factors` maps (step, micro-batch) to the one factor that all gradients of that backward pass may carry.
    """
    step, stage, name, part = key
    base = Comparison(step=step, stage=stage, name=name, part=part, verdict=Verdict.NOT_CHECKED)
    wholes = reference.tensors(key)
    shown = sum(1 for _ in observed.held(key))
    if not wholes or not shown:
        reason = "the reference has no such tensor" if shown else "this run shows no such tensor"
        return replace(base, reason=reason)
    calls = reference.calls(step, len(wholes))
    cells, problem = cells_of(key, observed, calls=calls)
    sizes = [scale(whole) for whole in wholes]
    base = replace(base, shape=tuple(wholes[0].shape), floor=max(reference.floor(key), ulp(wholes[0], sizes[0])))
    if problem:
        return replace(base, reason=problem)
    fits = []
    for cell in cells:
        factor = (factors or {}).get((step, cell.microbatch), 1.0)
        whole, place = _counterpart(cell, wholes, calls, observed, reference)
        fit = best_fit(cell, whole, base.floor * abs(factor), place, factor)
        if fit is None:
            got = ", ".join(sorted({str(tuple(t.shape)) for t in cell.tensors}))
            reason = f"{got} is no part of the reference's {tuple(whole.shape)} by samples or slices"
            return replace(base, reason=reason)
        fits.append(replace(fit, unit=abs(factor)))
    size = max(sizes)
    result = _merged(base, fits, size=size)
    unclear = [fit for fit in fits if not clear(fit.outcome.error, base.floor * fit.unit)]
    if unclear and not any(fit.of_part for fit in unclear) and ((vary := _vary(cells)) or stage == "backward"):
        # Gradients that parts of the batch send to one tensor, as to a loss computed inside the model, add up.
        together = _together(cells, wholes, base.floor, factors or {}, observed)
        if together is not None:
            return _merged(base, [together], size=size)
        if vary and result.verdict is Verdict.DIFFERENT:
            return replace(
                base, reason="a value of its own for each part of the batch, of which the whole has only one"
            )
    return result


def _vary(cells: list[Cell]) -> bool:
    """Whether parts of the batch show different values; where all are alike, the samples have no say in them."""
    first = cells[0].tensors[0]
    return any(
        cell.tensors[0].shape != first.shape or not torch.equal(cell.tensors[0], first)
        for cell in cells
        if cell.call == 0
    )


def _together(
    cells: list[Cell],
    wholes: list[Tensor],
    floor: float,
    factors: Mapping[tuple[int, int], float],
    observed: Observed,
) -> Fit | None:
    """The fit of all parts of the batch together: a mean over samples, or a sum such as a shared tensor's gradient."""
    shapes = {tuple(tensor.shape for tensor in cell.tensors) for cell in cells}
    if len(shapes) != 1 or len(wholes) != 1:
        return None
    step = cells[0].records[0].step
    parts = [observed.part(step, cell.data_rank, cell.microbatch) for cell in cells]
    for name, weights in (
        ("sums over the parts of the batch", [1 / factors.get((step, cell.microbatch), 1.0) for cell in cells]),
        ("means over the parts of the batch", [count / total for _, count, total in parts]),
    ):
        scaled = [[wide(t) * weight for t in cell.tensors] for cell, weight in zip(cells, weights, strict=True)]
        tensors = tuple(torch.stack(peers).sum(0) for peers in zip(*scaled, strict=True))
        for fit in _readings(replace(cells[0], tensors=tensors), wholes[0], floor):
            if fit.outcome.verdict is not Verdict.DIFFERENT:
                return replace(fit, layout=name)
    return None


def _merged(base: Comparison, fits: list[Fit], *, size: float) -> Comparison:
    """All cells together; `size` is the reference's largest element."""
    if not fits:
        return replace(base, reason="only filler parts of the batch ran here")
    outcomes = [fit.outcome for fit in fits]
    wrong = [fit for fit in fits if fit.outcome.verdict is Verdict.DIFFERENT]
    ratios = {outcome.outcome.ratio for outcome in wrong}
    # Gradients may be dp times the reference's, error and floor alike: the two are told in one unit. NaN comes last.
    furthest = max(fits, key=lambda fit: (fit.outcome.error != fit.outcome.error, fit.outcome.error / fit.unit))
    result = replace(
        base,
        verdict=_worst([outcome.verdict for outcome in outcomes]),
        error=furthest.outcome.error,
        floor=base.floor * furthest.unit,
        ranks=tuple(sorted({rank for fit in wrong for rank in fit.outcome.ranks})),
        ratio=ratios.pop() if len(ratios) == 1 else None,
        samples=wrong[0].outcome.samples if wrong else (),
        errors=by_rank(
            (rank, error / fit.unit * furthest.unit)
            for fit in fits
            for rank, error in enumerate(fit.outcome.errors)
            if error is not None
        ),
        layout=(wrong or fits)[0].layout,
    )
    if result.verdict is Verdict.DIFFERENT and drowned(result.error, result.floor, size * furthest.unit):
        return replace(result, verdict=Verdict.NOT_CHECKED, reason=DROWNED)
    if not size > 0 and result.verdict is not Verdict.DIFFERENT:
        return replace(result, verdict=Verdict.NOT_CHECKED, reason="all zero in the reference: a wrong scale is hidden")
    return result


def _worst(verdicts: list[Verdict]) -> Verdict:
    order = (Verdict.EQUAL, Verdict.ROUNDING, Verdict.DIFFERENT)
    return max(verdicts, key=order.index)


def cells_of(key: Key, observed: Observed, *, calls: int) -> tuple[list[Cell], str]:
    """The cells of a key, fillers left out; or why they cannot be told apart."""
    per_rank: dict[int, list[tuple[Record, Tensor]]] = {}
    for rank, record, tensor in observed.held(key):
        if tensor is not None:
            per_rank.setdefault(rank, []).append((record, tensor))
    for entries in per_rank.values():
        # Backward visits calls in reverse; the record knows which call it belongs to.
        entries.sort(key=lambda entry: entry[0].call)
    expected = observed.microbatches * calls
    odd = {rank: len(entries) for rank, entries in per_rank.items() if len(entries) != expected}
    if odd or len(per_rank) != observed.parallelism.world_size:
        rank, count = next(iter(odd.items()), (0, 0))
        return [], f"shown {count} times on rank {rank}, against {calls} per batch in the reference"
    cells = []
    for data_rank in range(observed.parallelism.dp):
        peers = observed.tp_peers(data_rank)
        for number in range(expected):
            microbatch, call = divmod(number, calls)
            if observed.part(key[0], data_rank, microbatch)[1] == 0:
                continue
            entries = [per_rank[rank][number] for rank in peers]
            cells.append(
                Cell(
                    data_rank=data_rank,
                    microbatch=microbatch,
                    call=call,
                    ranks=tuple(peers),
                    records=tuple(record for record, _ in entries),
                    tensors=tuple(tensor for _, tensor in entries),
                )
            )
    return cells, ""


def _counterpart(
    cell: Cell, wholes: list[Tensor], calls: int, observed: Observed, reference: Reference
) -> tuple[Tensor, tuple[int, int, int]]:
    """The reference's tensor for a cell, and which samples of it are the cell's (as `Observed.part`)."""
    step = cell.records[0].step
    fed = reference.part(step, cell.data_rank, cell.microbatch)
    if fed is not None:
        return wholes[fed * calls + cell.call], (0, 1, 1)
    return wholes[cell.call], observed.part(step, cell.data_rank, cell.microbatch)


def best_fit(cell: Cell, whole: Tensor, floor: float, part: tuple[int, int, int], factor: float = 1.0) -> Fit | None:
    """The reading of a cell that fits its values; the closest one where none does; None where no shape fits.

    The cell is held against `factor` times its part of the whole; `floor` is that of the product.
    """
    closest: Fit | None = None
    for own in parts_of(whole, part):
        expected = own if factor == 1.0 else wide(own) * factor
        for reading in _readings(cell, expected, floor):
            fit = replace(reading, of_part=part[1] == part[2] or expected.shape != whole.shape)
            if clear(fit.outcome.error, floor):
                return fit
            # Written so that NaN gives way to any number.
            if closest is None or not closest.outcome.error <= fit.outcome.error:
                closest = fit
    return closest


def parts_of(whole: Tensor, part: tuple[int, int, int]) -> Iterator[Tensor]:
    """The part of a batch's tensor that belongs to some of its samples: along dim 0, or whichever dim fits.

    Last the whole, for an output that does not depend on the samples (a position embedding).
    """
    start, count, total = part
    for dim in range(whole.dim()):
        each, rest = divmod(whole.shape[dim], total)
        if not rest and each and count < total:
            yield whole.narrow(dim, start * each, count * each)
    yield whole


def _readings(cell: Cell, expected: Tensor, floor: float) -> Iterator[Fit]:
    """Ways in which the peers' tensors can make up `expected`, the simplest first."""
    tensors = list(cell.tensors)
    if any(record.piece is not None for record in cell.records):
        yield from _declared(cell, expected, floor)
        return
    if all(tensor.shape == expected.shape for tensor in tensors):
        apart = _judge(cell, tensors, [expected] * len(tensors), floor)
        if len(tensors) == 1:
            yield Fit(outcome=apart, layout="replicated")
            return
        if apart.verdict is not Verdict.DIFFERENT:
            yield Fit(outcome=apart, layout="replicated")
        # Who asked for one reading only has it by now, without a sum.
        total = torch.stack([wide(tensor) for tensor in tensors]).sum(0)
        if apart.verdict is Verdict.DIFFERENT:
            biased = _one_vector(total - wide(expected), floor * len(tensors))
            yield Fit(outcome=apart, layout=PARTIAL_AND_BIAS if biased else "replicated")
        together = _judge(cell, [total] * len(tensors), [expected] * len(tensors), floor)
        if together.verdict is not Verdict.DIFFERENT:
            yield Fit(outcome=together, layout=PARTIAL)
        return
    dim = split_dim(tensors, tuple(expected.shape))
    if dim is None:
        yield from _by_values(cell, expected, floor)
        return
    yield Fit(outcome=_judge(cell, tensors, in_order(tensors, expected, dim), floor), layout=f"tp: slices of dim {dim}")
    order = slices(tensors, expected, dim, floor)
    if order is not None:
        other = [expected.index_select(dim, index) for index in order]
        yield Fit(outcome=_judge(cell, tensors, other, floor), layout=f"tp: {spelled(order, dim)}")


def _by_values(cell: Cell, expected: Tensor, floor: float) -> Iterator[Fit]:
    """Pieces whose lengths alone add up to nothing: blocks of which several peers hold the same part."""
    found = infer(dict(enumerate(cell.tensors)), expected, floor)
    if found.fits and found.dim is not None and not found.sums:
        wants = [found.take(peer, expected) for peer in range(len(cell.tensors))]
        order = [found.cuts[0].index[peer] for peer in range(len(cell.tensors))]
        layout = f"tp: {spelled(order, found.dim)}"
        yield Fit(outcome=_judge(cell, list(cell.tensors), wants, floor), layout=layout)


def _one_vector(extra: Tensor, floor: float) -> bool:
    """Whether `extra` is one and the same vector for every token, and not zero."""
    rows = extra.reshape(-1, extra.shape[-1]) if extra.dim() > 1 else extra.new_empty(0, 1)
    if len(rows) < 2 or within(largest(rows.abs()), floor):
        return False
    return within(largest((rows - rows[0]).abs()), floor)


def _declared(cell: Cell, expected: Tensor, floor: float) -> Iterator[Fit]:
    """DTensors say themselves where their pieces lie."""
    pieces = {rank: record.piece for rank, record in zip(cell.ranks, cell.records, strict=True)}
    tensors = settled(dict(zip(cell.ranks, cell.tensors, strict=True)), pieces)
    got, want = [], []
    for rank, piece in pieces.items():
        if piece is None or piece.whole != tuple(expected.shape):
            return
        got.append(tensors[rank])
        want.append(piece.take(expected))
    yield Fit(outcome=_judge(cell, got, want, floor), layout="declared by DTensor")


def _judge(cell: Cell, got: list[Tensor], want: list[Tensor], floor: float) -> Outcome:
    return judge([Pair(rank=r, got=g, want=w) for r, g, w in zip(cell.ranks, got, want, strict=True)], floor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """What one rank showed in one call, and which elements of any tensor of its part of the batch are in its place."""

    cell: Cell
    rank: int
    got: Tensor
    """In float64."""
    part: Tensor
    """The reference's tensor for the cell's part of the batch, in float64."""
    take: Callable[[Tensor], Tensor]
    """This rank's elements of a tensor shaped like `part`."""
    dim: int | None = None
    """Along which the peers hold slices; None where each holds all of it."""
    place: tuple[int, int, int] = (0, 1, 1)
    """Which samples of the whole batch these are, as `Observed.part`."""

    def same_part(self, whole: Tensor) -> Tensor | None:
        """The same samples of another tensor of the whole batch; None where that is not shaped alike."""
        return next((wide(p) for p in parts_of(whole, self.place) if p.shape == self.part.shape), None)

    @property
    def want(self) -> Tensor:
        """What the rank should hold."""
        return self.take(self.part)


def aligned(key: Key, observed: Observed, reference: Reference) -> list[Aligned]:
    """Every rank's output beside the reference's, as shapes alone say that they lie; empty where they do not say it."""
    wholes = reference.tensors(key)
    calls = reference.calls(key[0], len(wholes))
    cells, problem = cells_of(key, observed, calls=max(calls, 1))
    if problem or not wholes:
        return []
    found: list[Aligned] = []
    for cell in cells:
        whole, place = _counterpart(cell, wholes, calls, observed, reference)
        own = next((made for part in parts_of(whole, place) if (made := _aligned(cell, wide(part)))), None)
        if own is None:
            return []
        found += [replace(one, place=place) for one in own]
    return found


def _aligned(cell: Cell, part: Tensor) -> list[Aligned] | None:
    tensors = list(cell.tensors)
    pieces = {rank: record.piece for rank, record in zip(cell.ranks, cell.records, strict=True)}
    if any(piece is not None for piece in pieces.values()):
        done = settled(dict(zip(cell.ranks, tensors, strict=True)), pieces)
        if any(piece is None or piece.whole != tuple(part.shape) for piece in pieces.values()):
            return None
        return [
            Aligned(cell=cell, rank=rank, got=wide(done[rank]), part=part, take=piece.take)
            for rank, piece in pieces.items()
            if piece is not None
        ]
    if all(tensor.shape == part.shape for tensor in tensors):
        return [
            Aligned(cell=cell, rank=rank, got=wide(tensor), part=part, take=lambda whole: whole)
            for rank, tensor in zip(cell.ranks, tensors, strict=True)
        ]
    dim = split_dim(tensors, tuple(part.shape))
    if dim is None:
        return None
    return [
        Aligned(
            cell=cell,
            rank=rank,
            got=wide(tensor),
            part=part,
            take=partial(_slice, tensors, dim, number),
            dim=dim,
        )
        for number, (rank, tensor) in enumerate(zip(cell.ranks, tensors, strict=True))
    ]


def _slice(tensors: list[Tensor], dim: int, number: int, whole: Tensor) -> Tensor:
    return in_order(tensors, whole, dim)[number]


def backward_factors(keys: list[Key], observed: Observed, reference: Reference) -> dict[tuple[int, int], float]:
    """(step, micro-batch) -> the factor that its activation gradients carry against the reference.

    DDP's local mean is the reference's times the number of data ranks, and a user may divide at any point. The first
    output gradient, in the order of the backward pass, that is a constant multiple of the reference tells.
    """
    factors: dict[tuple[int, int], float] = {}
    for key in keys:
        wholes = reference.tensors(key)
        calls = reference.calls(key[0], len(wholes))
        cells, problem = cells_of(key, observed, calls=max(calls, 1))
        if problem or not wholes:
            continue
        for cell in cells:
            if (key[0], cell.microbatch) in factors:
                continue
            whole, place = _counterpart(cell, wholes, calls, observed, reference)
            factor = _factor(cell, whole, reference.floor(key), place)
            if factor is not None:
                factors[key[0], cell.microbatch] = factor
    return factors


def _factor(cell: Cell, whole: Tensor, floor: float, part: tuple[int, int, int]) -> float | None:
    for expected in parts_of(whole, part):
        if part[1] < part[2] and expected.shape == whole.shape:
            # Of a tensor that all samples share a part of the batch gets its share only: no factor of the others.
            continue
        floor = max(floor, ulp(whole))
        got = cell.tensors[0]
        if got.shape != expected.shape or cell.records[0].piece is not None:
            continue
        pair = Pair(rank=cell.ranks[0], got=got, want=expected)
        together, square = products([pair])
        if not square > 0 or not math.isfinite(together / square):
            continue
        fitted = together / square
        # Factors are made of counts. A fitted one carries the rounding of a long sum, the simple one near it does not.
        for factor in (float(Fraction(fitted).limit_denominator(LARGEST_DIVISOR)), fitted):
            if factor and within_ratio(pair, factor, floor * abs(factor)):
                return factor
    return None
