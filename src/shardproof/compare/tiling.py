"""Whether pieces whose place is known make up a whole, each element once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from shardproof.parallel.piece import Piece

MOST_CELLS = 2**22
"""Cells of the grid that the edges of all boxes draw, up to which they are counted."""


def place(piece: Piece) -> Piece:
    """What two pieces share that hold the same elements."""
    if piece.declared and not piece.pending:
        return piece
    return replace(piece, pending=(), declared=True)


def gap(pieces: Iterable[Piece]) -> str:
    """Why the distinct pieces are not one whole; empty where they are. Pieces of one and the same place count once.

    All must have the same `whole`.
    """
    return _gap(frozenset(place(piece) for piece in pieces))


# Layers of a model share their shapes and layouts, and so does every step.
@lru_cache(1024)
def _gap(pieces: frozenset[Piece]) -> str:
    if not pieces:
        return "no rank shows it"
    whole = next(iter(pieces)).whole
    wanted = math.prod(whole)
    covered = sum(math.prod(piece.local_shape) for piece in pieces)
    if covered < wanted:
        return f"the ranks show {covered} of {wanted} elements"
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for piece in pieces:
        if math.prod(piece.local_shape):
            size = math.prod(piece.shape)
            boxes.setdefault((piece.offset, piece.shape), []).append(piece.stretch or (0, size))
    for (_, shape), stretches in boxes.items():
        ends = [0, *(end for start_stop in sorted(stretches) for end in start_stop), math.prod(shape)]
        if any(stop != start for stop, start in zip(ends[::2], ends[1::2], strict=True)):
            return "stretches of a flattened piece overlap, or leave a gap"
    if covered != wanted or not _tile(list(boxes), whole):
        return f"pieces of {whole} overlap"
    return ""


def _tile(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], whole: tuple[int, ...]) -> bool:
    """Whether boxes (offset, shape) that hold as many elements as the whole cover each element once."""
    if not math.prod(whole) or not whole:
        return True
    edges = [
        sorted({0, whole[dim], *(edge for o, s in boxes for edge in (o[dim], o[dim] + s[dim]))})
        for dim in range(len(whole))
    ]
    if any(cuts[0] < 0 or cuts[-1] > size for cuts, size in zip(edges, whole, strict=True)):
        return False
    cells = [len(cuts) - 1 for cuts in edges]
    if math.prod(cells) > MOST_CELLS:
        return _apart(boxes)
    index = [{edge: number for number, edge in enumerate(cuts)} for cuts in edges]
    times = np.zeros(cells, dtype=np.int32)
    for offset, shape in boxes:
        times[tuple(slice(at[o], at[o + s]) for at, o, s in zip(index, offset, shape, strict=True))] += 1
    return bool((times == 1).all())


def _apart(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether no two of many boxes overlap: a sweep along dim 0, in which only neighbours are held together."""
    ordered = sorted(boxes)
    open_: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offset, shape in ordered:
        open_ = [(o, s) for o, s in open_ if o[0] + s[0] > offset[0]]
        for o, s in open_:
            if all(a < b + c and b < a + d for a, d, b, c in zip(offset, shape, o, s, strict=True)):
                return False
        open_.append((offset, shape))
    return True
