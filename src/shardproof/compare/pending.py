"""Carry out the reductions that DTensors still owe, as whoever uses them next would."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shardproof.compare.measure import wide
from shardproof.parallel.piece import Piece

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "avg": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
    "product": lambda parts: parts.prod(0),
    "norm1": lambda parts: parts.sum(0),
    "norm2": lambda parts: parts.square().sum(0).sqrt(),
}
"""`reduce_op` of a Partial placement -> what it does with parts stacked along a new first dim.

`norm1` and `norm2` are of norms over pieces, as torch's `clip_grad_norm_` hands on of sharded gradients."""


def settled(tensors: Mapping[int, Tensor], pieces: Mapping[int, Piece | None]) -> dict[int, Tensor]:
    """Rank -> its tensor with every pending reduction carried out over those of its peers that are in `tensors`.

    One mesh axis after the other: what is pending over two of them is a sum over both.
    """
    done = dict(tensors)
    owed = {rank: piece.pending if piece is not None else () for rank, piece in pieces.items()}
    for axis in range(max(map(len, owed.values()), default=0)):
        before = dict(done)
        for rank in done:
            if axis < len(owed[rank]):
                operation, group = owed[rank][axis]
                parts = torch.stack([wide(before[peer]) for peer in group if peer in before])
                done[rank] = REDUCTIONS[operation](parts)
    return done
