"""How sketches of a run lie to the reference's: a factor, a direction, a sum. Diagnosis asks for these.

All of it is linear algebra on 256 numbers. What is exactly so of the tensors is so of their sketches, up to rounding;
what is only nearly so is estimated, as norms are (docs/sketches.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.trace.sketch import norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Sketches of a run held against one of the reference: residuals are estimated 2-norms, in the tensor's unit."""

    size: float
    """Of the reference's tensor."""

    factors: tuple[float, ...]
    """Per sketch: the number that brings factor * want nearest to it; NaN where the reference is zero or either holds
    anything infinite."""

    residuals: tuple[float, ...]
    """Per sketch: |got - factor * want|."""

    together: float
    """|sum of all - want|: small where they are partial sums of it."""

    factor_together: float
    """The number that brings factor * want nearest to the sum of all."""

    residual_together: float
    """|sum of all - factor_together * want|."""


def fitted(want: Tensor, got: Sequence[Tensor]) -> Fitted:
    """Whether each of `got` is a multiple of `want`, and whether all of them add up to it. Shapes (16, 16)."""
    want = want.to(torch.float64)
    each = [one.to(torch.float64) for one in got]
    total = torch.stack(each).sum(0) if each else torch.zeros_like(want)
    factors = tuple(factor(want, one) for one in each)
    whole = factor(want, total)
    return Fitted(
        size=norm(want),
        factors=factors,
        residuals=tuple(norm(one - fit * want) for one, fit in zip(each, factors, strict=True)),
        together=norm(total - want),
        factor_together=whole,
        residual_together=norm(total - whole * want),
    )


def factor(want: Tensor, got: Tensor) -> float:
    """The number that brings factor * want nearest to `got`: NaN where there is none."""
    want, got = want.to(torch.float64).reshape(-1), got.to(torch.float64).reshape(-1)
    square = float(want @ want)
    found = float(got @ want) / square if square > 0 else math.nan
    return found if math.isfinite(found) else math.nan


def direction(first: Tensor, second: Tensor) -> float:
    """The cosine between the tensors of two sketches, from -1 to 1: exact where one is a multiple of the other, else
    estimated to about 0.06. NaN where either is zero, or holds NaN or infinities."""
    first, second = first.to(torch.float64).reshape(-1), second.to(torch.float64).reshape(-1)
    sizes = float(first.norm() * second.norm())
    cosine = float(first @ second) / sizes if sizes > 0 else math.nan
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan
