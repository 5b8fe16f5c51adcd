"""Tensors that belong to a parameter or buffer: values, gradients, optimizer state. Each piece has a known place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from shardproof.compare.infer import infer
from shardproof.compare.infer.placed import spelled
from shardproof.compare.layouts import in_order, slices, split_dim, starts, tells
from shardproof.compare.measure import DROWNED, Look, Outcome, Pair, clear, drowned, judge, look, scale, ulp
from shardproof.compare.nested import inner_pieces
from shardproof.compare.pending import settled
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, Reference, stand_in
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import AXES
from shardproof.trace.record import Record

Held = tuple[int, Record, Tensor | None]

ZERO_HIDES = frozenset({"gradient", "grad-norm", "optimizer-state", "update"})
"""Stages in which a tensor of zeros says nothing: any wrong scale or missing sum leaves it as it is."""


def looks(keys: Iterable[Key], observed: Observed, reference: Reference) -> dict[Key, list[Look]]:
    """How far apart the pieces of some keys are, where each has its known place, rank by rank.

    Only for a reference that learns from it how large its tensors are: floors that are estimated rest on that, also on
    that of other tensors, so that all of a stage are looked at before the first floor is asked for. Recordings are
    gigabytes, and are read but once.
    """
    found: dict[Key, list[Look]] = {}
    if reference.learn is None:
        return found
    for key in keys:
        held, wholes = list(observed.held(key)), reference.tensors(key)
        if len(wholes) != 1 or not held:
            continue
        pairs = _placed(held, wholes[0], observed)
        if pairs:
            found[key] = [look(pair.got, pair.want) for pair in pairs]
            size = max(one.size for one in found[key])
            reference.learn(stand_in(key, reference.trace), wholes[0], size)
    return found


def compare(key: Key, observed: Observed, reference: Reference, known: Sequence[Look] = ()) -> Comparison:
    """One parameter-like tensor over all ranks; `known` is what `looks` found of it."""
    step, stage, name, part = key
    held = list(observed.held(key))
    wholes = reference.tensors(key)
    base = Comparison(step=step, stage=stage, name=name, part=part, verdict=Verdict.NOT_CHECKED)
    if not held or not reference.trace.by_key.get(stand_in(key, reference.trace)):
        return replace(base, reason=_no_partner(bool(held), key))
    shape = next((record.piece.whole for _, record, _ in held if record.piece is not None), ())
    want = wholes[0] if wholes else None
    if want is None:
        return _nothing_expected(base, held, shape)
    pairs = _placed(held, want, observed) if len(wholes) == 1 else []
    # One pass tells how far apart the pieces are, and how large the trusted tensor is, on which its floor rests.
    seen = known or [look(pair.got, pair.want) for pair in pairs]
    unseen = partial(reference.size, key) if len(wholes) == 1 else scale
    size = max(one.size for one in seen) if seen else unseen(want)
    # Copies of the same initial values owe the same bits.
    floor = 0.0 if stage == "initial-state" else max(reference.floor(key), ulp(want, size))
    base = replace(base, shape=tuple(want.shape), floor=floor)
    if seen:
        return _judged(base, (judge(pairs, floor, seen), _described(held, observed), ""), want, size, observed)
    inner = inner_pieces(held, tuple(want.shape), observed)
    if inner is not None:
        return _judged(base, _judge_nested(held, inner, want, floor, observed), want, size, observed)
    misfit = {tuple(r.piece.whole) for _, r, _ in held if r.piece is not None} - {tuple(want.shape)}
    if misfit:
        return replace(
            base,
            verdict=Verdict.DIFFERENT,
            error=float("inf"),
            reason=f"shape {misfit.pop()} against {tuple(want.shape)} in the reference",
            ranks=tuple(sorted({rank for rank, _, _ in held})),
        )
    absent = [rank for rank, record, tensor in held if tensor is None and _expected(record, want).any()]
    if absent:
        return replace(
            base,
            verdict=Verdict.DIFFERENT,
            error=size,
            reason="no gradient where the reference has one" if stage != "checkpoint" else "lost between two steps",
            ranks=tuple(absent),
        )
    present = [(rank, record, tensor) for rank, record, tensor in held if tensor is not None]
    gap = _gap([record.piece for _, record, _ in held], want.numel())
    if gap:
        return replace(base, reason=gap)
    return _judged(base, _judge(present, want, floor, observed), want, size, observed)


def _judged(
    base: Comparison, judged: tuple[Outcome, str, str], want: Tensor, size: float, observed: Observed
) -> Comparison:
    """`size` is the largest element of `want`."""
    outcome, layout, reason = judged
    result = replace(
        base,
        verdict=outcome.verdict,
        error=outcome.error,
        ranks=outcome.ranks,
        ratio=outcome.ratio,
        samples=outcome.samples,
        errors=outcome.errors,
        layout=layout,
        reason=reason,
    )
    if result.verdict is Verdict.DIFFERENT and _counts_passes(want, result, observed):
        reason = f"counts forward passes, of which this run makes {observed.microbatches} a step"
        return replace(result, verdict=Verdict.NOT_CHECKED, reason=reason)
    if result.verdict is Verdict.DIFFERENT and drowned(result.error, result.floor, size):
        return replace(result, verdict=Verdict.NOT_CHECKED, reason=DROWNED)
    if result.verdict is not Verdict.DIFFERENT and base.stage in ZERO_HIDES and not size > 0:
        return replace(result, verdict=Verdict.NOT_CHECKED, reason="all zero in the reference: a wrong scale is hidden")
    return result


def _counts_passes(want: Tensor, result: Comparison, observed: Observed) -> bool:
    """Whether a buffer of whole numbers is larger by the number of micro-batches, as a counter in forward() is."""
    return (
        result.stage == "buffer"
        and not want.is_floating_point()
        and observed.microbatches > 1
        and result.ratio == observed.microbatches
    )


def _gap(pieces: Sequence[Piece | None], wanted: int) -> str:
    """Why the pieces shown are not the whole tensor; empty where they are, or where only values can tell."""
    known = {piece for piece in pieces if piece is not None}
    if not known:
        return "its shape is not its parameter's, so that its place in the whole is not known"
    if any(is_by_hand(piece) for piece in known):
        return ""
    covered = sum(math.prod(piece.local_shape) for piece in {replace(piece, pending=()) for piece in known})
    return f"the ranks show {covered} of {wanted} elements" if covered < wanted else ""


def _no_partner(observed: bool, key: Key) -> str:
    if key[1] == "grad-norm":
        return "clipping inside the experiment's own train_step cannot be seen"
    return "the reference has no such tensor" if observed else "this run shows no such tensor"


def _nothing_expected(base: Comparison, held: list[Held], shape: tuple[int, ...]) -> Comparison:
    """The reference has no gradient here: zeros are as good as none."""
    wrong = tuple(rank for rank, _, tensor in held if tensor is not None and bool((tensor != 0).any()))
    if wrong:
        error = max(scale(tensor) for _, _, tensor in held if tensor is not None)
        return replace(
            base,
            shape=shape,
            verdict=Verdict.DIFFERENT,
            error=error,
            ranks=wrong,
            reason="a gradient where the reference has none",
        )
    return replace(base, shape=shape, reason="no gradient in the reference")


def _expected(record: Record, want: Tensor) -> Tensor:
    return record.piece.take(want) if record.piece is not None and record.piece.declared else want


def _judge(present: Sequence[Held], want: Tensor, floor: float, observed: Observed) -> tuple[Outcome, str, str]:
    by_hand = [h for h in present if h[1].piece is not None and is_by_hand(h[1].piece)]
    if by_hand:
        return _judge_by_hand(by_hand, want, floor, observed)
    return judge(_pairs(present, want), floor), _described(present, observed), ""


def _placed(held: Sequence[Held], want: Tensor, observed: Observed) -> list[Pair]:
    """All pieces beside their parts of the whole, where each has its known place and together they make it up."""
    shape = tuple(want.shape)
    for _, record, tensor in held:
        place = record.piece
        if tensor is None or place is None or tuple(place.whole) != shape or place.pending or is_by_hand(place):
            return []
    if _gap([record.piece for _, record, _ in held], want.numel()) or inner_pieces(held, shape, observed) is not None:
        return []
    return _pairs(held, want)


def _pairs(held: Sequence[Held], want: Tensor) -> list[Pair]:
    return [Pair(rank=rank, got=tensor, want=piece.take(want), piece=piece) for rank, piece, tensor in summed(held)]


def _described(held: Sequence[Held], observed: Observed) -> str:
    return describe([(rank, record.piece) for rank, record, _ in held if record.piece], observed)


def is_by_hand(piece: Piece) -> bool:
    """Whether a plain tensor is smaller than the whole, so that only values tell where it lies."""
    return not piece.declared and piece.shape != piece.whole


def summed(present: Sequence[Held]) -> list[tuple[int, Piece, Tensor]]:
    """(rank, piece, tensor) with pending sums carried out, as whoever uses the tensor next would."""
    tensors = {rank: tensor for rank, _, tensor in present if tensor is not None}
    done = settled(tensors, {rank: record.piece for rank, record, _ in present})
    return [(rank, r.piece, done[rank]) for rank, r, _ in present if r.piece is not None and rank in done]


def _judge_by_hand(held: Sequence[Held], want: Tensor, floor: float, observed: Observed) -> tuple[Outcome, str, str]:
    """Plain tensors smaller than the whole: their place is found from values, and they must tile the whole."""
    pairs: list[Pair] = []
    layout = ""
    tensors = {rank: tensor for rank, _, tensor in held if tensor is not None}
    for data_rank in range(observed.parallelism.dp):
        peers = [rank for rank in observed.tp_peers(data_rank) if rank in tensors]
        pieces = [tensors[rank] for rank in peers]
        if not pieces:
            continue
        placed = placed_by_hand(held[0][1].name, data_rank, pieces, want, floor, observed)
        if isinstance(placed, str):
            return Outcome.impossible(peers), "", placed
        layout = placed.layout
        for rank, piece, expected, start in zip(
            peers, pieces, placed.take(want), starts(pieces, want.shape[placed.dim], placed.dim), strict=True
        ):
            offset = tuple(start if d == placed.dim else 0 for d in range(want.dim()))
            pairs.append(Pair(rank=rank, got=piece, want=expected, offset=offset))
    return judge(pairs, floor), layout, ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedByHand:
    """Where the plain pieces of a tp group lie in a whole."""

    dim: int
    pieces: list[Tensor]
    order: list[Tensor] | None
    """Which slices each piece holds; None where they lie one after the other."""

    @property
    def layout(self) -> str:
        """In words."""
        return f"tp: slices of dim {self.dim}" if self.order is None else f"tp: {spelled(self.order, self.dim)}"

    def take(self, whole: Tensor) -> list[Tensor]:
        """What each piece holds of a whole tensor."""
        if self.order is None:
            return in_order(self.pieces, whole, self.dim)
        return [whole.index_select(self.dim, index) for index in self.order]


def placed_by_hand(
    name: str, group: int, pieces: list[Tensor], want: Tensor, floor: float, observed: Observed
) -> PlacedByHand | str:
    """Where the pieces of a tp group lie; or why they make up no whole."""
    declared = observed.declared(name).get("tp")
    dim = split_dim(pieces, tuple(want.shape), declared)
    known = observed.found.get((name, group))
    if dim is None and declared is None:
        # Blocks of which several peers hold the same part: their lengths alone add up to nothing.
        known = known if known is not None and _as_long(pieces, *known) else _by_values(pieces, want, floor)
        if known is not None:
            if tells(want, known[0], floor):
                observed.found[name, group] = known
            return PlacedByHand(dim=known[0], pieces=pieces, order=known[1])
    if dim is None:
        shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces)
        along = "" if declared is None else f" along dim {declared}, as placements declares"
        return f"pieces {shapes} do not tile the whole {tuple(want.shape)}{along}"
    if known is not None and known[0] == dim:
        order = known[1]
    else:
        wants = in_order(pieces, want, dim)
        plain = judge([Pair(rank=0, got=g, want=w) for g, w in zip(pieces, wants, strict=True)], floor)
        order = slices(pieces, want, dim, floor) if declared is None and not clear(plain.error, floor) else None
        if order is not None:
            other = [want.index_select(dim, index) for index in order]
            rearranged = judge([Pair(rank=0, got=g, want=w) for g, w in zip(pieces, other, strict=True)], floor)
            order = order if rearranged.error < plain.error else None
        right = order is not None or declared is not None or plain.verdict is not Verdict.DIFFERENT
        if right and tells(want, dim, floor):
            observed.found[name, group] = (dim, order)
    return PlacedByHand(dim=dim, pieces=pieces, order=order)


def _as_long(pieces: Sequence[Tensor], dim: int, order: Sequence[Tensor] | None) -> bool:
    """Whether each piece has as many places along `dim` as `order` gives it."""
    return order is not None and [piece.shape[dim] for piece in pieces] == [len(places) for places in order]


def _by_values(pieces: list[Tensor], want: Tensor, floor: float) -> tuple[int, list[Tensor]] | None:
    """The one dim that is cut and which places along it each piece holds, where no sizes tell."""
    found = infer(dict(enumerate(pieces)), want, floor)
    if not found.fits or found.dim is None or found.sums:
        return None
    index = found.cuts[0].index
    return found.dim, [index[peer] for peer in range(len(pieces))]


def _judge_nested(
    held: Sequence[Held], inner: Mapping[int, list[Tensor]], want: Tensor, floor: float, observed: Observed
) -> tuple[Outcome, str, str]:
    """Shards of pieces that were split over tp by hand: the pieces' place first, then each shard's in its piece."""
    wants: dict[int, list[Tensor]] = {}
    layout = ""
    for replica, pieces in inner.items():
        placed = placed_by_hand(held[0][1].name, replica, pieces, want, floor, observed)
        if isinstance(placed, str):
            return Outcome.impossible([rank for rank, _, _ in held]), "", placed
        wants[replica], layout = placed.take(want), placed.layout
    pairs = []
    for rank, record, tensor in held:
        if tensor is not None and record.piece is not None:
            at = observed.parallelism.coordinates(rank)
            expected = record.piece.take(wants[at["dp_replicate"]][at["tp"]])
            pairs.append(Pair(rank=rank, got=tensor, want=expected, piece=record.piece))
    return judge(pairs, floor), f"{layout}, sharded again over dp_shard", ""


def describe(pieces: list[tuple[int, Piece]], observed: Observed) -> str:
    """`dp_shard: slices of dim 0, tp: slices of dim 1`, or `replicated`, from where the pieces really lie."""
    at = dict(pieces)
    said = []
    for axis in AXES:
        if getattr(observed.parallelism, axis) == 1:
            continue
        for rank, piece in pieces:
            other = _neighbour(rank, axis, observed, at)
            if other is None or other == piece:
                continue
            if other.stretch != piece.stretch and other.offset == piece.offset:
                said.append(f"{axis}: stretches of the flattened tensor")
            else:
                dims = [d for d in range(len(piece.whole)) if other.offset[d] != piece.offset[d]]
                said.append(f"{axis}: slices of dim {dims[0] if dims else 0}")
            break
    return ", ".join(said) or "replicated"


def _neighbour(rank: int, axis: str, observed: Observed, at: dict[int, Piece]) -> Piece | None:
    own = observed.parallelism.coordinates(rank)
    for other, piece in at.items():
        theirs = observed.parallelism.coordinates(other)
        if other != rank and all(own[a] == theirs[a] for a in AXES if a != axis):
            return piece
    return None
