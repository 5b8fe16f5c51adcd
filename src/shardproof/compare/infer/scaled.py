"""Copies of the whole times one factor: no layout, but a sum or mean that was taken once too often or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from torch import Tensor

from shardproof.compare.infer.residual import acceptable, chunks, error_of, largest_of
from shardproof.compare.measure import wide

LARGEST_DIVISOR = 1024
"""Factors are made of counts of ranks and micro-batches: a simple fraction near a fitted one is preferred."""


def factor_of(pieces: Mapping[int, Tensor], whole: Tensor, floor: float) -> tuple[float, float] | None:
    """(the factor, the largest error in the whole's own unit) where every rank holds the whole times one number.

    None where they do not, for a factor of 0 or 1, and for single numbers: each is some multiple of any other.
    """
    if whole.numel() < 2:
        return None
    first = next(iter(pieces.values()))
    cross = square = 0.0
    for start, length in chunks(whole.shape):
        want = wide(whole.narrow(0, start, length)).reshape(-1)
        cross += float(wide(first.narrow(0, start, length)).reshape(-1) @ want)
        square += float(want @ want)
    fitted = cross / square if square > 0 else math.nan
    if not math.isfinite(fitted):
        return None
    for factor in (float(Fraction(fitted).limit_denominator(LARGEST_DIVISOR)), fitted):
        if factor in (0.0, 1.0):
            continue
        limit = acceptable(floor)
        error = largest_of([error_of([piece], whole, 1 / factor, limit) for piece in pieces.values()])
        if error <= limit:
            return factor, error
    return None
