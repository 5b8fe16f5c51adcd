"""How a recorded run was laid out: ranks per mesh axis, and which rank stands where, from the facts that it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from shardproof.errors import UsageError
from shardproof.spec.parallelism import AXES, Parallelism


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the ranks of a recording stand on a mesh."""

    parallelism: Parallelism
    order: tuple[int, ...]
    """Place on the mesh -> rank of the recording, `tp` peers next to each other."""
    told_by: str
    """What the degrees were taken from."""


def declared(parallelism: Parallelism, world_size: int, label: str, option: str) -> Layout:
    """What a reader says that it is, ranks in the usual order. Raises `UsageError` where it has other ranks.

    `label` names the recording, and `option` what the reader says it with.
    """
    if parallelism.world_size != world_size:
        said = ",".join(f"{axis}={n}" for axis, n in zip(AXES, parallelism.degrees, strict=True) if n > 1)
        raise UsageError(
            f"{option} {said or 'single'} is {_ranks(parallelism.world_size)}, and {label} is a recording of "
            f"{_ranks(world_size)}; give degrees whose product is {world_size}"
        )
    return Layout(parallelism=parallelism, order=tuple(range(parallelism.world_size)), told_by="declared")


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def from_groups(
    groups: Mapping[int, Mapping[str, Sequence[int]]],
    world_size: int,
    *,
    split: Sequence[Sequence[int]] = (),
    label: str = "the recording",
    option: str = "layout",
) -> Layout:
    """The layout of a run whose ranks wrote which ranks they share each axis with.

    `split` are the groups of ranks over which plain parameters turned out to be split, where no rank wrote a `tp` axis.
    Ranks about which nothing is known are data-parallel: nothing else leaves whole parameters on each of them.

    Raises `UsageError` where the groups of the ranks make up no mesh; `label` and `option` as in `declared`.
    """
    groups = {
        rank: {axis: peers for axis, peers in own.items() if max(peers) < world_size} for rank, own in groups.items()
    }
    way_out = f"say how it was laid out, as {option} dp_replicate=2,tp=2"
    known = {axis: _size(axis, groups, label, way_out) for axis in AXES}
    by_value = known["tp"] == 1 and bool(split)
    if by_value:
        known["tp"] = len(split[0])
        groups = {rank: {**groups.get(rank, {}), "tp": peers} for peers in split for rank in peers}
    rest, odd = divmod(world_size, prod(known.values()))
    if odd or rest < 1:
        said = ", ".join(f"{axis}={size}" for axis, size in known.items() if size > 1)
        raise UsageError(f"{label}: its ranks wrote down groups of {said}, no mesh of {world_size} ranks; {way_out}")
    told_by = "told by the values of its parameters" if by_value else "told by the groups that its ranks wrote down"
    if rest > 1:
        known_axes = f"{told_by}; the rest is" if max(known.values()) > 1 else "nothing is said of the layout;"
        told_by = f"{known_axes} taken for data-parallel"
    sizes = {**known, "dp_replicate": known["dp_replicate"] * rest}
    order: dict[int, int] = {}
    copies: Counter[tuple[int, ...]] = Counter()
    for rank in range(world_size):
        at = {axis: _index(axis, rank, groups) for axis in AXES}
        # Ranks that stand in the same place of the groups that are known are copies of each other, in their order.
        copy = copies[tuple(at.values())]
        copies[tuple(at.values())] += 1
        replica = copy * known["dp_replicate"] + at["dp_replicate"]
        order[(replica * known["dp_shard"] + at["dp_shard"]) * known["tp"] + at["tp"]] = rank
    # Groups of the same sizes that do not cross as a mesh's do: the usual order is as good as any.
    usual = sorted(order) != list(range(world_size))
    return Layout(
        parallelism=_parallelism(sizes),
        order=tuple(range(world_size)) if usual else tuple(order[place] for place in range(world_size)),
        told_by=told_by,
    )


def _parallelism(degrees: Mapping[str, int]) -> Parallelism:
    return Parallelism(dp_replicate=degrees["dp_replicate"], dp_shard=degrees["dp_shard"], tp=degrees["tp"])


def _size(axis: str, groups: Mapping[int, Mapping[str, Sequence[int]]], label: str, way_out: str) -> int:
    sizes = {len(own[axis]) for own in groups.values() if own.get(axis)}
    if len(sizes) > 1:
        raise UsageError(
            f"{label}: its ranks wrote down {axis} groups of different sizes ({', '.join(map(str, sorted(sizes)))}); "
            f"{way_out}"
        )
    return sizes.pop() if sizes else 1


def _index(axis: str, rank: int, groups: Mapping[int, Mapping[str, Sequence[int]]]) -> int:
    own = groups.get(rank, {}).get(axis)
    return list(own).index(rank) if own and rank in own else 0


def groups_of(event: Mapping[str, Any]) -> dict[str, list[int]]:
    """The axes of one rank's `layout` event, as far as they are lists of ranks: a trace is somebody else's file."""
    axes = event.get("axes")
    if not isinstance(axes, Mapping):
        return {}
    return {
        axis: [int(rank) for rank in ranks]
        for axis, ranks in axes.items()
        if axis in AXES and isinstance(ranks, list) and ranks and _each_once(ranks)
    }


def _each_once(ranks: list[object]) -> bool:
    return all(type(rank) is int and rank >= 0 for rank in ranks) and len(set(ranks)) == len(ranks)
