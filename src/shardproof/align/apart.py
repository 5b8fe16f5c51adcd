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


def split_over(sets: Mapping[str, Sets], world_size: int) -> Sets:
    """The groups of ranks over which plain parameters are split; empty where that is not what the values show.

    Ranks that hold the same part of everything differ in their data; one of each such set makes up a group, wherever
    its ranks lie: 0, 1 and 2, 3 where peers are neighbours, 0, 2 and 1, 3 where they are not. Parts may be held by
    several peers, as key and value heads are that are fewer than ranks.

    Where ranks were built under different seeds every parameter differs, and there is no split to be seen: some must be
    the same everywhere.
    """
    if not any(len(own) == 1 for own in sets.values()):
        return ()
    finest = max(sets.values(), key=len)
    degree, copies = len(finest), len(finest[0])
    if degree == 1 or degree * copies != world_size or any(len(own) != copies for own in finest):
        return ()
    if not all(
        set(part) <= set(own) or not set(part) & set(own) for s in sets.values() for own in s for part in finest
    ):
        return ()
    return tuple(tuple(part[copy] for part in finest) for copy in range(copies))
