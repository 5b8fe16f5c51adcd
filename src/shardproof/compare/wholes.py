"""What all ranks of a run show of one tensor in sketches and statistics, made one whole.

Distinct pieces add up, replicas are several ways to take them, what is pending is carried out, and parts of the batch
add up where signs follow samples. Where the shapes leave it open what tensor-parallel peers hold, every way of taking
it is given: the reference then decides (`compare.sketched`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What all ranks of one run show of a key, and how that run is laid out."""

    shown: Sequence[Shown]
    parallelism: Parallelism = field(default_factory=Parallelism)
    microbatches: int = 1


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
    sketches: dict[int, Tensor] = {one.rank: one.sketch.to(torch.float64) for one in held if one.sketch is not None}
    stats = {one.rank: one.stats for one in held if one.stats is not None}
    whole = len(sketches) == len(held)
    sketches = settled(sketches, {rank: pieces[rank] for rank in sketches}) if whole else {}
    if owed or len(stats) < len(held):
        stats = {}
    if not sketches and not stats:
        return Read(reason="partial sums of which only statistics were kept" if owed else NOTHING_KEPT)
    return Read(wholes=tuple(_ways(held, sketches, stats)))


def _zeros(shown: Shown, piece: Piece) -> Shown:
    count = math.prod(piece.local_shape)
    zeros = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    return replace(shown, shape=piece.local_shape, sketch=zeros, stats=Stats(count=count, zeros=count))


def _ways(held: Sequence[Shown], sketches: Mapping[int, Tensor], stats: Mapping[int, Stats]) -> list[Whole]:
    """The wholes that the first holders of every piece make, the second ones, and so on, as far as they differ."""
    places = {one.rank: place(one.record.piece) for one in held if one.record.piece is not None}
    holders: dict[Piece, list[int]] = {}
    for rank, piece in places.items():
        holders.setdefault(piece, []).append(rank)
    whole = next(iter(holders)).whole
    eps = _eps(held)
    ways: list[Whole] = []
    for number in range(max(map(len, holders.values()))):
        chosen = {piece: ranks[min(number, len(ranks) - 1)] for piece, ranks in holders.items()}
        parts = {piece: sketches[rank] for piece, rank in chosen.items()} if sketches else {}
        stacked = torch.stack(list(parts.values())) if parts else None
        made = Whole(
            layout="pieces added up" if len(holders) > 1 else REPLICATED,
            elements=math.prod(whole),
            ranks=tuple(chosen.values()),
            sketch=None if stacked is None else stacked.sum(0),
            stats=combined(stats[rank] for rank in chosen.values()) if stats else None,
            eps=eps,
            wide=_wide(held),
            shape=whole,
            places=places,
            parts=parts,
            largest=0.0 if stacked is None else _largest(stacked),
        )
        # Two pieces may be wrong by opposite amounts: each must be the same.
        at = next((at for at, way in enumerate(ways) if _alike(way, made)), None)
        if at is None:
            ways.append(made)
        else:
            ways[at] = replace(ways[at], ranks=(*ways[at].ranks, *made.ranks))
    return ways


def _largest(stacked: Tensor) -> float:
    """The largest norm of some sketches, shape (sketches, 16, 16), of those that are finite."""
    norms = stacked.square().mean((1, 2)).sqrt()
    return float(torch.where(norms.isfinite(), norms, 0.0).max())


def _alike(first: Whole, second: Whole) -> bool:
    if first.parts:
        return all(_same(first.parts[piece], sketch, first.eps) for piece, sketch in second.parts.items())
    return close(first.stats, second.stats)


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
    ways: list[tuple[str, list[Whole]]] = []
    apart = not all(_agree(cell) for cell in cells)
    if not apart:
        ways = [(REPLICATED, [replace(_of_one(cell[0]), ranks=ranks_of(cell)) for cell in cells])]
    elif shapes:
        ways = [(REPLICATED, [_of_one(cell[peer]) for cell in cells]) for peer in range(len(cells[0]))]
        sums = [replace(_sum([_of_one(one) for one in cell]), stats=None) for cell in cells]
        if all(part.sketch is not None for part in sums):
            ways.append(
                (
                    PARTIAL,
                    [replace(part, elements=math.prod(cell[0].shape)) for part, cell in zip(sums, cells, strict=True)],
                )
            )
    if len(cells[0]) > 1:
        # The sketches of slices were made as if they were wholes. Statistics need no place.
        ways.append((SLICES, [replace(_sum([_of_one(one) for one in cell]), sketch=None) for cell in cells]))
    return replace(_batches(ways, by_sample=by_sample), apart=apart and shapes)


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


def _of_one(shown: Shown) -> Whole:
    return Whole(
        layout="",
        elements=math.prod(shown.shape),
        ranks=(shown.rank,),
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
