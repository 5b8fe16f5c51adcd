"""Hand-written tensor parallelism below FSDP: the data ranks' shards make up each tp peer's piece of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from shardproof.compare.view import Observed
from shardproof.parallel.piece import Piece
from shardproof.trace.record import Record

Held = tuple[int, Record, Tensor | None]


def inner_pieces(held: Sequence[Held], whole: tuple[int, ...], observed: Observed) -> dict[int, list[Tensor]] | None:
    """Replica -> the plain piece of each tp peer, put together from its shards; None where pieces are not nested so.

    Seen by the pieces' own whole: FSDP was given the peer's piece, and knows of nothing larger.
    """
    pieces = [record.piece for _, record, _ in held]
    if observed.parallelism.tp == 1 or any(
        piece is None or not piece.declared or piece.pending or piece.whole == whole or len(piece.whole) != len(whole)
        for piece in pieces
    ):
        return None
    shards: dict[tuple[int, int], list[tuple[Piece, Tensor]]] = {}
    for rank, record, tensor in held:
        if tensor is not None and record.piece is not None:
            at = observed.parallelism.coordinates(rank)
            shards.setdefault((at["dp_replicate"], at["tp"]), []).append((record.piece, tensor))
    if not all(map(_make_up, shards.values())):
        return None
    parts: dict[tuple[int, int], Tensor] = {}
    for peer, own in shards.items():
        piece, tensor = own[0]
        parts[peer] = tensor.new_zeros(piece.whole)
        for piece, tensor in own:
            put(parts[peer], piece, tensor)
    if len(parts) != observed.parallelism.dp_replicate * observed.parallelism.tp:
        return None
    peers = range(observed.parallelism.tp)
    return {replica: [parts[replica, tp] for tp in peers] for replica in range(observed.parallelism.dp_replicate)}


def _make_up(shards: Sequence[tuple[Piece, Tensor]]) -> bool:
    """Whether shards are of one whole, and enough for it: a recording may say that a few bytes lie in a huge one."""
    wholes = {piece.whole for piece, _ in shards}
    return len(wholes) == 1 and sum(tensor.numel() for _, tensor in shards) >= prod(wholes.pop())


def put(whole: Tensor, piece: Piece, tensor: Tensor) -> None:
    """Write a rank's elements to their place in `whole`: the reverse of `Piece.take`."""
    box = whole
    for dim, (start, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
        box = box.narrow(dim, start, length)
    if piece.stretch is None:
        box.copy_(tensor)
        return
    if box.is_contiguous():
        box.view(-1)[piece.stretch[0] : piece.stretch[1]] = tensor.reshape(-1)
        return
    flat = box.reshape(-1).clone()
    flat[piece.stretch[0] : piece.stretch[1]] = tensor.reshape(-1)
    box.copy_(flat.reshape(box.shape))
