"""What is asked, and how an answer is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from shardproof.compare.infer.inferred import UNKNOWN, Inferred
from shardproof.compare.infer.marks import scale_of
from shardproof.compare.infer.placed import Placed, cut_dims
from shardproof.compare.infer.residual import extremes, floors
from shardproof.compare.infer.sums import listed
from shardproof.compare.measure import within

ANY_ORDER = "the same elements in another order"
A_SUM = "terms of a sum"


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The pieces of all ranks and the whole that they may make up."""

    pieces: Mapping[int, Tensor]
    whole: Tensor
    floor: float
    known: Sequence[Sequence[int]] | None
    """Sets of ranks that make up the whole each, where somebody says so."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """The known ones, or all ranks."""
        return self.known if self.known is not None else [list(self.pieces)]

    @property
    def whole_shaped(self) -> bool:
        """Whether every rank's piece is shaped like the whole."""
        return cut_dims(self.pieces, self.whole) == []

    def placed(self, placed: Placed) -> Inferred:
        """Pieces that each hold a part of the whole, or all of it."""
        holders = self.holders(placed)
        text = placed.text
        if placed.cuts and len(holders) > 1 and max(map(len, holders)) > 1:
            text += f", each on ranks {listed(holders)}"
        alternatives, reason = self.open(placed)
        return self.made(
            kind=placed.kind,
            text=text,
            cuts=placed.cuts,
            groups=holders,
            error=placed.error,
            alternatives=alternatives,
            reason=reason,
        )

    def open(self, placed: Placed) -> tuple[tuple[str, ...], str]:
        """What else would fit, and why the values do not tell."""
        size = scale_of(self.whole)
        if within(size, self.floor):
            why = "all zero" if size == 0 else "no larger than rounding"
            alternatives = (A_SUM,) if not placed.cuts else (ANY_ORDER, A_SUM)
            return alternatives, f"the whole is {why}, so that any reading fits"
        low, high = extremes(self.whole)
        if within(high - low, self.floor) and self.whole.numel() > 1:
            return (ANY_ORDER,), "all elements of the whole are the same"
        if placed.elsewhere:
            ranks = ", ".join(map(str, placed.elsewhere))
            return (ANY_ORDER,), f"parts of the whole are alike: what rank {ranks} holds occurs more than once"
        return (), ""

    def holders(self, placed: Placed) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same."""
        if not placed.cuts:
            return (tuple(self.pieces),)
        held: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for rank in self.pieces:
            held.setdefault(tuple(tuple(cut.index[rank].tolist()) for cut in placed.cuts), []).append(rank)
        return tuple(tuple(ranks) for ranks in held.values())

    def nowhere(self, reason: str, residual: float, text: str = "unknown") -> Inferred:
        """No reading fits."""
        return replace(self.made(kind=UNKNOWN, text=text, error=0.0, reason=reason), residual=residual)

    def made(self, *, error: float, **told: object) -> Inferred:
        """An answer: `error` in the tensor's own unit, and the other fields of `Inferred`."""
        return Inferred(
            shape=tuple(self.whole.shape),
            ranks=tuple(self.pieces),
            residual=floors(error, self.floor),
            **told,  # type: ignore[arg-type]
        )
