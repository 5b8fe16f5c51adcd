"""What was found out about a layout: plain data, enough to take any rank's elements of a tensor shaped alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

UNKNOWN = "unknown"
"""The kind of a layout that none of the readings explains."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """How one dim of the whole is shared out among the ranks."""

    dim: int

    kind: str
    """`slice`, `fused`, `interleaved` or `permuted`."""

    text: str
    """In words, as `fused: 3 blocks (64, 16, 16) of dim 0, a slice of each per rank`."""

    index: Mapping[int, Tensor] = field(repr=False)
    """Rank -> the places along `dim` that it holds, in its own order: (places,) int64."""

    blocks: tuple[int, ...] = ()
    """Sizes of fused blocks, in order."""

    def take(self, rank: int, whole: Tensor) -> Tensor:
        """The rank's places along the dim: a view where they lie one after the other."""
        index = self.index[rank]
        if len(index) and bool((index[1:] == index[:-1] + 1).all()):
            return whole.narrow(self.dim, int(index[0]), len(index))
        return whole.index_select(self.dim, index.to(whole.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Inferred:
    """A layout as the values tell it."""

    kind: str
    """`replicated`; of a dim that is cut: `slice`, `fused`, `interleaved`, `permuted`, or `grid` where several dims
    are; `partial` or `mean` where ranks hold terms of a sum or mean (of the whole or, where there are `cuts`, of a
    part of it); `scaled` where each holds the whole times one factor, which is no layout; `unknown`."""

    text: str
    """In words, as `slices of dim 0`; of an unknown one the nearest reading."""

    shape: tuple[int, ...]
    """Of the whole."""

    ranks: tuple[int, ...]

    cuts: tuple[Cut, ...] = ()
    """The dims that are cut. Of an unknown layout: none."""

    flat: bool = False
    """Whether the ranks hold parts of the flattened whole; dim 0 is then the flattened one."""

    sums: tuple[tuple[int, ...], ...] = ()
    """Groups of ranks whose tensors add up (or, where the kind is `mean`, average) to their part of the whole."""

    factor: float = 1.0
    """got / whole, where the kind is `scaled`."""

    groups: tuple[tuple[int, ...], ...] = ()
    """Ranks that hold the same elements, or terms of the sum of the same elements."""

    residual: float
    """The largest deviation in units of the noise floor; infinite where nothing can be compared, NaN for NaN."""

    alternatives: tuple[str, ...] = field(default=())
    """Other readings that fit the values as well."""

    reason: str = ""
    """Why the values leave it open, or why nothing fits."""

    contradicts: str = ""
    """What the hint said, where the values say otherwise."""

    @property
    def fits(self) -> bool:
        """Whether the values bear the reading out."""
        return self.kind != UNKNOWN

    @property
    def ambiguous(self) -> bool:
        """Whether the values would bear out another reading as well."""
        return bool(self.alternatives)

    @property
    def dim(self) -> int | None:
        """The dim that is cut; None where none is, or several are, or the flattened whole is cut."""
        return self.cuts[0].dim if len(self.cuts) == 1 and not self.flat else None

    def take(self, rank: int, whole: Tensor) -> Tensor:
        """What `rank` holds of a tensor shaped like the whole; of a sum or mean, what its group's result should be.

        Raises `ValueError` for an unknown layout or another shape, `KeyError` for a rank that showed nothing.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"a tensor of {tuple(whole.shape)} cannot be laid out as one of {self.shape}")
        if not self.fits:
            raise ValueError(f"the layout is not known ({self.reason}), so that nothing can be taken by it")
        if rank not in self.ranks:
            raise KeyError(rank)
        part = whole.reshape(-1) if self.flat else whole
        for cut in self.cuts:
            part = cut.take(rank, part)
        return part * self.factor if self.kind == "scaled" else part
