"""The noise floor of a tensor, from how far the disturbed runs of the reference moved it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
