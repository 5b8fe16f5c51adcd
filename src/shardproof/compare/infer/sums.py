"""Ranks that hold terms of a sum or mean: only together are they the whole, or a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from shardproof.compare.infer.residual import acceptable, all_within, error_of, largest_of
from shardproof.compare.measure import wide

Groups = tuple[tuple[int, ...], ...]

SHOWN = 8
"""Ranks, and groups of ranks, that are listed in words."""


def groupings(ranks: Sequence[int], known: Sequence[Sequence[int]] | None) -> Iterator[Groups]:
    """Sets of ranks that may add up, the simplest first: all, then neighbours, then every so manieth.

    Only the `known` ones, where there are any.
    """
    if known is not None:
        yield tuple(tuple(group) for group in known)
        return
    count = len(ranks)
    yield (tuple(ranks),)
    for size in (n for n in range(count - 1, 1, -1) if count % n == 0):
        yield tuple(tuple(ranks[start : start + size]) for start in range(0, count, size))
        yield tuple(tuple(ranks[start :: count // size]) for start in range(count // size))


def error_of_groups(
    pieces: Mapping[int, Tensor], whole: Tensor, groups: Groups, floor: float, *, mean: bool = False
) -> float:
    """How far each group's sum (or mean) is from the whole, at most."""
    return largest_of(
        [
            error_of([pieces[rank] for rank in group], whole, 1 / len(group) if mean else 1.0, acceptable(floor))
            for group in groups
        ]
    )


def added(pieces: Mapping[int, Tensor], groups: Groups) -> dict[int, Tensor] | None:
    """The first rank of each group -> the group's sum in float64; None where its pieces have several shapes."""
    found = {}
    for group in groups:
        if len({pieces[rank].shape for rank in group}) > 1:
            return None
        total = wide(pieces[group[0]]).clone()
        for rank in group[1:]:
            total += pieces[rank]
        found[group[0]] = total
    return found


def interchangeable(pieces: Mapping[int, Tensor], groups: Groups, floor: float) -> tuple[int, int] | None:
    """Two ranks of different groups whose terms are the same: they could change places."""
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            for first, second in product(group, other):
                alike = pieces[first].shape == pieces[second].shape
                if alike and all_within(pieces[first], pieces[second], floor):
                    return first, second
    return None


def named(groups: Groups, *, mean: bool = False) -> str:
    """In words."""
    what = "means" if mean else "partial sums"
    if len(groups) == 1:
        return f"{what} over all ranks"
    return f"{what} over ranks {listed(groups)}"


def listed(groups: Groups) -> str:
    """`(0, 1), (2, 3)`, cut short where there are many."""
    shown = [f"({', '.join(map(str, group[:SHOWN]))}{', ...' if len(group) > SHOWN else ''})" for group in groups]
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def one_vector_more(pieces: Mapping[int, Tensor], whole: Tensor, floor: float) -> bool:
    """Whether the sum over all ranks is the whole and one vector, the same for every token: a bias added by each."""
    if whole.dim() < 2 or whole.shape.numel() == whole.shape[-1]:
        return False
    first = torch.stack([wide(piece.reshape(-1, whole.shape[-1])[0]) for piece in pieces.values()]).sum(0)
    extra = first - wide(whole.reshape(-1, whole.shape[-1])[0])
    parts = [*pieces.values(), (-extra).expand(whole.shape)]
    return bool(extra.abs().max() > acceptable(floor)) and error_of(parts, whole) <= acceptable(floor)
