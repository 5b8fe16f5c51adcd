"""Several blocks in one matrix, each cut by itself: query, key and value, or gate and up, a slice of each per rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from shardproof.compare.infer.slices import tiles

MOST_BLOCKS = 16
"""More than these are no fused blocks, but places dealt out in turn."""


def blocks_of(index: Mapping[int, Tensor], size: int) -> tuple[int, ...]:
    """Sizes of the blocks of which each rank holds a slice; empty if the dim is not cut so.

    Every rank has its slices of all blocks in the same order, and of each block the slices make up the whole. Several
    ranks may hold the same slice of a block (key and value heads, of which there may be fewer than ranks).
    """
    shown = [places for places in index.values() if len(places)]
    if not shown or len({len(places) for places in shown}) > 1:
        return ()
    # A border that one rank alone cannot see: its slice of one block may end where its slice of the next begins.
    breaks = torch.stack([places[1:] != places[:-1] + 1 for places in shown]).any(0).nonzero()[:, 0] + 1
    borders = [0, *breaks.tolist(), len(shown[0])]
    if not 2 < len(borders) <= MOST_BLOCKS + 1:
        return ()
    sizes: list[int] = []
    for start, end in pairwise(borders):
        spans = sorted({(int(places[start]), int(places[end - 1]) + 1) for places in shown})
        first = sum(sizes)
        if not tiles(spans, first, spans[-1][1]):
            return ()
        sizes.append(spans[-1][1] - first)
    return tuple(sizes) if sum(sizes) == size else ()


def named(index: Mapping[int, Tensor], size: int, dim: int) -> tuple[str, tuple[int, ...]]:
    """The layout in words and the sizes of its blocks; both empty if there are none."""
    blocks = blocks_of(index, size)
    return (spelled(blocks, dim), blocks) if blocks else ("", ())


def spelled(blocks: Sequence[int], dim: int) -> str:
    """Blocks of these sizes in words."""
    return f"fused: {len(blocks)} blocks {tuple(blocks)} of dim {dim}, a slice of each per rank"


def cut(blocks: Sequence[int], held: int, number: int, ranks: int) -> Iterator[Tensor]:
    """Places that rank `number` of `ranks` may hold, where it holds `held` of them: a slice of each of `blocks`.

    The first block is cut among all; the others as well, or several neighbours hold the same slice of them.
    """
    for times in (n for n in range(1, ranks + 1) if ranks % n == 0):
        places, start = [], 0
        for position, size in enumerate(blocks):
            shared = times if position else 1
            each, rest = divmod(size * shared, ranks)
            if rest:
                break
            begin = start + number // shared * each
            places.append(torch.arange(begin, begin + each))
            start += size
        if len(places) == len(blocks) and sum(map(len, places)) == held:
            yield torch.cat(places)
