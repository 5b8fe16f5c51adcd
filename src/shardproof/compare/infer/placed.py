"""Where the pieces of all ranks lie in one whole, along however many dims they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from shardproof.compare import layouts
from shardproof.compare.infer import fused, interleaved, permuted, slices
from shardproof.compare.infer.inferred import Cut
from shardproof.compare.infer.line import Found, Line
from shardproof.compare.infer.residual import acceptable, error_at, error_of, largest_of
from shardproof.compare.infer.settle import settle
from shardproof.compare.measure import within

MOST_PARTS = 64
"""Parts of one dim that are tried, where another dim is cut as well."""

Part = tuple[int, int, int, int]
"""Dim, first place, step and number of places."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A reading that puts every piece somewhere."""

    cuts: tuple[Cut, ...]
    error: float
    elsewhere: tuple[int, ...]
    """Ranks whose piece would fit in another place as well."""
    misfit: str = ""
    """Why the pieces make up no whole all the same."""

    @property
    def text(self) -> str:
        """In words."""
        return " and ".join(cut.text for cut in self.cuts) if self.cuts else "replicated"

    @property
    def kind(self) -> str:
        """Of the one dim that is cut, or `grid`."""
        if not self.cuts:
            return "replicated"
        return self.cuts[0].kind if len(self.cuts) == 1 else "grid"


class Places:
    """One whole, and what was found out about its dims."""

    def __init__(self, whole: Tensor, floor: float) -> None:
        self.whole, self.floor = whole, floor
        self._lines: dict[tuple[tuple[Part, ...], int], Line] = {}

    def read(self, pieces: Mapping[int, Tensor], groups: Sequence[Sequence[int]]) -> Placed | None:
        """Where the pieces lie; None where one of them lies nowhere. `groups` make up a whole each, if known."""
        dims = cut_dims(pieces, self.whole)
        if dims is None:
            return None
        if not dims:
            limit = acceptable(self.floor)
            error = largest_of([error_of([piece], self.whole, limit=limit) for piece in pieces.values()])
            return Placed(cuts=(), error=error, elsewhere=()) if within(error, self.floor) else None
        likely = {}
        for dim in dims:
            extents = {rank: piece.shape[dim] for rank, piece in pieces.items()}
            likely[dim] = slices.begins(extents, self.whole.shape[dim], groups)
        found: dict[int, dict[int, Found]] = {}
        for rank, piece in pieces.items():
            one = self._find(piece, dims, {dim: likely[dim][rank] for dim in dims})
            if one is None:
                return None
            found[rank] = one
        placed = self._joined(pieces, found, dims)
        if placed.misfit and placed.elsewhere:
            again = self._joined(pieces, settle(pieces, found, self.whole, self.floor), dims)
            return placed if again.misfit else again
        return placed

    def anyhow(self, pieces: Mapping[int, Tensor], dim: int) -> Placed | None:
        """Pieces as long as the whole, whose places along `dim` are in another order."""
        line = self._line((), dim)
        found = {}
        for rank, piece in pieces.items():
            one = line.find(piece, ())
            if one is None:
                return None
            found[rank] = {dim: one}
        return self._joined(pieces, found, [dim])

    def _joined(
        self, pieces: Mapping[int, Tensor], found: Mapping[int, Mapping[int, Found]], dims: Sequence[int]
    ) -> Placed:
        error = largest_of([one.error for entry in found.values() for one in entry.values()])
        elsewhere = tuple(rank for rank, entry in found.items() if any(one.elsewhere for one in entry.values()))
        index = {dim: {rank: found[rank][dim].index for rank in found if pieces[rank].numel()} for dim in dims}
        cuts = [named(index[dim], self.whole.shape[dim], dim) for dim in dims]
        placed = Placed(cuts=tuple(cut for cut in cuts if cut), error=error, elsewhere=elsewhere)
        if None in cuts:
            again = self._once(pieces, index[dims[0]], dims[0]) if len(dims) == 1 and elsewhere else None
            return again or replace(placed, misfit=_gaps(index, self.whole.shape))
        held = {tuple(tuple(index[dim][rank].tolist()) for dim in dims) for rank in index[dims[0]]}
        if len(dims) > 1 and sum(math.prod(map(len, box)) for box in held) < _covered(self.whole.shape, dims):
            return replace(placed, misfit=f"nobody holds some of the parts of {placed.text}")
        return _with_empty(placed, pieces)

    def _once(self, pieces: Mapping[int, Tensor], index: Mapping[int, Tensor], dim: int) -> Placed | None:
        """Each place given to one piece: where places look alike, those that were found one by one may overlap."""
        ranks = [rank for rank in pieces if rank in index]
        order = layouts.slices([pieces[rank] for rank in ranks], self.whole, dim, self.floor)
        if order is None:
            return None
        cut = named(dict(zip(ranks, order, strict=True)), self.whole.shape[dim], dim)
        if cut is None:
            return None
        errors = [error_at(pieces[r], self.whole, dim, places) for r, places in zip(ranks, order, strict=True)]
        placed = Placed(cuts=(cut,), error=largest_of(errors), elsewhere=tuple(ranks))
        return _with_empty(placed, pieces)

    def _find(self, piece: Tensor, dims: Sequence[int], likely: Mapping[int, Sequence[int]]) -> dict[int, Found] | None:
        if not piece.numel():
            empty = torch.empty(0, dtype=torch.long)
            return {dim: Found(index=empty, error=0.0, elsewhere=False) for dim in dims}
        # The dim that is cut most finely is searched place by place, the others by whole parts.
        for fine in sorted(dims, key=lambda dim: piece.shape[dim] / max(self.whole.shape[dim], 1)):
            best: dict[int, Found] | None = None
            for path in self._paths(piece, [dim for dim in dims if dim != fine]):
                one = self._line(path, fine).find(piece, likely[fine])
                if one is None:
                    continue
                if best is not None:
                    return {dim: replace(entry, elsewhere=True) for dim, entry in best.items()}
                best = {dim: Found(index=_range(part), error=0.0, elsewhere=False) for part in path for dim in part[:1]}
                best[fine] = one
            if best is not None:
                return best
        return None

    def _paths(self, piece: Tensor, dims: Sequence[int]) -> Iterator[tuple[Part, ...]]:
        """Ways in which parts of `dims` can be combined."""
        if not dims:
            yield ()
            return
        for rest in self._paths(piece, dims[1:]):
            for part in _parts(dims[0], piece.shape[dims[0]], self.whole.shape[dims[0]]):
                yield (part, *rest)

    def _line(self, path: tuple[Part, ...], dim: int) -> Line:
        if (path, dim) not in self._lines:
            part = self.whole
            for cut in path:
                part = part[(slice(None),) * cut[0] + (slice(cut[1], cut[1] + cut[2] * (cut[3] - 1) + 1, cut[2]),)]
            self._lines[path, dim] = Line(part, dim, self.floor)
        return self._lines[path, dim]


def cut_dims(pieces: Mapping[int, Tensor], whole: Tensor) -> list[int] | None:
    """The dims along which some piece is shorter than the whole; None where a piece is no part of it."""
    for piece in pieces.values():
        longer = any(a > b for a, b in zip(piece.shape, whole.shape, strict=False))
        if piece.dim() != whole.dim() or longer:
            return None
    return [dim for dim in range(whole.dim()) if any(p.shape[dim] != whole.shape[dim] for p in pieces.values())]


def named(index: Mapping[int, Tensor], size: int, dim: int) -> Cut | None:
    """How a dim of `size` is cut, the simplest name that fits; None where the places do not make it up."""
    text = slices.named(index, size, dim)
    if text:
        return Cut(dim=dim, kind="slice", text=text, index=index)
    single = interleaved.named(index, size, dim)
    if single and " in blocks of " not in single:
        return Cut(dim=dim, kind="interleaved", text=single, index=index)
    text, blocks = fused.named(index, size, dim)
    if text:
        return Cut(dim=dim, kind="fused", text=text, index=index, blocks=blocks)
    if single:
        return Cut(dim=dim, kind="interleaved", text=single, index=index)
    text = permuted.named(index, size, dim)
    return Cut(dim=dim, kind="permuted", text=text, index=index) if text else None


def spelled(order: Sequence[Tensor], dim: int) -> str:
    """Places of each peer in words: by the name that they have, or `rearranged slices of dim 0`."""
    index = dict(enumerate(order))
    size = 1 + max((int(places.max()) for places in order if len(places)), default=-1)
    cut = named(index, size, dim)
    return cut.text if cut is not None and cut.kind in ("fused", "interleaved") else f"rearranged slices of dim {dim}"


def _parts(dim: int, held: int, size: int) -> Iterator[Part]:
    """Parts of a dim that a piece may hold: even ones in order, then places dealt out in turn."""
    if held == size:
        yield dim, 0, 1, size
        return
    starts = [*range(0, size - held + 1, max(held, 1)), size - held]
    for start in list(dict.fromkeys(starts))[:MOST_PARTS]:
        yield dim, start, 1, held
    step = -(-size // held)
    if held > 1 and step > 1:
        for start in range(min(step, MOST_PARTS)):
            if len(range(start, size, step)) == held:
                yield dim, start, step, held


def _range(part: Part) -> Tensor:
    _, start, step, number = part
    return start + step * torch.arange(number)


def _covered(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[dim] for dim in dims)


def _with_empty(placed: Placed, pieces: Mapping[int, Tensor]) -> Placed:
    """Ranks that hold nothing are given as many places as their shape says: along some dim, none."""
    cuts = []
    for cut in placed.cuts:
        nothing = {rank: torch.arange(p.shape[cut.dim]) for rank, p in pieces.items() if rank not in cut.index}
        cuts.append(replace(cut, index={**nothing, **cut.index}))
    return replace(placed, cuts=tuple(cuts))


def _gaps(index: Mapping[int, Mapping[int, Tensor]], shape: Sequence[int]) -> str:
    """What is wrong with places that do not make up a whole."""
    for dim, places in index.items():
        held = torch.zeros(shape[dim], dtype=torch.bool)
        for one in places.values():
            held[one] = True
        missing = (~held).nonzero()[:, 0].tolist()
        if missing:
            end = next((a + 1 for a, b in pairwise(missing) if b != a + 1), missing[-1] + 1)
            return f"nobody holds {missing[0]}:{end} of dim {dim}" + (", and more" if end <= missing[-1] else "")
    return f"the ranks' slices of dim {', '.join(map(str, index))} overlap"
