"""Where the hand-made parts of a parameter lie, told by the other run's whole: fused blocks, heads held by several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare.infer import infer
from shardproof.compare.layouts import in_order, split_dim
from shardproof.compare.measure import scale

ULPS = 64.0
"""Units in the last place by which parts may miss the whole: no initial values do, and weights after a step by few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Which places along one dim of a whole each peer holds, where they do not lie one after the other."""

    dim: int
    size: int
    index: tuple[Tensor, ...]
    """By peer."""

    def fits(self, pieces: Sequence[Tensor], dim: int) -> bool:
        """Whether each piece has as many places along `dim`."""
        return [piece.shape[dim] for piece in pieces] == [len(index) for index in self.index]

    def put_together(self, pieces: Sequence[Tensor], dim: int, *, add: bool = False) -> Tensor:
        """The whole along `dim` (of the tensor itself, or of an output that has its places). `add`: what several peers
        hold of the same places are addends."""
        shape = list(pieces[0].shape)
        shape[dim] = self.size
        made = torch.zeros(shape, dtype=pieces[0].dtype)
        for piece, index in zip(pieces, self.index, strict=True):
            if add:
                made.index_add_(dim, index, piece)
            else:
                made.index_copy_(dim, index, piece)
        return made


def arrangement(pieces: Sequence[Tensor], whole: Tensor) -> Arrangement | None:
    """How the peers' parts make up `whole`; None where they lie one after the other, or make up something else.

    Only orders that have a name are taken: parts that lie anywhere are as likely in the wrong place.
    """
    held = list(pieces)
    dim = split_dim(held, tuple(whole.shape))
    # Heads that neighbours share lie in order, and yet an output's width alone does not tell them.
    once = dim is not None and sum(piece.shape[dim] for piece in held) == whole.shape[dim]
    if dim is not None and once and all(map(torch.equal, held, in_order(held, whole, dim))):
        return None
    found = infer(dict(enumerate(held)), whole, ULPS * torch.finfo(whole.dtype).eps * scale(whole))
    if not found.fits or found.dim is None or found.sums or len(found.cuts) != 1:
        return None
    cut = found.cuts[0]
    index = tuple(cut.index[peer] for peer in range(len(held)))
    named = not once or cut.kind in ("fused", "interleaved")
    complete = set(torch.cat(index).tolist()) == set(range(whole.shape[found.dim]))
    if not named or not complete:
        return None
    return Arrangement(dim=found.dim, size=whole.shape[found.dim], index=index)
