"""A layout that somebody names: DTensor placements, a `tp_plan`, Megatron's `partition_dim`. Values still decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardproof.compare.infer import fused, slices
from shardproof.compare.infer.inferred import Cut
from shardproof.compare.infer.placed import Placed, cut_dims, named
from shardproof.compare.infer.residual import acceptable, error_at, error_of, floors, largest_of
from shardproof.compare.measure import within

KEYS = frozenset({"dim", "replicated", "fused"})


def checked(hint: Mapping[str, object], whole: Tensor) -> tuple[int | None, tuple[int, ...]]:
    """(dim, sizes of the fused blocks) of a hint; no dim for `replicated`.

    Raises `ValueError` for a hint that makes no sense for this whole.
    """
    strange = set(hint) - KEYS
    if strange or not hint or ("replicated" in hint and dict(hint) != {"replicated": True}):
        raise ValueError(f'hint {dict(hint)}: give {{"dim": 0}}, {{"fused": [64, 16, 16]}} or {{"replicated": True}}')
    if "replicated" in hint:
        return None, ()
    dim, blocks = hint.get("dim", 0), hint.get("fused", ())
    if not isinstance(dim, int) or not -whole.dim() <= dim < whole.dim():
        raise ValueError(f"hint: dim {dim!r} of a tensor of {tuple(whole.shape)}")
    if not isinstance(blocks, Sequence) or not all(isinstance(size, int) for size in blocks):
        raise ValueError(f"hint: fused is {blocks!r}; give the sizes of the blocks, as [64, 16, 16]")
    dim %= whole.dim()
    if blocks and sum(blocks) != whole.shape[dim]:
        raise ValueError(f"hint: blocks {tuple(blocks)} make {sum(blocks)}, dim {dim} has {whole.shape[dim]}")
    return dim, tuple(blocks)


def said(hint: Mapping[str, object], whole: Tensor) -> str:
    """In words."""
    dim, blocks = checked(hint, whole)
    if dim is None:
        return "replicated"
    return f"fused blocks {blocks} of dim {dim}" if blocks else f"slices of dim {dim}"


def read(
    hint: Mapping[str, object],
    pieces: Mapping[int, Tensor],
    whole: Tensor,
    floor: float,
    groups: Sequence[Sequence[int]],
) -> Placed | str:
    """The pieces where the hint puts them; or why they do not lie there, in words."""
    dim, blocks = checked(hint, whole)
    dims = cut_dims(pieces, whole)
    wanted = [] if dim is None else [dim]
    if dims != wanted and len(pieces) > 1:
        return f"the shapes are cut along {'other dims' if dims else 'no dim'}"
    if dim is None:
        error = largest_of([error_of([piece], whole) for piece in pieces.values()])
        if within(error, floor):
            return Placed(cuts=(), error=error, elsewhere=())
        return f"so laid out, the values are {floors(error, floor):.3g} noise floors away"
    nearest = float("inf")
    for index in _indexes(pieces, whole.shape[dim], dim, blocks, groups):
        error = largest_of(
            [error_at(pieces[rank], whole, dim, places, acceptable(floor)) for rank, places in index.items()]
        )
        cut = _named(index, whole.shape[dim], dim, blocks)
        if cut is not None and within(error, floor):
            return Placed(cuts=(cut,), error=error, elsewhere=())
        nearest = min(nearest, error)
    return f"so laid out, the values are {floors(nearest, floor):.3g} or more noise floors away"


def _indexes(
    pieces: Mapping[int, Tensor], size: int, dim: int, blocks: Sequence[int], groups: Sequence[Sequence[int]]
) -> list[dict[int, Tensor]]:
    """Ways to carry the hint out: rank -> places."""
    held = {rank: piece.shape[dim] for rank, piece in pieces.items()}
    if not blocks:
        likely = slices.begins(held, size, groups)
        most = max(map(len, likely.values())) if all(likely.values()) else 0
        # Each rank's n-th guess; one that has fewer of them is sure of its last.
        starts = [{rank: begins[min(n, len(begins) - 1)] for rank, begins in likely.items()} for n in range(most)]
        return [{rank: torch.arange(start, start + held[rank]) for rank, start in way.items()} for way in starts]
    ways: list[dict[int, Tensor]] = []
    for peers in (list(group) for group in groups):
        # Fewer slices than ranks: replicas hold the same.
        for count in (n for n in range(len(peers), 0, -1) if len(peers) % n == 0):
            found = [list(fused.cut(blocks, held[rank], n % count, count)) for n, rank in enumerate(peers)]
            for way, places in enumerate(zip(*found, strict=False)):
                ways += [{}] * (way + 1 - len(ways))
                ways[way] = ways[way] | dict(zip(peers, places, strict=True))
            if all(found):
                break
    return [way for way in ways if len(way) == len(pieces)]


def _named(index: Mapping[int, Tensor], size: int, dim: int, blocks: Sequence[int]) -> Cut | None:
    cut = named(index, size, dim)
    if cut is None or not blocks:
        return cut
    # By the name that the hint gives, where the same places have several.
    return Cut(dim=dim, kind="fused", text=fused.spelled(blocks, dim), index=index, blocks=tuple(blocks))
