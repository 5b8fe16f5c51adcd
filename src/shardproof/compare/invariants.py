"""What is replicated along a mesh axis, rank against rank: bit by bit, without a reference and without a tolerance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardproof.compare import batches
from shardproof.compare.measure import Pair, distance, largest, worst
from shardproof.compare.parameters import describe
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, causal_order
from shardproof.parallel.names import ROOT
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import AXES
from shardproof.trace.checksums import same_bits
from shardproof.trace.record import Record

STAGES = frozenset({"initial-state", "batch", "gradient", "grad-norm", "optimizer-state", "update", "buffer"})
"""Stages whose tensors have replicas. Outputs and losses belong to a rank's own part of the batch."""

DATA_AXES = ("dp_replicate", "dp_shard")

APART = "every rank holds a part of its own, so that there are no replicas to compare"
FOREIGN = "one device has no such tensor, so that nobody knows which ranks hold the same of it"
BY_HAND = "a slice that was cut by hand, and no other rank is known to hold the same one"
STATISTIC = "changes in training and is not whole numbers: a statistic that each data rank may keep of its own samples"
PARTIAL = "still a partial sum"
NO_PEERS = "data ranks read other samples, and there are no tensor-parallel peers"
SPLIT = "the plan splits the batch over tp"

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name -> shape on one device, of parameters and buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One tensor over all ranks."""

    comparison: Comparison
    axes: tuple[str, ...] = ()
    """The mesh axes along which replicas differ."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank shows of a tensor, and what is known of who holds the same."""

    rank: int
    piece: Piece | None
    """Ranks with the same piece hold the same elements ..."""
    axes: frozenset[str]
    """... along these axes."""
    tensor: Tensor | None
    why: str
    """Why not along the others."""


def compare_invariants(observed: Observed, shapes: Shapes) -> list[Seen]:
    """Every tensor that could have replicas, in causal order."""
    keys = (key for key in causal_order(observed.ranks[0], observed.ranks) if key[1] in STAGES)
    return [_batch(key, observed) if key[1] == "batch" else _replicas(key, observed, shapes) for key in keys]


def _batch(key: Key, observed: Observed) -> Seen:
    found = batches.compare(key, observed)
    if observed.parallelism.tp == 1 or observed.batch_split_over_tp:
        reason = SPLIT if observed.batch_split_over_tp else NO_PEERS
        return Seen(comparison=replace(found, verdict=Verdict.NOT_CHECKED, reason=reason))
    return Seen(comparison=found, axes=("tp",) if found.verdict is Verdict.DIFFERENT else ())


def _replicas(key: Key, observed: Observed, shapes: Shapes) -> Seen:
    step, stage, name, part = key
    told = {one.rank: one for one in _told(key, observed, shapes)}
    pieces = [(rank, record.piece) for rank, record, _ in observed.held(key) if record.piece is not None]
    base = Comparison(
        step=step,
        stage=stage,
        name=name,
        part=part,
        verdict=Verdict.NOT_CHECKED,
        shape=pieces[0][1].whole if pieces else (),
        layout=describe(pieces, observed),
    )
    groups = list(_groups(told, observed))
    if not groups:
        return Seen(comparison=replace(base, reason=next((one.why for one in told.values() if one.why), APART)))
    axes: dict[str, None] = {}
    pairs: list[Pair] = []
    odd: set[int] = set()
    for axis, group in groups:
        kinds = _kinds([told[rank] for rank in group])
        if len(set(kinds)) == 1:
            continue
        axes[axis] = None
        kind, count = Counter(kinds).most_common(1)[0]
        differing = [rank for rank, own in zip(group, kinds, strict=True) if own != kind]
        # Two against one is a majority; one against one leaves open who is wrong.
        odd.update(differing if 2 * count > len(group) else group)
        want = told[group[kinds.index(kind)]]
        pairs += [pair for rank in differing if (pair := _pair(told[rank], want)) is not None]
    if not axes:
        return Seen(comparison=replace(base, verdict=Verdict.EQUAL))
    different = replace(
        base,
        verdict=Verdict.DIFFERENT,
        reason=f"ranks that should hold the same bits along {' and '.join(axes)} do not",
        error=max((largest(distance(pair.got, pair.want)) for pair in pairs), default=0.0),
        ranks=tuple(sorted(odd)),
        samples=tuple(worst(pairs)),
    )
    return Seen(comparison=different, axes=tuple(axes))


def _groups(told: Mapping[int, _Told], observed: Observed) -> Iterator[tuple[str, list[int]]]:
    """(axis, ranks) of all ranks that should hold the same, two or more, axis by axis."""
    for axis in AXES:
        if getattr(observed.parallelism, axis) == 1:
            continue
        for line in _lines(axis, observed):
            same: dict[Piece, list[int]] = {}
            for rank in line:
                one = told.get(rank)
                if one is not None and one.piece is not None and axis in one.axes:
                    same.setdefault(replace(one.piece, pending=()), []).append(rank)
            yield from ((axis, group) for group in same.values() if len(group) > 1)


def _lines(axis: str, observed: Observed) -> list[list[int]]:
    """Groups of ranks that differ on `axis` alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(observed.parallelism.world_size):
        at = observed.parallelism.coordinates(rank)
        found.setdefault(tuple(at[other] for other in AXES if other != axis), []).append(rank)
    return list(found.values())


def _kinds(told: Sequence[_Told]) -> list[int]:
    """A number for each rank: the same number, the same bits."""
    first: list[Tensor | None] = []
    kinds = []
    for one in told:
        kind = next((k for k, other in enumerate(first) if _same(one.tensor, other)), len(first))
        if kind == len(first):
            first.append(one.tensor)
        kinds.append(kind)
    return kinds


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        # No gradient and a gradient of zeros are the same to say nothing.
        return all(tensor is None or not bool(tensor.any()) for tensor in (first, second))
    return same_bits(first, second)


def _pair(got: _Told, want: _Told) -> Pair | None:
    shown = got.tensor if got.tensor is not None else want.tensor
    if shown is None:
        return None
    nothing = torch.zeros_like(shown)
    first, second = (nothing if one.tensor is None else one.tensor for one in (got, want))
    # A number of an optimizer's state has the piece of its parameter, which says nothing of an index into the number.
    piece = got.piece if got.piece is not None and got.piece.local_shape == tuple(shown.shape) else None
    return Pair(rank=got.rank, got=first, want=second, piece=piece)


# Who holds the same.


def _told(key: Key, observed: Observed, shapes: Shapes) -> Iterator[_Told]:
    _, stage, name, part = key
    held = list(observed.held(key))
    for rank, record, tensor in held:
        if record.piece is not None and 0 in record.piece.local_shape:
            continue
        if part == "step" or name == ROOT:
            # Whatever part of a parameter a rank holds, it has stepped as often; and there is one norm.
            yield _Told(rank, record.piece, frozenset(AXES), tensor, "")
        elif part and stage in ("initial-state", "optimizer-state"):
            yield _state(rank, record, tensor, observed, shapes)
        else:
            axes, why = _axes(rank, record, shapes.get(name), observed, held)
            if stage == "buffer" and _moves(key, tensor, observed):
                axes, why = axes - set(DATA_AXES), STATISTIC
            yield _Told(rank, record.piece, axes, tensor, why)


def _state(rank: int, record: Record, tensor: Tensor | None, observed: Observed, shapes: Shapes) -> _Told:
    """An entry of an optimizer's state lies where its parameter lies; a number or a factor of it is of that part."""
    step, _, name, _ = record.key
    of_parameter = (step, "initial-state" if step < 0 else "update", name, "")
    own = [other for other in observed.held(of_parameter) if other[0] == rank]
    if not own or own[0][1].piece is None:
        return _Told(rank, None, frozenset(), tensor, FOREIGN)
    parameter = own[0][1]
    axes, why = _axes(rank, parameter, shapes.get(name), observed, list(observed.held(of_parameter)))
    piece = parameter.piece
    if record.piece is not None and piece is not None and record.piece.whole == piece.whole:
        piece = record.piece
    return _Told(rank, piece, axes, tensor, why)


def _axes(
    rank: int,
    record: Record,
    shape: tuple[int, ...] | None,
    observed: Observed,
    held: Sequence[tuple[int, Record, Tensor | None]],
) -> tuple[frozenset[str], str]:
    """The axes along which ranks with the same piece hold the same elements; and why not along the others."""
    piece, every = record.piece, frozenset(AXES)
    if piece is None or shape is None:
        return frozenset(), FOREIGN
    if shape != _real(piece.whole, shape):
        # Handed a slice to shard, FSDP knows of nothing larger.
        return every - {"tp"}, BY_HAND
    if piece.declared or piece.shape == piece.whole:
        owed = {peer for _, group in piece.pending for peer in group} - {rank}
        lines = {axis: next(line for line in _lines(axis, observed) if rank in line) for axis in AXES}
        partial = {axis for axis, line in lines.items() if owed.intersection(line)}
        return every - partial, PARTIAL if partial else ""
    cut = _cut_along(rank, piece, observed, held)
    return (every - set(cut) if cut else frozenset()), BY_HAND


def _real(whole: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """`whole` without the dim that complex numbers get where they are recorded as pairs of reals."""
    return whole[:-1] if len(whole) == len(shape) + 1 and whole[-1] == 2 else whole


def _cut_along(
    rank: int, piece: Piece, observed: Observed, held: Sequence[tuple[int, Record, Tensor | None]]
) -> list[str]:
    """The axes along which plain slices can make up the whole, by their sizes; several where sizes leave it open."""
    sizes = {other: torch.Size(r.piece.shape).numel() for other, r, _ in held if r.piece is not None}
    wanted = torch.Size(piece.whole).numel()
    found = []
    for axis in ("tp", "dp_shard"):
        line = next(line for line in _lines(axis, observed) if rank in line)
        if len(line) > 1 and sum(sizes.get(other, 0) for other in line) == wanted:
            found.append(axis)
    return found


def _moves(key: Key, tensor: Tensor | None, observed: Observed) -> bool:
    """Whether a buffer of fractions has changed on some rank since before the first step."""
    if tensor is None or not tensor.is_floating_point():
        return False
    before = {rank: old for rank, _, old in observed.held((-1, "initial-state", key[2], ""))}
    return any(
        old is None or now is None or not same_bits(now, old)
        for rank, _, now in observed.held(key)
        for old in [before.get(rank)]
    )
