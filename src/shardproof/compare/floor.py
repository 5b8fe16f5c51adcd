"""The noise floor of a tensor, from how far the disturbed runs of the reference moved it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from shardproof.compare.measure import look, ulp
from shardproof.trace.trace import Trace


class Moved(NamedTuple):
    """What one disturbed run did to one tensor."""

    scaled: bool
    """Whether a factor was put on its loss, and divided out of the gradients."""
    far: float
    """The largest move of an element."""
    ulp: float
    """One unit in the last place of the tensor's largest element."""
    size: float
    """That element."""


FAR = 64.0
"""Times as far as without a factor on its loss that a draw may move a tensor. Beyond that, in every scaled draw, and by
more than `SEEN` of its size, the gradient does not grow with the loss, and dividing the factor out was no rounding."""

SEEN = 1e-4
"""Share of a tensor's size. The factors lie an eighth and more from 1; in a chaotic run rounding grows through this
too, but then in the draw without a factor as well."""


def floor_of(moved: Sequence[Moved]) -> float:
    """The largest move that rounding can account for."""
    plain = [one.far for one in moved if not one.scaled]
    scaled = [one.far for one in moved if one.scaled]
    most = max(plain, default=0.0)
    limits = [max(FAR * most, FAR * one.ulp, SEEN * one.size) for one in moved]
    # A kink or a tie that one draw happens to cross is rounding all the same; what all of them show is not.
    if plain and scaled and min(scaled) > max(limits):
        return most
    return max(most, max(scaled, default=0.0))


def moved(value: Tensor, want: Tensor, *, scaled: bool) -> Moved | None:
    """How far a disturbed run moved one tensor; None where it says nothing: of another shape, or run into NaN."""
    if value.shape != want.shape:
        return None
    far, size = look(value, want)
    return Moved(scaled, far, ulp(want, size), size) if math.isfinite(far) else None


def measured(reference: Trace, draws: Sequence[Trace]) -> dict[int, float]:
    """Number of a record of `reference` -> its noise floor, from the same run repeated with rounding disturbed.

    Without factors on the loss, which nobody can put on another's loop, long sums of gradients round alike in all
    draws, and floors come out lower than those of `shardproof check`. A record that no draw shows has none.
    """
    numbers = {(record.key, record.call): number for number, record in enumerate(reference.records)}
    moves: dict[int, list[Moved]] = defaultdict(list)
    for draw in draws:
        for at, record in enumerate(draw.records):
            # Found by key: where values decide which module runs (routing), a draw may show more or fewer tensors.
            number = numbers.get((record.key, record.call))
            if number is None or record.missing or reference.records[number].missing:
                continue
            found = moved(draw.tensor(at), reference.tensor(number), scaled=False)
            if found is not None:
                moves[number].append(found)
    return {number: floor_of(found) for number, found in moves.items()}


def as_norm(floor: float, numel: int) -> float:
    """The floor of a tensor's 2-norm, for one of its largest element: as if every element were off by that much."""
    return floor * math.sqrt(numel)
