"""Was something computed or sent in fewer digits than the run has?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardproof.compare.activations import aligned
from shardproof.compare.measure import wide
from shardproof.diagnose.case import Case, Diagnosis

NARROW = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes of fewer digits, most digits first."""

FEW = 8
"""Fewer numbers than this say nothing about how they were rounded."""

DIVISORS = 16
"""Ranks and micro-batches over which a mean of narrow numbers may have been taken."""

ULPS = 64.0
"""Units in the last place of the narrow dtype that a sum of rounded terms may be off by, of its largest element."""


def lost(case: Case) -> Diagnosis | None:
    """The error is that of a narrower dtype: small beside every element, and of no other shape."""
    pairs = _pairs(case)
    if pairs is None:
        return None
    got, want = pairs
    moved = got != want
    if int(moved.sum()) < FEW or not bool(got.isfinite().all()):
        return None
    size = float(want.abs().max())
    error = float((got - want).abs().max())
    own = torch.finfo(case.reference.tensors(case.first.key)[0].dtype).eps
    for name, dtype in NARROW.items():
        eps = torch.finfo(dtype).eps
        if eps <= own:
            continue
        times = _whole(got, dtype) if error <= ULPS * eps * size else 0
        # Rounding spreads to both sides, and is no smaller than half a unit: a fault has a direction and any size. So
        # small an error as float32's is hardly ever anything else; a larger one is told by the values alone.
        noise = dtype == torch.float32 and eps / 32 * size <= error <= ULPS / 8 * eps * size
        if times or (noise and _both_sides(got - want) and _follows_size(got, want, eps)):
            said = (
                f"{'all its values' if times == 1 else f'{times} times each of its values'} are whole {name} numbers"
                if times
                else f"it is off by at most {error / (eps * size):.2g} units in the last place of {name}, to both sides"
            )
            if not case.fits(f"rounded to {name}", 0.0):
                return None
            dtype_of_run = str(case.reference.tensors(case.first.key)[0].dtype).removeprefix("torch.")
            return Diagnosis(
                cause="precision",
                evidence=f"{said}: the run is in {dtype_of_run}, whose rounding moves it by {case.first.floor:.2g}",
                fix=f"find what is computed, stored or reduced in {name} here (a cast, reduce_dtype, a buffer) and "
                "keep it in the run's own dtype",
            )
    return None


def _pairs(case: Case) -> tuple[Tensor, Tensor] | None:
    first = case.first
    want = case.reference.tensors(first.key)
    if not want or not want[0].is_floating_point() or math.isnan(first.error):
        return None
    if first.stage in ("forward", "backward"):
        shown = aligned(first.key, case.observed, case.reference)
        got = [(one.got.reshape(-1), one.want.reshape(-1)) for one in shown]
    else:
        got = [(share.got, share.take(wide(want[0]))) for share in case.shares(first)]
    wrong = [(g, w) for g, w in got if g.numel() and not torch.equal(g, w)]
    if not wrong:
        return None
    return torch.cat([g for g, _ in wrong]), torch.cat([w for _, w in wrong])


def _whole(got: Tensor, dtype: torch.dtype) -> int:
    """The smallest number by which all values have to be multiplied to be whole in `dtype` (a mean over as many ranks
    was divided in more digits); 0 where there is none."""
    for times in range(1, DIVISORS + 1):
        many = got * times
        narrow = many.to(dtype).to(torch.float64)
        if bool(((narrow - many).abs() <= 4 * torch.finfo(torch.float64).eps * many.abs()).all()):
            return times
    return 0


def _both_sides(far: Tensor) -> bool:
    moved = far[far != 0]
    up = int((moved > 0).sum())
    # Four standard deviations of a fair coin.
    return abs(2 * up - len(moved)) <= 4 * math.sqrt(len(moved)) and 0 < up < len(moved)


def _follows_size(got: Tensor, want: Tensor, eps: float) -> bool:
    """Whether nearly all elements are off by a few units in the last place of their own size, or of a sum's."""
    near = (got - want).abs() <= 8 * eps * want.abs().clamp(min=float(want.abs().median()) + 1e-300)
    return float(near.to(torch.float64).mean()) > 0.95
