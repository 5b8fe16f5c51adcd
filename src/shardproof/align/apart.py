"""Which ranks hold the same values of a plain parameter: what tells a split by hand from replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from shardproof.align.shapes import SHAPED
from shardproof.compare.measure import scale
from shardproof.trace.folder.reader import RankTrace

Sets = tuple[tuple[int, ...], ...]
"""Ranks by what they hold, each set in order, the set of rank 0 first."""


def sets_of_ranks(ranks: Mapping[int, RankTrace], rename: Callable[[str], str]) -> dict[str, Sets]:
    """Name of each plain parameter -> its ranks by value, as it was first recorded; constants say nothing.

    Only where every rank recorded the values: sketches of plain parts have no common place.
    """
    first: dict[str, dict[int, int]] = {}
    for rank, trace in ranks.items():
        for number, record in enumerate(trace.records):
            plain = record.piece is not None and not record.piece.declared and not record.part
            if record.stage in SHAPED and plain and not record.missing and trace.depth(number) == "full":
                first.setdefault(rename(record.name), {}).setdefault(rank, number)
    found: dict[str, Sets] = {}
    for name, numbers in first.items():
        if len(numbers) != len(ranks) or len(ranks) < 2:
            continue
        tensors = {rank: ranks[rank].tensor(number) for rank, number in numbers.items()}
        one = next(iter(tensors.values()))
        if not one.numel() or (scale(one - one.reshape(-1)[0]) == 0 and one.numel() > 1):
            continue
        sets: list[list[int]] = []
        for rank, tensor in sorted(tensors.items()):
            own = next((s for s in sets if torch.equal(tensors[s[0]], tensor)), None)
            if own is None:
                sets.append([rank])
            else:
                own.append(rank)
        found[name] = tuple(map(tuple, sets))
    return found


def split_over(sets: Mapping[str, Sets], world_size: int) -> int:
    """Over how many neighbouring ranks plain parameters are split; 1 where that is not what the values show.

    Where ranks were built under different seeds every parameter differs, and there is no split to be seen: some must be
    the same everywhere.
    """
    if not any(len(own) == 1 for own in sets.values()):
        return 1
    degrees = {len(own) for own in sets.values() if len(own) > 1}
    for degree in sorted(degrees):
        peers = tuple(tuple(range(peer, world_size, degree)) for peer in range(degree))
        if world_size % degree == 0 and all(len(own) == 1 or own == peers for own in sets.values()):
            return degree
    return 1
