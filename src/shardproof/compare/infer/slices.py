"""One slice of a dim for each rank, even or not, in the order of the ranks or another, some perhaps held by several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardproof.compare.infer.marks import going_on


def candidates(
    marks: Tensor, held: Tensor, starts: Tensor, likely: Sequence[int], tolerance: float
) -> Iterator[Tensor]:
    """Places one after the other whose marks are those of a piece, the likely ones first.

    `marks` are the whole's and `held` the piece's, `starts` where the first of `held` occurs.
    """
    fitting = going_on(marks, held, starts, tolerance).tolist()
    first = [start for start in dict.fromkeys(likely) if start in set(fitting)]
    known = set(first)
    for start in (*first, *(start for start in fitting if start not in known)):
        if bool(((marks[start : start + len(held)] - held).abs() <= tolerance).all()):
            yield torch.arange(start, start + len(held))


def begins(sizes: Mapping[int, int], size: int, groups: Sequence[Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Rank -> where its slice may begin along a dim of `size`, the likeliest first, told by sizes alone.

    One after the other, in each of the `groups`; where there are more ranks than slices, neighbours hold the same
    slice (key heads of grouped-query attention), or every so manieth rank does (replicas).
    """
    found: dict[int, tuple[int, ...]] = {}
    for group in groups:
        extents = [sizes[rank] for rank in group]
        before = [sum(extents[:number]) for number in range(len(group))]
        widest = max(extents)
        slices = max(-(-size // widest), 1) if widest else 1
        times = max(len(group) // slices, 1)
        for number, rank in enumerate(group):
            neighbours = number // times * widest
            replicas = number % slices * widest
            tried = (before[number], neighbours, replicas)
            found[rank] = tuple(start for start in dict.fromkeys(tried) if start + sizes[rank] <= size)
    return found


def contiguous(index: Tensor) -> bool:
    """Whether places lie one after the other."""
    return bool((index[1:] == index[:-1] + 1).all())


def tiles(spans: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether (start, end) pairs, in order and each given once, make up all from `first` to `last`."""
    ends = [first, *(end for _, end in spans)]
    return [start for start, _ in spans] == ends[:-1] and ends[-1] == last


def named(index: Mapping[int, Tensor], size: int, dim: int) -> str:
    """The layout in words; empty if these are not slices that tile the dim."""
    shown = {rank: places for rank, places in index.items() if len(places)}
    if not shown or not all(contiguous(places) for places in shown.values()):
        return ""
    first: dict[tuple[int, int], int] = {}
    for rank, places in sorted(shown.items()):
        first.setdefault((int(places[0]), int(places[-1]) + 1), rank)
    if not tiles(sorted(first), 0, size):
        return ""
    order = [first[span] for span in sorted(first)]
    return f"slices of dim {dim}" + ("" if order == sorted(order) else f", in the order of ranks {_listed(order)}")


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown}, ..."
