"""Over which axes the parameters of a run are really split, from where each rank's parts lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import AXES, Parallelism

Pieces = Mapping[str, Piece]
"""Canonical parameter name -> where one rank's part lies."""


def sharded_over(ranks: Sequence[Pieces], parallelism: Parallelism) -> dict[str, int]:
    """Mesh axis -> parameters of which ranks that differ on that axis alone hold different parts."""
    return {axis: len(split_names(axis, ranks, parallelism)) for axis in AXES if getattr(parallelism, axis) > 1}


def split_names(axis: str, ranks: Sequence[Pieces], parallelism: Parallelism) -> list[str]:
    """Names of the parameters that are split over `axis`."""
    pairs = [
        (rank, other)
        for rank in range(parallelism.world_size)
        for other in range(rank + 1, parallelism.world_size)
        if _apart_on(axis, rank, other, parallelism)
    ]
    return [name for name in ranks[0] if any(_differs(name, axis, ranks[a], ranks[b], parallelism) for a, b in pairs)]


def _apart_on(axis: str, rank: int, other: int, parallelism: Parallelism) -> bool:
    own, theirs = parallelism.coordinates(rank), parallelism.coordinates(other)
    return own[axis] != theirs[axis] and all(own[a] == theirs[a] for a in AXES if a != axis)


def _differs(name: str, axis: str, first: Pieces, second: Pieces, parallelism: Parallelism) -> bool:
    if name not in first or name not in second:
        return False
    one, two = first[name], second[name]
    if not one.declared and one.shape != one.whole:
        # A plain tensor smaller than the whole: split by hand, over tp where there is one.
        return axis == ("tp" if parallelism.tp > 1 else "dp_shard")
    return (one.offset, one.shape, one.stretch) != (two.offset, two.shape, two.stretch)
