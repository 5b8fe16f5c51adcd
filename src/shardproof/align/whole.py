"""A recorded run as one device would have shown it, on the other run's batch order: what that one is held against.

Nothing is read before it is asked for, and one tensor at a time: a recording may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor

from shardproof.align.arranged import Arrangement, arrangement
from shardproof.align.side import Side
from shardproof.align.traces import Aligned
from shardproof.compare.layouts import joined, split_dim
from shardproof.compare.measure import wide
from shardproof.compare.nested import put
from shardproof.compare.pending import settled
from shardproof.errors import TraceError
from shardproof.parallel import piece as pieces
from shardproof.parallel.piece import Piece
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace, numbers_by_key

Key = tuple[int, str, str, str]

Made = Callable[[], Tensor]

PER_PART = frozenset({"forward", "backward", "loss"})
"""Stages that show something of each part of a batch; all others show the state of the model."""


class Whole:
    """The trusted run's tensors, each whole."""

    def __init__(self, label: str, entries: Sequence[tuple[Record, Made | None]]) -> None:
        self._label = label
        self.records: Sequence[Record] = [record for record, _ in entries]
        self._made = [made for _, made in entries]

    @cached_property
    def by_key(self) -> Mapping[Key, list[int]]:
        """Key -> numbers of its records, in the order in which they were made."""
        return numbers_by_key(self.records)

    def tensor(self, number: int) -> Tensor:
        """The whole tensor of record `number`, put together anew each time.

        Raises `TraceError` where what the ranks recorded does not fit together.
        """
        record, made = self.records[number], self._made[number]
        if made is None:
            raise LookupError(f"record {number}, {record.key}, has no tensor")
        try:
            return made()
        except (RuntimeError, LookupError, ValueError) as error:
            raise TraceError(
                f"{self._label}: step {record.step}, {record.stage} of {record.name}: what its ranks recorded makes up "
                f"no whole ({error}); record it again, or say with --layout-a how it was laid out"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What one rank of the trusted run shows of a key, call by call."""

    place: int
    numbers: tuple[int, ...]


def whole(
    side: Side, other: Side, orders: Mapping[int, Sequence[int]], without: Collection[Key] = frozenset()
) -> Whole:
    """`side` as one device, its samples in the order in which `other` read them.

    `orders` maps a step to the place, in this side's order, of each sample in the other's; steps that are left out are
    in the same order. Of the keys in `without` nothing is put together: there are no values of them.
    """
    shown: dict[Key, dict[int, list[int]]] = {}
    for place, trace in enumerate(side.traces):
        for key, numbers in trace.by_key.items():
            if key in without:
                continue
            shown.setdefault(key, {})[place] = numbers if isinstance(numbers, list) else list(numbers)
    arranged = _arranged(side, other, shown)
    entries: list[tuple[Record, Made | None]] = []
    for key, by_place in shown.items():
        step, stage, name, _ = key
        if stage == "batch":
            entries += _as_it_is(side, by_place)
        elif stage in PER_PART:
            own = next((arranged[n] for n in (f"{name}.weight", f"{name}.bias") if n in arranged), None)
            entries += _of_parts(side, other, key, by_place, orders.get(step), own)
        else:
            entries.append(_of_state(side, by_place, arranged.get(name)))
    return Whole(side.label, entries)


def _arranged(side: Side, other: Side, shown: Mapping[Key, Mapping[int, Sequence[int]]]) -> dict[str, Arrangement]:
    """Name -> how the hand-made parts of a parameter make up what the other run first showed of it, where they do not
    lie one after the other."""
    found: dict[str, Arrangement] = {}
    asked: set[str] = set()
    for key in sorted((k for k in shown if k[1] in ("initial-state", "update") and not k[3]), key=lambda k: k[0]):
        name = key[2]
        numbers = {p: trace.by_key[key][-1] for p, trace in enumerate(side.traces) if key in trace.by_key}
        records = {p: side.traces[p].records[number] for p, number in numbers.items()}
        peers = _by_hand(records, side)
        theirs = {p: trace.by_key[key] for p, trace in enumerate(other.traces) if key in trace.by_key}
        if name in asked or not peers or not theirs:
            continue
        asked.add(name)
        _, made = _of_state(other, theirs, None)
        whole = None if made is None else made()
        pieces = [side.traces[p].tensor(numbers[p]) for p in peers]
        at = None
        if whole is not None and whole.is_floating_point() and all(p.dim() == whole.dim() > 0 for p in pieces):
            at = arrangement([piece.to(whole.dtype) for piece in pieces], whole)
        if at is not None:
            found[name] = at
    return found


def _by_hand(records: Mapping[int, Record], side: Side) -> list[int]:
    """Places of the first tensor-parallel group whose plain tensors are smaller than the whole; empty if none are."""
    tp = side.layout.parallelism.tp
    found = [
        p for p, r in records.items() if not r.missing and (at := r.piece) and not at.declared and at.shape != at.whole
    ]
    return [p for p in found if p // tp == found[0] // tp]


def _as_it_is(side: Side, by_place: Mapping[int, Sequence[int]]) -> list[tuple[Record, Made | None]]:
    """Of a batch nothing is put together: which samples were read is compared by their digests."""
    place, numbers = next(iter(by_place.items()))
    trace = side.traces[place]
    return [(trace.records[number], partial(trace.tensor, number)) for number in numbers[:1]]


# The state of the model: parameters, gradients, optimizer state, buffers.


def _of_state(
    side: Side, by_place: Mapping[int, Sequence[int]], arranged: Arrangement | None
) -> tuple[Record, Made | None]:
    held = {place: (side.traces[place], numbers[-1]) for place, numbers in by_place.items()}
    records = {place: trace.records[number] for place, (trace, number) in held.items()}
    first = next(iter(records.values()))
    if all(record.missing for record in records.values()):
        return first, None
    present = [place for place, record in records.items() if not record.missing]
    plain = next((p for p in present if (at := records[p].piece) is None or at.local_shape == at.whole), None)
    if plain is not None and not _pending(records[plain]):
        trace, number = held[plain]
        return replace(records[plain], missing=False), partial(trace.tensor, number)
    shape = next((record.piece.whole for record in records.values() if record.piece is not None), ())
    peers = _by_hand(records, side)
    if peers:
        local = [records[p].piece for p in peers]
        if arranged is not None and len(peers) == len(arranged.index):
            record = replace(first, piece=pieces.whole(shape), missing=False)
            return record, partial(_joined_by_hand, [held[p] for p in peers], arranged)
        dim = split_dim([torch.empty(at.shape, device="meta") for at in local if at is not None], shape)
        record = replace(first, piece=pieces.whole(shape), missing=False)
        if dim is None:
            return replace(record, unknown=True), None
        return record, partial(_joined_in_order, [held[p] for p in peers], shape[dim], dim)
    covered = {at for p in present if (at := records[p].piece) is not None}
    record = replace(first, piece=pieces.whole(shape), missing=False)
    small = sum(prod(at.local_shape) for at in {replace(at, pending=()) for at in covered}) < prod(shape)
    if small or any(at.whole != shape for at in covered):
        # Ranks that are not there hold the rest; or they do not even agree on what the whole is.
        return replace(record, unknown=True), None
    return record, partial(_assembled, side, {p: held[p][1] for p in present}, shape)


def _pending(record: Record) -> bool:
    return record.piece is not None and bool(record.piece.pending)


def _joined_in_order(held: Sequence[tuple[Trace, int]], size: int, dim: int) -> Tensor:
    return joined([trace.tensor(number) for trace, number in held], size, dim)


def _joined_by_hand(held: Sequence[tuple[Trace, int]], arranged: Arrangement) -> Tensor:
    return arranged.put_together([trace.tensor(number) for trace, number in held], arranged.dim)


def _assembled(side: Side, held: Mapping[int, int], shape: tuple[int, ...]) -> Tensor:
    records = {place: side.traces[place].records[number] for place, number in held.items()}
    if any(_pending(record) for record in records.values()):
        tensors = {place: side.traces[place].tensor(number) for place, number in held.items()}
        done = settled(tensors, {place: record.piece for place, record in records.items()})
    else:
        done = {}
    made: Tensor | None = None
    seen: set[Piece] = set()
    for place, number in held.items():
        piece = records[place].piece
        if piece is None or (plain := replace(piece, pending=())) in seen:
            continue
        seen.add(plain)
        tensor = done[place] if place in done else side.traces[place].tensor(number)
        if made is None:
            made = torch.empty(shape, dtype=tensor.dtype)
        put(made, piece, tensor)
    return made if made is not None else torch.empty(shape)


# What the parts of a batch show: outputs, their gradients, losses.


def _of_parts(
    side: Side,
    other: Side,
    key: Key,
    by_place: Mapping[int, Sequence[int]],
    order: Sequence[int] | None,
    arranged: Arrangement | None,
) -> list[tuple[Record, Made | None]]:
    step, stage, _, _ = key
    tp, many = side.layout.parallelism.tp, side.microbatches(step)
    by_call = {
        place: sorted(numbers, key=lambda number: side.traces[place].records[number].call)
        for place, numbers in by_place.items()
    }
    counts = {len(numbers) for numbers in by_call.values()}
    place, numbers = next(iter(by_call.items()))
    first = side.traces[place].records[numbers[0]]
    if len(counts) != 1 or len(by_call) != len(side.traces) or (calls := divmod(counts.pop(), many))[1]:
        return [(replace(first, unknown=True, piece=None), None)]
    like = replace(_like(other, key) or NOTHING, arranged=arranged, adds=stage == "backward")
    found: list[tuple[Record, Made | None]] = []
    for call in range(calls[0]):
        cells = [
            Cell(
                peers=tuple((rank * tp + peer, by_call[rank * tp + peer][m * calls[0] + call]) for peer in range(tp)),
                count=count,
            )
            for rank, m, count in side.parts(step)
            if count
        ]
        if not _joinable(side, cells) or not all(_covered(side, cell) for cell in cells):
            # Padded to a length of its own, or a token's share of an expert: no one tensor holds all parts. Or what
            # the peers say of their places leaves a part of the whole to nobody.
            found.append((replace(first, call=call, unknown=True, piece=None), None))
            continue
        at = first.piece if len(side.traces) == 1 else None
        record = replace(first, call=call, piece=None if at is None or not at.declared else at, missing=False)
        if stage == "loss":
            found.append((record, partial(_loss, side, cells)))
        else:
            found.append((record, partial(_batch, side, cells, stage, like, order)))
    return found


def _joinable(side: Side, cells: Sequence[Cell]) -> bool:
    """Whether the parts of a batch differ in shape along one dim at most, and there as their samples do."""
    shapes = [_shape(side, *cell.peers[0]) for cell in cells]
    if len({len(shape) for shape in shapes}) > 1:
        return False
    return all(
        sum(a != b for a, b in zip(shape, shapes[0], strict=True)) <= 1
        and all(a == b or a * cells[0].count == b * cell.count for a, b in zip(shape, shapes[0], strict=True))
        for shape, cell in zip(shapes, cells, strict=True)
    )


def _covered(side: Side, cell: Cell) -> bool:
    """Whether the peers hold as much as there is: a recording may say of a few bytes that they lie in a huge whole."""
    placed = {piece for place, number in cell.peers if (piece := side.traces[place].records[number].piece) is not None}
    if not any(piece.declared or piece.pending for piece in placed):
        return True
    held = sum(prod(piece.local_shape) for piece in {replace(piece, pending=()) for piece in placed})
    wholes = {piece.whole for piece in placed}
    return len(wholes) == 1 and held >= prod(wholes.pop())


def _shape(side: Side, place: int, number: int) -> tuple[int, ...]:
    trace = side.traces[place]
    piece = trace.records[number].piece
    if piece is not None:
        return piece.whole
    return trace.shape(number) if isinstance(trace, Aligned) else tuple(trace.tensor(number).shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What the TP peers of one data rank show of one part of the batch."""

    peers: tuple[tuple[int, int], ...]
    """(place, number of the record) of each."""
    count: int
    """Samples of the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Like:
    """How the other side shows the same output."""

    shape: tuple[int, ...] | None
    """None where it does not show it."""
    count: int
    """Samples in it."""
    tp: int
    arranged: Arrangement | None = None
    """How the parameters of the module are cut on this side, and with them its output."""
    adds: bool = False
    """Whether what several peers hold of the same places are addends of one whole."""


NOTHING = Like(shape=None, count=1, tp=1)


def _like(other: Side, key: Key) -> Like | None:
    for place, trace in enumerate(other.traces):
        for number in trace.by_key.get(key, ()):
            record = trace.records[number]
            tp = other.layout.parallelism.tp
            parts = [count for rank, m, count in other.parts(key[0]) if (rank, m) == (place // tp, 0)]
            if record.missing or not parts or not parts[0]:
                continue
            if record.piece is not None and record.piece.declared:
                return Like(shape=record.piece.whole, count=parts[0], tp=1)
            shape = trace.shape(number) if isinstance(trace, Aligned) else tuple(trace.tensor(number).shape)
            return Like(shape=shape, count=parts[0], tp=tp)
    return None


def _loss(side: Side, cells: Sequence[Cell]) -> Tensor:
    """The sum over micro-batches, averaged over data ranks."""
    values = [wide(_cell(side, cell, None)) for cell in cells]
    return torch.stack(values).sum(0) / side.layout.parallelism.dp


def _batch(side: Side, cells: Sequence[Cell], stage: str, like: Like | None, order: Sequence[int] | None) -> Tensor:
    """One output (or its gradient) over the whole batch."""
    tensors = [_cell(side, cell, like) for cell in cells]
    if len(tensors) == 1 and order is None:
        return tensors[0]
    dim = _batch_dim(tuple(tensors[0].shape), cells[0].count, like)
    if dim is None:
        return _not_of_samples(tensors, cells, stage)
    joint = torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
    if order is None:
        return joint
    each = joint.shape[dim] // sum(cell.count for cell in cells)
    index = (torch.tensor(order).unsqueeze(1) * each + torch.arange(each)).reshape(-1)
    return joint.index_select(dim, index)


def _not_of_samples(tensors: Sequence[Tensor], cells: Sequence[Cell], stage: str) -> Tensor:
    """What has no dim of samples: gradients add up, and a scalar (a loss that is an output) is a mean over samples."""
    if len(tensors) == 1:
        return tensors[0]
    if stage == "backward":
        return torch.stack([wide(tensor) for tensor in tensors]).sum(0).to(tensors[0].dtype)
    if all(tensor.shape == tensors[0].shape and torch.equal(tensor, tensors[0]) for tensor in tensors):
        return tensors[0]
    if not all(tensor.shape == tensors[0].shape and tensor.is_floating_point() for tensor in tensors):
        return tensors[0]
    total = sum(cell.count for cell in cells)
    weighted = [wide(tensor) * (cell.count / total) for tensor, cell in zip(tensors, cells, strict=True)]
    return torch.stack(weighted).sum(0).to(tensors[0].dtype)


def _batch_dim(shape: tuple[int, ...], count: int, like: Like | None) -> int | None:
    """Which dim holds the samples: the one as long as there are samples, else one that is a multiple; the first."""

    def fits(dim: int) -> bool:
        if like is None or like.shape is None or len(like.shape) != len(shape):
            return True
        if shape[dim] == like.shape[dim]:
            return count == like.count
        each, theirs = shape[dim] * like.count, like.shape[dim] * count
        return each == theirs or each == theirs * like.tp

    dims = [dim for dim, size in enumerate(shape) if size and size % count == 0 and fits(dim)]
    return next((dim for dim in dims if shape[dim] == count), dims[0] if dims else None)


def _cell(side: Side, cell: Cell, like: Like | None) -> Tensor:
    """The tensor of one part of the batch, from what the TP peers show."""
    entries = [(place, side.traces[place], number) for place, number in cell.peers]
    tensors = {place: trace.tensor(number) for place, trace, number in entries}
    placed = {place: trace.records[number].piece for place, trace, number in entries}
    first = next(iter(tensors.values()))
    if any(piece is not None and (piece.declared or piece.pending) for piece in placed.values()):
        done = settled(tensors, placed)
        made = torch.empty(next(p.whole for p in placed.values() if p is not None), dtype=first.dtype)
        for place, piece in placed.items():
            if piece is not None:
                put(made, piece, done[place])
        return made
    peers = list(tensors.values())
    at = None if like is None else like.arranged
    # The rows of a weight are the features of its output, which come last.
    if like is not None and at is not None and at.dim == 0 and first.dim() and at.fits(peers, -1):
        return at.put_together(peers, first.dim() - 1, add=like.adds)
    if len(peers) == 1 or all(p.shape == first.shape and torch.equal(p, first) for p in peers):
        return first
    return _joined(peers, cell.count, like)


def _joined(peers: list[Tensor], count: int, like: Like | None) -> Tensor:
    """Peers that show different tensors: slices, or addends where the other side's one tensor has their shape."""
    tp, shape = len(peers), tuple(peers[0].shape)
    if like is not None and like.shape is not None and len(like.shape) == len(shape):
        of_samples = _batch_dim(shape, count, like)
        for dim in range(len(shape)):
            cut = shape[dim] != like.shape[dim] and shape[dim] * tp in (like.shape[dim], like.shape[dim] * like.tp)
            if cut and dim != of_samples:
                return torch.cat(peers, dim)
        if like.tp == 1:
            return torch.stack([wide(peer) for peer in peers]).sum(0).to(peers[0].dtype)
    # Laid out alike on both sides: any dim will do, as it will for the other.
    return torch.cat(peers, -1) if shape else torch.stack(peers).sum(0)
