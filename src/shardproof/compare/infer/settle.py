"""Pieces that would fit in several places, put where nobody else's piece lies: zeros, and parts that look alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from shardproof.compare.infer.line import Found
from shardproof.compare.infer.residual import acceptable, error_of
from shardproof.compare.measure import within

MOST_PLACES = 256
"""Free places that are tried for one piece."""

Box = dict[int, Found]
"""Dim that is cut -> where along it a piece lies."""


def settle(pieces: Mapping[int, Tensor], found: Mapping[int, Box], whole: Tensor, floor: float) -> dict[int, Box]:
    """The same boxes, but those that values leave open are moved to what is left over, where they fit it as well."""
    sure = [rank for rank, box in found.items() if pieces[rank].numel() and not _open(box)]
    held = {_key(found[rank]) for rank in sure}
    settled = dict(found)
    for rank, box in found.items():
        if not pieces[rank].numel() or not _open(box):
            continue
        sets = [_sets(box[dim].index, [found[r][dim].index for r in sure], whole.shape[dim]) for dim in box]
        for indexes in _some(sets):
            moved = {
                dim: Found(index=index, error=box[dim].error, elsewhere=True)
                for dim, index in zip(box, indexes, strict=True)
            }
            if _key(moved) in held or not within(_error(pieces[rank], moved, whole, floor), floor):
                continue
            settled[rank] = moved
            held.add(_key(moved))
            break
    return settled


def _open(box: Box) -> bool:
    return any(one.elsewhere for one in box.values())


def _key(box: Box) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(one.index.tolist()) for one in box.values())


def _sets(own: Tensor, others: Sequence[Tensor], size: int) -> list[Tensor]:
    """Places along a dim that a piece may hold: its own guess, what others hold, and what is held by none."""
    free = torch.ones(size, dtype=torch.bool)
    for index in others:
        free[index] = False
    left = free.nonzero()[:, 0]
    tried = [own, *others, *torch.split(left, len(own))] if len(own) else [own]
    return list({tuple(index.tolist()): index for index in tried if len(index) == len(own)}.values())


def _some(sets: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    if math.prod(map(len, sets)) > MOST_PLACES:
        return []
    return list(product(*sets))


def _error(piece: Tensor, box: Box, whole: Tensor, floor: float) -> float:
    part = whole
    for dim, one in box.items():
        part = part.index_select(dim, one.index)
    return error_of([piece], part, limit=acceptable(floor))
