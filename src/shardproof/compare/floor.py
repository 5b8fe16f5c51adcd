"""The noise floor of a tensor, from how far the disturbed runs of the reference moved it."""

from __future__ import annotations

from collections.abc import Sequence

Moved = tuple[bool, float, float]
"""Whether the draw's loss was scaled, how far it moved the tensor, one unit in the last place of the tensor."""

FAR = 64.0
"""Times as far as without a factor on its loss that a draw may move a tensor. Beyond that, in every scaled draw, the
gradient does not grow with the loss, and dividing the factor out of it was no rounding."""


def floor_of(moved: Sequence[Moved]) -> float:
    """The largest move that rounding can account for."""
    plain = [far for scaled, far, _ in moved if not scaled]
    scaled = [far for is_scaled, far, _ in moved if is_scaled]
    most = max(plain, default=0.0)
    limit = FAR * max([most, *(ulp for _, _, ulp in moved)], default=0.0)
    # A kink or a tie that one draw happens to cross is rounding all the same; what all of them show is not.
    if plain and scaled and min(scaled) > limit:
        return most
    return max(most, max(scaled, default=0.0))
