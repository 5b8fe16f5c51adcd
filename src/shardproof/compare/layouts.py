"""Find from values alone how plain tensors of several ranks make up one whole: hand-written tensor parallelism."""

from __future__ import annotations

import torch
from torch import Tensor

from shardproof.compare.measure import furthest, wide, within

PROBES = 16
"""Random projections by which slices are told apart."""

ROUNDS = 16
"""Times that slices may ask for the nearest one that is still free."""

NEAREST_SIZE = 4096
"""Slices up to which all are held against all, which takes the square of it in numbers."""


def split_dim(pieces: list[Tensor], whole: tuple[int, ...], declared: int | None = None) -> int | None:
    """The dim along which pieces of these shapes, one after the other, make up `whole`; None if there is none.

    Only `declared` is tried where that is given (negative from the end).
    """
    for dim in range(len(whole)):
        if declared is not None and dim != (declared if declared >= 0 else declared + len(whole)):
            continue
        others = all(
            piece.dim() == len(whole) and all(piece.shape[d] == whole[d] for d in range(len(whole)) if d != dim)
            for piece in pieces
        )
        if others and repeats(pieces, whole[dim], dim):
            return dim
    return None


def repeats(pieces: list[Tensor], size: int, dim: int) -> int:
    """How many neighbouring pieces hold each slice of a whole of `size` along `dim`; 0 where they do not tile it.

    More than 1 where there are fewer slices than peers: grouped-query attention with fewer key heads than ranks.
    """
    sizes = [piece.shape[dim] for piece in pieces]
    if sum(sizes) == size:
        return 1
    alike = len(set(sizes)) == 1 and 0 < sizes[0] < size and size % sizes[0] == 0
    return sum(sizes) // size if alike and sum(sizes) % size == 0 else 0


def starts(pieces: list[Tensor], size: int, dim: int) -> list[int]:
    """Where each piece begins along `dim` if they lie one after the other."""
    times = max(repeats(pieces, size, dim), 1)
    begins, start = [], 0
    for number, piece in enumerate(pieces):
        begins.append(start)
        if (number + 1) % times == 0:
            start += piece.shape[dim]
    return begins


def in_order(pieces: list[Tensor], whole: Tensor, dim: int) -> list[Tensor]:
    """What each piece should hold if they lie one after the other along `dim`."""
    begins = starts(pieces, whole.shape[dim], dim)
    return [whole.narrow(dim, start, piece.shape[dim]) for start, piece in zip(begins, pieces, strict=True)]


def joined(pieces: list[Tensor], size: int, dim: int) -> Tensor:
    """The whole that the pieces make up along `dim`, each slice taken once."""
    return torch.cat(pieces[:: max(repeats(pieces, size, dim), 1)], dim)


def slices(pieces: list[Tensor], whole: Tensor, dim: int, floor: float) -> list[Tensor] | None:
    """Which slices of `whole` each piece holds if they are any slices of `whole` along `dim`, each taken exactly once.

    Fused blocks (query, key and value in one matrix, gate and up) are cut per block, so that a rank's piece is no
    contiguous slice. Slices are found by random projections and then held against the whole; None where they do not
    tile it. A slice that occurs twice in the whole leaves the answer open, and is matched in order.
    """
    if not whole.numel() or repeats(pieces, whole.shape[dim], dim) != 1:
        return None
    size = whole.shape[dim]
    probes = torch.randn(whole.numel() // size, PROBES, generator=_generator(), dtype=torch.float64)
    marks, held = _marks(whole, dim, probes), torch.cat([_marks(piece, dim, probes) for piece in pieces])
    # Sorted against sorted: each slice of the whole is used once, and the values then decide whether that is right.
    matched = torch.empty(size, dtype=torch.long)
    matched[held[:, 0].argsort(stable=True)] = marks[:, 0].argsort(stable=True)
    joint = torch.cat(pieces, dim)
    error = furthest(joint, whole.index_select(dim, matched))
    if error > floor and size <= NEAREST_SIZE:
        # In low precision rounding swaps neighbours in that order; the nearest in all projections is the right one.
        closest = nearest(held, marks)
        nearer = furthest(joint, whole.index_select(dim, closest))
        if nearer < error:
            matched, error = closest, nearer
    return list(torch.split(matched, [piece.shape[dim] for piece in pieces])) if within(error, floor) else None


def nearest(held: Tensor, marks: Tensor) -> Tensor:
    """Row of `held` -> a row of `marks` near it, each used once: where two ask for the same, the nearer has it."""
    apart = torch.cdist(held, marks).nan_to_num(nan=float("inf"))
    matched = torch.full((len(held),), -1, dtype=torch.long)
    for _ in range(ROUNDS):
        open_rows = (matched < 0).nonzero()[:, 0]
        if not len(open_rows):
            return matched
        least, wanted = apart[open_rows].min(1)
        # The farthest first, so that of those who ask for the same row the nearest is written last.
        asked = least.argsort(descending=True, stable=True).tolist()
        winner = {int(wanted[number]): int(open_rows[number]) for number in asked}
        columns, rows = torch.tensor(list(winner)), torch.tensor(list(winner.values()))
        matched[rows] = columns
        apart[:, columns] = float("inf")
    # Rows that are all alike ask for the same again and again, and are as right in any order.
    free = torch.ones(len(marks), dtype=torch.bool)
    free[matched[matched >= 0]] = False
    rest = matched < 0
    matched[rest] = free.nonzero()[: int(rest.sum()), 0]
    return matched


def tells(whole: Tensor, dim: int, floor: float) -> bool:
    """Whether the slices of `whole` along `dim` differ from each other, so that values can tell which is which."""
    rows = wide(whole).movedim(dim, 0).reshape(whole.shape[dim], -1)
    probe = torch.randn(rows.shape[1], 1, generator=_generator(), dtype=torch.float64)
    order = _marks(whole, dim, probe)[:, 0].argsort()
    neighbours = (rows[order[1:]] - rows[order[:-1]]).abs()
    return not neighbours.numel() or not within(float(neighbours.amax(1).min()), floor)


def _marks(tensor: Tensor, dim: int, probes: Tensor) -> Tensor:
    """One number per slice along `dim` and probe."""
    return wide(tensor).movedim(dim, 0).reshape(tensor.shape[dim], len(probes)) @ probes


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
