"""Carry out the reductions that DTensors still owe, as whoever uses them next would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardproof.errors import TraceError
from shardproof.parallel.piece import Piece

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
    "norm1": torch.add,
    "norm2": torch.hypot,
}
"""`reduce_op` of a Partial placement -> what it does with two parts (and `out`); a mean is divided at the end.

`norm1` and `norm2` are of norms over pieces, as torch's `clip_grad_norm_` hands on of sharded gradients."""


def settled(tensors: Mapping[int, Tensor], pieces: Mapping[int, Piece | None]) -> dict[int, Tensor]:
    """Rank -> its tensor with every pending reduction carried out over those of its peers that are in `tensors`.

    One mesh axis after the other: what is pending over two of them is a sum over both. Peers share one result.
    """
    done = dict(tensors)
    owed = {rank: piece.pending if piece is not None else () for rank, piece in pieces.items()}
    for axis in range(max(map(len, owed.values()), default=0)):
        before = dict(done)
        made: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for rank in done:
            if axis < len(owed[rank]):
                reduction = owed[rank][axis]
                if reduction not in made:
                    operation, group = reduction
                    made[reduction] = _reduced(operation, [before[peer] for peer in group if peer in before])
                done[rank] = made[reduction]
    return done


def _reduced(operation: str, parts: Sequence[Tensor]) -> Tensor:
    """In float64, with room for the result alone. Raises `TraceError` for an operation that nobody here knows."""
    if operation not in REDUCTIONS:
        raise TraceError(
            f"a reduction {ascii(operation)[:40]} is pending; those that can be done are {', '.join(REDUCTIONS)}"
        )
    if not parts:
        raise TraceError("a reduction is pending over ranks of which none is there")
    result = parts[0].to(torch.float64, copy=True)
    for part in parts[1:]:
        REDUCTIONS[operation](result, part, out=result)
    return result.div_(len(parts)) if operation == "avg" else result
