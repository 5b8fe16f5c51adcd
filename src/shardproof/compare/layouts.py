"""Find from values alone how plain tensors of several ranks make up one whole: hand-written tensor parallelism."""

from __future__ import annotations

import torch
from torch import Tensor

from shardproof.compare.measure import distance, largest, wide, within


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


def rearranged(pieces: list[Tensor], whole: Tensor, dim: int, floor: float) -> list[Tensor] | None:
    """What each piece should hold if they are any slices of `whole` along `dim`; see `slices`."""
    found = slices(pieces, whole, dim, floor)
    return None if found is None else [whole.index_select(dim, index) for index in found]


def slices(pieces: list[Tensor], whole: Tensor, dim: int, floor: float) -> list[Tensor] | None:
    """Which slices of `whole` each piece holds if they are any slices of `whole` along `dim`, each taken exactly once.

    Fused blocks (query, key and value in one matrix, gate and up) are cut per block, so that a rank's piece is no
    contiguous slice. Slices are found by a random projection and then held against the whole; None where they do not
    tile it. A slice that occurs twice in the whole leaves the answer open, and is matched in order.
    """
    if not whole.numel() or repeats(pieces, whole.shape[dim], dim) != 1:
        return None
    probe = torch.randn(whole.numel() // whole.shape[dim], generator=_generator(), dtype=torch.float64)
    marks = _marks(whole, dim, probe)
    order = marks.argsort(stable=True)
    held = torch.cat([_marks(piece, dim, probe) for piece in pieces])
    # Sorted against sorted: each slice of the whole is used once, and the values then decide whether that is right.
    matched = torch.empty_like(order)
    matched[held.argsort(stable=True)] = order
    found, start = [], 0
    for piece in pieces:
        index = matched[start : start + piece.shape[dim]]
        start += piece.shape[dim]
        want = whole.index_select(dim, index)
        if not within(largest(distance(piece, want)), floor):
            return None
        found.append(index)
    return found


def tells(whole: Tensor, dim: int, floor: float) -> bool:
    """Whether the slices of `whole` along `dim` differ from each other, so that values can tell which is which."""
    rows = wide(whole).movedim(dim, 0).reshape(whole.shape[dim], -1)
    order = _marks(whole, dim, torch.randn(rows.shape[1], generator=_generator(), dtype=torch.float64)).argsort()
    neighbours = (rows[order[1:]] - rows[order[:-1]]).abs()
    return not neighbours.numel() or not within(float(neighbours.amax(1).min()), floor)


def _marks(tensor: Tensor, dim: int, probe: Tensor) -> Tensor:
    """One number per slice along `dim`."""
    return wide(tensor).movedim(dim, 0).reshape(tensor.shape[dim], probe.numel()) @ probe


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
