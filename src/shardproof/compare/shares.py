"""What each rank holds of a parameter-like tensor, and which elements of any whole tensor are in the same place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardproof.compare.measure import ulp, wide
from shardproof.compare.nested import inner_pieces
from shardproof.compare.parameters import Held, PlacedByHand, is_by_hand, placed_by_hand, summed
from shardproof.compare.view import Key, Observed, Reference
from shardproof.parallel.piece import Piece


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of one tensor."""

    rank: int
    got: Tensor
    """Its elements, in float64, flattened."""
    place: Hashable
    """Equal for two ranks that should hold the same elements."""
    take: Callable[[Tensor], Tensor]
    """The same elements of a whole tensor, in float64, flattened."""


def shares(key: Key, observed: Observed, reference: Reference) -> list[Share]:
    """Every rank's part of the tensor, where its place is known; what is missing counts as zeros.

    Empty where the reference has no such tensor, or where the pieces make up no whole.
    """
    wholes = reference.tensors(key)
    if not wholes:
        return []
    want = wholes[0]
    held = [entry for entry in observed.held(key) if entry[1].piece is not None]
    if inner_pieces(held, tuple(want.shape), observed) is not None:
        return []
    if any(record.piece is not None and is_by_hand(record.piece) for _, record, _ in held):
        return _by_hand(key, held, want, max(reference.floor(key), ulp(want)), observed)
    return _declared(held, want)


def _by_hand(key: Key, held: Sequence[Held], want: Tensor, floor: float, observed: Observed) -> list[Share]:
    tensors = {rank: tensor for rank, _, tensor in held if tensor is not None}
    found = []
    for data_rank in range(observed.parallelism.dp):
        peers = [rank for rank in observed.tp_peers(data_rank) if rank in tensors]
        pieces = [tensors[rank] for rank in peers]
        placed = placed_by_hand(key[2], data_rank, pieces, want, floor, observed) if pieces else ""
        if isinstance(placed, str):
            return []
        for number, rank in enumerate(peers):
            take = partial(_taken_by_hand, placed, number)
            got = wide(tensors[rank]).reshape(-1)
            found.append(Share(rank=rank, got=got, place=("hand", placed.dim, number), take=take))
    return found


def _declared(held: Sequence[Held], want: Tensor) -> list[Share]:
    got = {rank: tensor for rank, _, tensor in summed([entry for entry in held if entry[2] is not None])}
    found = []
    for rank, record, _ in held:
        piece = record.piece
        if piece is None or piece.whole != tuple(want.shape):
            return []
        take = partial(_taken, piece)
        tensor = wide(got[rank]).reshape(-1) if rank in got else torch.zeros_like(take(want))
        found.append(Share(rank=rank, got=tensor, place=(piece.offset, piece.shape, piece.stretch), take=take))
    return found


def _taken(piece: Piece, whole: Tensor) -> Tensor:
    return wide(piece.take(whole)).reshape(-1)


def _taken_by_hand(placed: PlacedByHand, number: int, whole: Tensor) -> Tensor:
    return wide(placed.take(whole)[number]).reshape(-1)
