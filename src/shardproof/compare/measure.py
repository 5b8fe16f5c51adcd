"""How far one tensor is from another, and what that distance means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardproof.compare.stream import Differences, chunks, furthest_from_zero, same_words
from shardproof.compare.stream import wide as wide
from shardproof.compare.verdict import Sample, Verdict
from shardproof.parallel.piece import Piece

MULTIPLE = 6.0
"""Noise floors beyond which a tensor is different.

Right code drawn at random lies at most 2.3 floors from the reference, 3.3 in bfloat16; the smallest bug, a norm
gradient that lacks half of its sum in bfloat16, lies 6.2 floors away or more (docs/noise-floor.md).
"""

CLEAR = 2.0
"""Noise floors within which a reading of the values is taken at once. Right ones lie there; between this and `MULTIPLE`
lies also many a wrong one of a tensor that is hardly larger than its floor, so that the others are tried too."""

DROWNED_SHARE = 0.5
"""Share of a tensor's largest element from which on its floor leaves nothing to compare."""

DROWNED = "rounding alone moves it by as much as its own size"

SHOWN = 4
"""Elements shown side by side for a tensor that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A rank's piece and the same elements of the reference."""

    rank: int
    got: Tensor
    want: Tensor
    piece: Piece | None = None
    offset: tuple[int, ...] = ()
    """First index of `want` in the canonical tensor, where there is no `piece` that knows it."""

    def index(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Index into the canonical tensor of the element at `local`."""
        if self.piece is not None:
            return self.piece.index(local)
        offset = self.offset or (0,) * len(local)
        return tuple(start + at for start, at in zip(offset, local, strict=True))


def distance(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| per element in float64; 0 where both are the same infinity, NaN wherever one is NaN."""
    far = (wide(got) - wide(want)).abs()
    if not (got.is_floating_point() or want.is_floating_point()):
        # Beyond 2**53 float64 no longer tells whole numbers apart.
        far = far.clamp(min=1.0)
    return torch.where(got == want, 0.0, far)


def furthest(got: Tensor, want: Tensor) -> float:
    """The largest element of `distance(got, want)`, in one pass that holds a few chunks.

    Of several chunks whose largest differences round to the same number of float32 the first one's is given: it is the
    largest, or less than a part in 2**23 below it.
    """
    return look(got, want).far


class Look(NamedTuple):
    """What one pass over two tensors tells."""

    far: float
    """`furthest(got, want)`."""
    size: float
    """`scale(want)`."""


def look(got: Tensor, want: Tensor) -> Look:
    """How far apart two tensors are, and how large the trusted one is, while each chunk is in the cache."""
    got, want = _alike(got, want)
    differences = Differences(got, want)
    far = seen = size = 0.0
    for _, (one, other) in chunks(got, want):
        here = furthest_from_zero(other)
        finite = math.isfinite(here)
        size = max(size, here if finite else _finite_scale(other))
        if finite and same_words(one, other):
            continue
        rounded = differences.rounded(one, other) if differences.possible else math.nan
        if rounded <= seen and far:
            continue
        if math.isfinite(rounded):
            seen, here = rounded, differences.exact(one, other, rounded)
        else:
            here = largest(distance(one, other))
        # NaN is further than anything, and stays.
        far = math.nan if math.isnan(far) or math.isnan(here) else max(far, here)
    return Look(far, size)


def _alike(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one shape, as an operator would take them."""
    if got.shape == want.shape:
        return got, want
    got, want = torch.broadcast_tensors(got, want)  # type: ignore[no-untyped-call]
    return got, want


def largest(distances: Tensor) -> float:
    """The largest element; NaN if there is one, 0 for an empty tensor."""
    return float(distances.max()) if distances.numel() else 0.0


def scale(tensor: Tensor) -> float:
    """max|x| over the finite elements; 0 for none."""
    size = 0.0
    for _, (piece,) in chunks(tensor):
        here = furthest_from_zero(piece)
        size = max(size, here if math.isfinite(here) else _finite_scale(piece))
    return size


def _finite_scale(piece: Tensor) -> float:
    """`scale` of a piece that may hold anything."""
    values = wide(piece).abs()
    return float(torch.where(values.isfinite(), values, 0.0).max())


def ulp(tensor: Tensor, size: float | None = None) -> float:
    """One unit in the last place of the tensor's largest element: less than that, no floor can be.

    `size` is that element, where it is known.
    """
    if not tensor.is_floating_point():
        return 0.0
    return (scale(tensor) if size is None else size) * torch.finfo(tensor.dtype).eps


def within(error: float, floor: float) -> bool:
    """Whether rounding can have done this. Written so that NaN fails."""
    return error <= MULTIPLE * floor


def drowned(error: float, floor: float, size: float) -> bool:
    """Whether rounding alone moves a tensor, whose largest element is `size`, by about as much as it is large, so that
    an error beyond `MULTIPLE` floors says nothing either.

    What is left of the tensor is noise, and noise has long tails: the square of a gradient that is zero in mathematics
    (Adam's second moment of an attention key's bias) is off by the square of its floors. An error beyond that square is
    a fault all the same. NaN is never drowned.
    """
    return floor >= DROWNED_SHARE * size and error <= MULTIPLE**2 * floor


def clear(error: float, floor: float) -> bool:
    """Whether rounding does this all the time. Written so that NaN fails."""
    return error <= CLEAR * floor


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All pieces of one tensor against the reference."""

    verdict: Verdict
    error: float
    ranks: tuple[int, ...]
    """Ranks whose piece differs."""
    ratio: float | None
    samples: tuple[Sample, ...]
    errors: tuple[float | None, ...] = ()
    """As `Comparison.errors`."""

    @classmethod
    def impossible(cls, ranks: Iterable[int]) -> Outcome:
        """Pieces that make up no whole, so that there is nothing to hold them against."""
        return cls(verdict=Verdict.DIFFERENT, error=float("inf"), ranks=tuple(ranks), ratio=None, samples=())


def judge(pairs: Iterable[Pair], floor: float, looks: Sequence[Look] = ()) -> Outcome:
    """Hold every piece against its part of the reference; `looks`, one of each pair, where they are known already."""
    pairs = list(pairs)
    known = looks or [look(pair.got, pair.want) for pair in pairs]
    errors = [(one.far, pair) for one, pair in zip(known, pairs, strict=True)]
    wrong = [pair for error, pair in errors if not within(error, floor)]
    # NaN compares with nothing, so that max() alone could lose it.
    error = max((error for error, _ in errors if error == error), default=0.0)
    if any(value != value for value, _ in errors):
        error = float("nan")
    if wrong:
        verdict = Verdict.DIFFERENT
    elif error == 0:
        verdict = Verdict.EQUAL
    else:
        verdict = Verdict.ROUNDING
    return Outcome(
        verdict=verdict,
        error=error,
        ranks=tuple(sorted({pair.rank for pair in wrong})),
        ratio=constant_ratio(pairs, floor) if wrong else None,
        samples=tuple(worst(wrong)),
        errors=by_rank((pair.rank, error) for error, pair in errors),
    )


def by_rank(errors: Iterable[tuple[int, float]]) -> tuple[float | None, ...]:
    """The largest error on each rank, in order, None for a rank without any; empty where all are 0. NaN stays."""
    largest_of: dict[int, float] = {}
    for rank, error in errors:
        known = largest_of.get(rank, 0.0)
        largest_of[rank] = error if math.isnan(error) or error > known else known
    if not any(largest_of.values()):
        return ()
    return tuple(largest_of.get(rank) for rank in range(max(largest_of) + 1))


def constant_ratio(pairs: list[Pair], floor: float) -> float | None:
    """got / want where it is one and the same number everywhere, not 1 and not 0; else None."""
    together, square = products(pairs)
    if not square > 0 or not math.isfinite(together) or not math.isfinite(square):
        return None
    ratio = together / square
    size = max(scale(pair.want) for pair in pairs)
    if within(abs(ratio - 1) * size, floor) or within(abs(ratio) * size, floor):
        return None
    limit = floor * max(1.0, abs(ratio))
    return ratio if all(within_ratio(pair, ratio, limit) for pair in pairs) else None


def products(pairs: Iterable[Pair]) -> tuple[float, float]:
    """Sums of got * want and of want * want over all pairs, in float64.

    The first is not finite where got holds anything that is not: infinity times zero is NaN.
    """
    together = square = 0.0
    for pair in pairs:
        for _, (got, want) in chunks(*_alike(pair.got, pair.want)):
            one, other = wide(got), wide(want)
            together += float(one @ other)
            square += float(other @ other)
    return together, square


def within_ratio(pair: Pair, ratio: float, floor: float) -> bool:
    """Whether got is `ratio` times want up to rounding. Stops at the first chunk where it is not."""
    return all(
        within(float((wide(got) - ratio * wide(want)).abs().max()), floor)
        for _, (got, want) in chunks(*_alike(pair.got, pair.want))
    )


def worst(pairs: list[Pair], shown: int = SHOWN) -> list[Sample]:
    """The elements that differ most: from each wrong rank in turn, the largest difference first."""
    per_rank: dict[int, list[Sample]] = {}
    for pair in pairs:
        if pair.got.numel() and pair.rank not in per_rank:
            per_rank[pair.rank] = [_sample(pair, flat) for far, flat in _farthest(pair, shown) if far != 0]
    rows = [row for turn in range(shown) for rows in per_rank.values() for row in rows[turn : turn + 1]]
    return rows[:shown]


def _farthest(pair: Pair, shown: int) -> list[tuple[float, int]]:
    """(difference, flat index) of the elements that differ most; NaN counts as infinite."""
    got, want = _alike(pair.got, pair.want)
    differences = Differences(got, want)
    found: list[tuple[float, int]] = []
    for start, (one, other) in chunks(got, want):
        if len(found) == shown and differences.possible:
            # A chunk of which nothing is further than the least of those found has nothing to add.
            rounded, least = differences.rounded(one, other), found[-1][0]
            if rounded < differences.rounding(least):
                continue
            if math.isfinite(rounded) and differences.exact(one, other, rounded) <= least:
                continue
        far = torch.nan_to_num(distance(one, other), nan=float("inf"))
        most = far.topk(min(shown, far.numel()))
        here = zip(most.values.tolist(), most.indices.tolist(), strict=True)
        found = sorted([*found, *((value, start + at) for value, at in here)], key=lambda one: -one[0])[:shown]
    return found


def _sample(pair: Pair, flat: int) -> Sample:
    local: list[int] = []
    rest = flat
    for size in reversed(pair.want.shape):
        rest, at = divmod(rest, size)
        local.append(at)
    index = tuple(reversed(local))
    return Sample(
        rank=pair.rank,
        index=pair.index(index),
        got=float(wide(pair.got.reshape(pair.want.shape)[index])),
        want=float(wide(pair.want[index])),
    )
