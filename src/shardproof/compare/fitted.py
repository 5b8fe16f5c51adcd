"""The factor between two sketches: exact, up to rounding, where one tensor is a multiple of the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factor(want: Tensor, got: Tensor) -> float:
    """The number that brings factor * want nearest to `got`: NaN where there is none."""
    want, got = want.to(torch.float64).reshape(-1), got.to(torch.float64).reshape(-1)
    square = float(want @ want)
    found = float(got @ want) / square if square > 0 else math.nan
    return found if math.isfinite(found) else math.nan
