"""What all ranks of a run show of one tensor in sketches and statistics, made one whole.

Distinct pieces add up, replicas are several ways to take them, what is pending is carried out, and parts of the batch
add up where signs follow samples. Where the shapes leave it open what tensor-parallel peers hold, every way of taking
it is given: the reference then decides (`compare.sketched`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from shardproof.compare.parameters import is_by_hand
from shardproof.compare.pending import settled
from shardproof.compare.tiling import gap, place
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.record import Record
from shardproof.trace.sketch import SIDE, norm
from shardproof.trace.stats import Stats, combined

ROUNDING = 4.0
"""Units in the last place of float32 by which a sketch of any size is off through its own rounding, of its norm: at
most 3.0 in tensors from 20 to 2**24 elements."""

STATS_ROUNDING = 1e-5
"""Share of a norm by which sums of float32 and less are off through their own rounding (`trace.stats.stats_of`)."""

WIDE_ROUNDING = 1e-12
"""The same of float64 and of whole numbers."""

REPLICATED, PARTIAL, SLICES = "replicated", "partial sums over tp", "tp: slices"
"""Layouts of what tensor-parallel peers show."""

NOTHING_KEPT = "no sketches and no statistics of all ranks were kept"

OF_BATCH = frozenset({"batch", "forward", "loss", "backward"})
"""Stages in which each data rank shows its own samples."""

ADDS_UP = frozenset({"sum", "avg"})
"""Pending reductions that are linear, so that sketches can carry them out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a rank's trace holds of one record."""

    rank: int
    record: Record
    shape: tuple[int, ...]
    """Of the tensor that the rank held."""
    dtype: torch.dtype
    sketch: Tensor | None = None
    stats: Stats | None = None
    by_sample: bool = False
    """Whether the signs of the sketch follow samples (`sketch(..., samples=...)`)."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What all ranks of one run show of a key, and how that run is laid out."""

    shown: Sequence[Shown]
    parallelism: Parallelism = field(default_factory=Parallelism)
    microbatches: int = 1

    @cached_property
    def read(self) -> Read:
        """As one whole."""
        return _read(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """One way in which what a side shows is one whole."""

    layout: str
    elements: int
    """Of the whole, or of all samples of the batch."""
    ranks: tuple[int, ...]
    """Whose numbers these are."""
    sketch: Tensor | None = None
    """In float64; None where it takes sketches that are not there."""
    stats: Stats | None = None
    by_sample: bool = False
    eps: float = 0.0
    """Of the dtype that the sketches are kept in."""
    shape: tuple[int, ...] = ()
    """Of the whole, where pieces tell it."""
    places: Mapping[int, Piece] = field(default_factory=dict)
    """Rank -> where its piece lies."""
    parts: Mapping[Piece, Tensor] = field(default_factory=dict)
    """The sketch of every piece."""
    wide: bool = False
    """Whether the tensors were float64 or whole numbers, whose statistics are summed in float64."""
    largest: float = 0.0
    """The norm of the largest sketch that was added up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """All ways in which a side is one whole, the likeliest first; or why there is none."""

    wholes: tuple[Whole, ...] = ()
    reason: str = ""
    apart: bool = False
    """Whether tensor-parallel peers of plain tensors show different values: partial sums, slices, or wrong ones."""


def read(side: Side) -> Read:
    """What a side shows as one whole."""
    return side.read


def _read(side: Side) -> Read:
    if side.shown[0].record.stage in OF_BATCH:
        return _activations(side)
    # What stands for a parameter is shown once a rank, and lies in one whole over all of them.
    placed = [one for one in side.shown if one.record.piece is not None]
    if len(placed) != len(side.shown):
        return Read(reason="its shape is not its parameter's, so that its place in the whole is not known")
    if len({one.rank for one in placed}) != len(placed):
        return Read(reason="a rank shows it more than once")
    if any(is_by_hand(one.record.piece) for one in placed if one.record.piece is not None):
        return _by_hand(side)
    return _pieces(placed)


def _pieces(shown: Sequence[Shown]) -> Read:
    """Pieces whose place is known: distinct ones add up, and replicas are other ways to take them."""
    pieces = {one.rank: one.record.piece for one in shown if one.record.piece is not None}
    if len({piece.whole for piece in pieces.values()}) > 1:
        return Read(reason="ranks do not agree on the shape of the whole")
    problem = gap(pieces.values())
    if problem:
        return Read(reason=problem)
    owed = [owing for piece in pieces.values() for owing in piece.pending]
    odd = {operation for operation, _ in owed} - ADDS_UP
    lacking = {peer for _, group in owed for peer in group} - set(pieces)
    if odd or lacking:
        what = f"a pending {', '.join(sorted(odd))}" if odd else f"a pending sum over rank {min(lacking)}, not shown,"
        return Read(reason=f"{what} cannot be carried out on sketches")
    # A rank that has nothing where it could have something has zeros.
    held = [_zeros(one, pieces[one.rank]) if one.record.missing else one for one in shown]
    held = [one for one in held if math.prod(one.shape)] or held[:1]
    rows = _stacked(held)
    if owed and rows is not None:
        sketches = dict(zip((one.rank for one in held), rows.unbind(0), strict=True))
        done = settled(sketches, {rank: pieces[rank] for rank in sketches})
        rows = torch.stack([done[one.rank] for one in held])
    stats = [one.stats for one in held if one.stats is not None]
    if owed or len(stats) < len(held):
        stats = []
    if rows is None and not stats:
        return Read(reason="partial sums of which only statistics were kept" if owed else NOTHING_KEPT)
    return Read(wholes=tuple(_ways(held, rows, stats)))


def _stacked(shown: Sequence[Shown]) -> Tensor | None:
    """All sketches in float64, shape (sketches, 16, 16); None where one is missing."""
    sketches = [one.sketch for one in shown if one.sketch is not None]
    if len(sketches) < len(shown):
        return None
    if len({sketch.dtype for sketch in sketches}) > 1:
        sketches = [sketch.to(torch.float64) for sketch in sketches]
    return torch.stack(sketches).to(torch.float64)


def _zeros(shown: Shown, piece: Piece) -> Shown:
    count = math.prod(piece.local_shape)
    zeros = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    return replace(shown, shape=piece.local_shape, sketch=zeros, stats=Stats(count=count, zeros=count))


def _ways(held: Sequence[Shown], rows: Tensor | None, stats: Sequence[Stats]) -> list[Whole]:
    """The wholes that the first holders of every piece make, the second ones, and so on, as far as they differ.

    `rows` and `stats` are those of `held`, in its order.
    """
    places = {one.rank: place(one.record.piece) for one in held if one.record.piece is not None}
    holders: dict[Piece, list[int]] = {}
    for number, piece in enumerate(places.values()):
        holders.setdefault(piece, []).append(number)
    whole = next(iter(holders)).whole
    eps, wide = _eps(held), _wide(held)
    ways: list[tuple[Whole, Tensor | None]] = []
    for turn in range(max(map(len, holders.values()))):
        chosen = [numbers[min(turn, len(numbers) - 1)] for numbers in holders.values()]
        ranks = tuple(held[number].rank for number in chosen)
        stacked = None if rows is None else rows[chosen] if len(chosen) < len(held) else rows
        total = combined(stats[number] for number in chosen) if stats else None
        # Two pieces may be wrong by opposite amounts: each must be the same.
        alike = next(
            (
                at
                for at, (way, parts) in enumerate(ways)
                if (close(way.stats, total) if parts is None or stacked is None else _all_same(parts, stacked, eps))
            ),
            None,
        )
        if alike is not None:
            way, parts = ways[alike]
            ways[alike] = replace(way, ranks=(*way.ranks, *ranks)), parts
            continue
        made = Whole(
            layout="pieces added up" if len(holders) > 1 else REPLICATED,
            elements=math.prod(whole),
            ranks=ranks,
            sketch=None if stacked is None else stacked.sum(0),
            stats=total,
            eps=eps,
            wide=wide,
            shape=whole,
            places=places,
            parts={} if stacked is None else dict(zip(holders, stacked.unbind(0), strict=True)),
            largest=0.0 if stacked is None else float(_finite_norms(stacked).max()),
        )
        ways.append((made, stacked))
    return [way for way, _ in ways]


def _finite_norms(stacked: Tensor) -> Tensor:
    """The norms of some sketches, shape (sketches, 16, 16); 0 where one is not finite."""
    norms = _norms(stacked)
    return torch.where(norms.isfinite(), norms, 0.0)


def _norms(stacked: Tensor) -> Tensor:
    return stacked.square().mean((-2, -1)).sqrt()


def _all_same(first: Tensor, second: Tensor, eps: float) -> bool:
    """Whether the sketches of two stacks are `_same`, each as its partner."""
    if torch.equal(first, second):
        return True
    exact = (first.nan_to_num() == second.nan_to_num()).all(-1).all(-1)
    return bool((exact | (_norms(first - second) <= 2 * ROUNDING * eps * _norms(first))).all())


def _by_hand(side: Side) -> Read:
    """Plain tensors smaller than the whole: where they lie, sketches were not told; their statistics need no place."""
    tp = side.parallelism.tp
    shown = {one.rank: one for one in side.shown}
    wholes: dict[Stats, Whole] = {}
    for first in range(0, side.parallelism.world_size, tp):
        peers = [shown[rank] for rank in range(first, first + tp) if rank in shown]
        known = [one.stats for one in peers if one.stats is not None]
        piece = peers[0].record.piece if peers else None
        if len(known) < tp or piece is None or sum(part.count for part in known) != math.prod(piece.whole):
            return Read(reason="pieces of a split that nobody declared: where they lie, only values can tell")
        stats, ranks = combined(known), ranks_of(peers)
        before = wholes[stats].ranks if stats in wholes else ()
        wholes[stats] = Whole(
            layout=SLICES,
            elements=stats.count,
            ranks=(*before, *ranks),
            stats=stats,
            shape=piece.whole,
            wide=_wide(peers),
        )
    return Read(wholes=tuple(wholes.values()))


def _activations(side: Side) -> Read:
    """What modules show: parts of a batch over data ranks and micro-batches, of each the replicas, slices or partial
    sums of tensor-parallel peers."""
    per_rank: dict[int, list[Shown]] = {}
    for one in sorted(side.shown, key=lambda one: (one.rank, one.record.call)):
        if not one.record.missing:
            per_rank.setdefault(one.rank, []).append(one)
    size, tp = side.parallelism.world_size, side.parallelism.tp
    times = {len(own) for own in per_rank.values()}
    if set(per_rank) != set(range(size)) or times != {side.microbatches}:
        shown = " or ".join(map(str, sorted(times)))
        return Read(
            reason=f"shown {shown} times on {len(per_rank)} of {size} ranks, for {side.microbatches} micro-batches"
        )
    cells = [
        [per_rank[first + peer][number] for peer in range(tp)]
        for first in range(0, size, tp)
        for number in range(side.microbatches)
    ]
    declared = [one.record.piece is not None for cell in cells for one in cell]
    if not any(declared):
        return _over_peers(cells)
    if not all(declared):
        return Read(reason="some ranks say where their piece lies, and some do not")
    return _declared(cells)


def _declared(cells: list[list[Shown]]) -> Read:
    """DTensors say where they lie in their part of the batch, and the parts add up."""
    reads = [_pieces(cell) for cell in cells]
    reason = next((read.reason for read in reads if read.reason), "")
    if reason:
        return Read(reason=reason)
    by_sample = all(one.by_sample for cell in cells for one in cell)
    ways = [
        ("declared by DTensor", [read.wholes[min(number, len(read.wholes) - 1)] for read in reads])
        for number in range(max(len(read.wholes) for read in reads))
    ]
    return _batches(ways, by_sample=by_sample)


def _over_peers(cells: list[list[Shown]]) -> Read:
    """Plain tensors: each peer's as the part of the batch, the sum of all peers' as it, and all of them as slices."""
    by_sample = all(one.by_sample for cell in cells for one in cell)
    shapes = all(one.shape == cell[0].shape for cell in cells for one in cell)
    counted = all(one.stats is not None for cell in cells for one in cell)
    ways: list[tuple[str, list[Whole]]] = []
    apart = not _all_agree(cells)
    alone = [[_of_one(one) for one in cell] for cell in cells] if apart or counted else []
    if not apart:
        ways = [(REPLICATED, [_of_one(cell[0], ranks_of(cell)) for cell in cells])]
    elif shapes:
        ways = [(REPLICATED, [cell[peer] for cell in alone]) for peer in range(len(cells[0]))]
        sums = [replace(_sum(cell), stats=None, elements=cell[0].elements) for cell in alone]
        if all(part.sketch is not None for part in sums):
            ways.append((PARTIAL, sums))
    if len(cells[0]) > 1 and counted:
        # The sketches of slices were made as if they were wholes. Statistics need no place.
        ways.append((SLICES, [replace(_sum(cell), sketch=None) for cell in alone]))
    return replace(_batches(ways, by_sample=by_sample), apart=apart and shapes)


def _all_agree(cells: list[list[Shown]]) -> bool:
    """Whether the peers of every cell show the same, as far as anybody can tell."""
    if len(cells[0]) == 1:
        return True
    # Of hundreds of ranks: most often they do, bit by bit.
    rows = _stacked([one for cell in cells for one in cell])
    if rows is not None and all(one.shape == cell[0].shape for cell in cells for one in cell):
        rows = rows.view(len(cells), -1, SIDE, SIDE)
        if torch.equal(rows, rows[:, :1].expand_as(rows)):
            return True
    return all(_agree(cell) for cell in cells)


def _batches(ways: list[tuple[str, list[Whole]]], *, by_sample: bool) -> Read:
    """The parts of a batch, added up: each way of taking them. Where signs do not follow samples, all must agree."""
    wholes = []
    for layout, parts in ways:
        whole = _sum(parts)
        if len(parts) > 1 and not by_sample:
            first = parts[0]
            if all(_as_first(first, part) for part in parts):
                # It does not depend on the samples: a table of positions, a scale.
                whole = replace(first, ranks=whole.ranks)
            else:
                whole = replace(whole, sketch=None)
        if whole.sketch is not None or whole.stats is not None:
            wholes.append(replace(whole, layout=layout, by_sample=by_sample, places={}, parts={}))
    if not wholes:
        return Read(reason=f"{NOTHING_KEPT}, or sketches whose signs do not follow samples")
    return Read(wholes=tuple(wholes))


def _as_first(first: Whole, part: Whole) -> bool:
    return first.sketch is not None and part.sketch is not None and _same(first.sketch, part.sketch, first.eps)


def _of_one(shown: Shown, ranks: tuple[int, ...] = ()) -> Whole:
    """As if it were all that there is; `ranks` show the same."""
    return Whole(
        layout="",
        elements=math.prod(shown.shape),
        ranks=ranks or (shown.rank,),
        sketch=None if shown.sketch is None else shown.sketch.to(torch.float64),
        stats=shown.stats,
        eps=_eps([shown]),
        wide=_wide([shown]),
    )


def _sum(parts: list[Whole]) -> Whole:
    """Sums of sketches, and the statistics of all elements."""
    sketches = [part.sketch for part in parts if part.sketch is not None]
    stats = [part.stats for part in parts if part.stats is not None]
    return Whole(
        layout="",
        elements=sum(part.elements for part in parts),
        ranks=tuple(sorted({rank for part in parts for rank in part.ranks})),
        sketch=torch.stack(sketches).sum(0) if len(sketches) == len(parts) else None,
        stats=combined(stats) if len(stats) == len(parts) else None,
        eps=max(part.eps for part in parts),
        wide=all(part.wide for part in parts),
    )


def _agree(cell: list[Shown]) -> bool:
    """Whether peers show the same, as far as anybody can tell."""
    first = cell[0]
    for one in cell[1:]:
        if one.shape != first.shape:
            return False
        if first.sketch is not None and one.sketch is not None:
            if not _same(first.sketch.to(torch.float64), one.sketch.to(torch.float64), _eps(cell)):
                return False
        elif not close(first.stats, one.stats):
            return False
    return True


def close(first: Stats | None, second: Stats | None) -> bool:
    """Whether statistics are of the same values, up to their own rounding."""
    if first is None or second is None:
        return False
    exact = ("count", "zeros", "nans", "infs", "min", "max", "absmax")
    if any(getattr(first, name) != getattr(second, name) for name in exact):
        return False
    allowed = STATS_ROUNDING * first.norm
    return abs(first.norm - second.norm) <= allowed and (
        abs(first.sum - second.sum) <= allowed * math.sqrt(first.count) or first.sum == second.sum
    )


def _same(first: Tensor, second: Tensor, eps: float) -> bool:
    """Whether two sketches are of the same values, up to their own rounding. NaN is itself."""
    if torch.equal(first.nan_to_num(), second.nan_to_num()):
        return True
    return norm(first - second) <= 2 * ROUNDING * eps * norm(first)


def _wide(shown: Sequence[Shown]) -> bool:
    return all(one.dtype == torch.float64 or not one.dtype.is_floating_point for one in shown)


def _eps(shown: Sequence[Shown]) -> float:
    wide = all(one.sketch is not None and one.sketch.dtype == torch.float64 for one in shown)
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def ranks_of(shown: Sequence[Shown]) -> tuple[int, ...]:
    return tuple(sorted({one.rank for one in shown}))
