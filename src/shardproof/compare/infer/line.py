"""Where along one dim of a whole a piece lies, told by its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from shardproof.compare.infer import interleaved, permuted, slices
from shardproof.compare.infer.marks import Probes, rows_like
from shardproof.compare.infer.residual import acceptable, error_at
from shardproof.compare.measure import clear, within

MOST_TRIED = 16
"""Places looked at in full. Constants would fit at each of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Where a piece lies."""

    index: Tensor
    """Places along the dim, in the piece's order."""
    error: float
    elsewhere: bool
    """Whether the values would fit in another place as well."""


class Line:
    """One dim of a whole, with a few marks for each of its places."""

    def __init__(self, whole: Tensor, dim: int, floor: float) -> None:
        self.whole, self.dim, self.floor = whole, dim, floor
        self._probes = Probes.of(whole.shape, dim)
        self._marks = self._probes.marks(whole, dim)
        self._tolerance = self._probes.tolerance(whole, floor)

    def find(self, piece: Tensor, likely: Sequence[int]) -> Found | None:
        """Where `piece` lies, which is as long as the whole along all other dims; None if nowhere.

        `likely` are places where it may begin, the likeliest first: they decide where the values leave it open.
        """
        if not piece.shape[self.dim]:
            return Found(index=torch.empty(0, dtype=torch.long), error=0.0, elsewhere=False)
        held = self._probes.marks(piece, self.dim)
        starts = rows_like(self._marks, held[0], self._tolerance)
        if not len(starts):
            return None
        best: Found | None = None
        for number, index in enumerate(self._ordered(held, starts, likely)):
            if number == MOST_TRIED:
                break
            error = error_at(piece, self.whole, self.dim, index, limit=acceptable(self.floor))
            if not within(error, self.floor):
                continue
            if best is not None:
                # The likeliest, unless another is right where it is only not wrong.
                better = clear(error, self.floor) and not clear(best.error, self.floor)
                return Found(index=index, error=error, elsewhere=True) if better else replace(best, elsewhere=True)
            best = Found(index=index, error=error, elsewhere=False)
        if best is not None:
            return best
        for index in permuted.candidates(self._marks, held, self._tolerance):
            error = error_at(piece, self.whole, self.dim, index, limit=acceptable(self.floor))
            if within(error, self.floor):
                return Found(index=index, error=error, elsewhere=not clear(error, self.floor) or self._open(held))
        return None

    def _ordered(self, held: Tensor, starts: Tensor, likely: Sequence[int]) -> Iterator[Tensor]:
        return chain(
            slices.candidates(self._marks, held, starts, likely, self._tolerance),
            interleaved.candidates(self._marks, held, starts, self._tolerance),
        )

    def _open(self, held: Tensor) -> bool:
        """Whether some of what was found place by place could lie elsewhere."""
        followed = permuted.runs(self._marks, held, self._tolerance)
        if followed is None:
            return permuted.twins(self._marks, self._tolerance)
        return any(others for _, _, others in followed) or permuted.by_chance(
            followed, self._marks, held, self._tolerance
        )
