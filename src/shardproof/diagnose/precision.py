"""Was something computed or sent in fewer digits than the run has?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardproof.compare.activations import aligned
from shardproof.compare.measure import wide
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.forward import spread, vectors

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes of fewer digits, fewest first: what is whole in one is mostly whole in the next."""

TENSORS = 8
"""Wrong tensors of a stage that are looked at together."""

FEW = 8
"""Fewer numbers than this say nothing about how they were rounded."""

DIVISORS = 16
"""Ranks and micro-batches over which a mean of narrow numbers may have been taken."""

ULPS = 64.0
"""Units in the last place of the narrow dtype that a sum of rounded terms may be off by, of its largest element."""

NEAR = 24.0
"""Noise floors by which an element may miss what it is said to be made of."""

MOST = 0.98
"""Share of elements that have to come out as they were found."""


def lost(case: Case) -> Diagnosis | None:
    """The error is that of a narrower dtype: small beside the tensor, and of no other shape."""
    return next((found for pairs in _pairs(case) if (found := _narrowed(pairs, case)) is not None), None)


def added_up(case: Case) -> Diagnosis | None:
    """Gradients that were rounded to a narrower dtype between micro-batches: the same is done to what each part of the
    batch contributes, and gives the very values. Sums of rounded numbers are no rounded numbers themselves."""
    known = set.intersection(*(set(part.gradients) for part in case.contributions)) if case.contributions else set()
    told = [c for c in case.wrong if c.name in known and c.floor > 0][:TENSORS]
    if not told or case.facts.microbatches < 2:
        return None
    of_run = torch.finfo(case.reference.tensors(told[0].key)[0].dtype).eps
    for name, dtype in NARROW.items():
        if torch.finfo(dtype).eps > of_run and all(_added_up(c, dtype, case) for c in told):
            case.fits(f"sums rounded to {name} between micro-batches", 0.0)
            return Diagnosis(
                cause="precision",
                evidence=f"what the micro-batches contribute to {told[0].name}, rounded to {name} after each but the "
                f"last, adds up to what was found; so it does in all {len(told)} gradients that were tried",
                fix=f"accumulate gradients in the run's own dtype: look for a cast to {name} between micro-batches",
            )
    return None


def _added_up(comparison: Comparison, dtype: torch.dtype, case: Case) -> bool:
    total = sum(part.count for part in case.contributions)
    readers: dict[int, list[Tensor]] = {}
    for part in sorted(case.contributions, key=lambda part: part.microbatch):
        # Ranks add up what their mean over ranks is made of.
        local = part.gradients[comparison.name] * (part.count / total) * case.facts.parallelism.dp
        own = readers.setdefault(part.reader, [])
        own.append(local + own[-1].to(dtype).to(local.dtype) if own else local)
    made = torch.stack([own[-1] for own in readers.values()]).sum(0) / case.facts.parallelism.dp
    held = case.shares(comparison)
    near = [((s.got - s.take(made)).abs() <= NEAR * comparison.floor).to(torch.float64) for s in held if s.got.numel()]
    # An element that lies between two numbers of the narrow dtype may have gone to the other one.
    return bool(near) and float(torch.cat(near).mean()) >= MOST


def _narrowed(pairs: Sequence[tuple[Tensor, Tensor]], case: Case) -> Diagnosis | None:
    if sum(int((got != want).sum()) for got, want in pairs) < FEW:
        return None
    if not all(bool(got.isfinite().all()) for got, _ in pairs):
        return None
    dtype_of_run = case.reference.tensors(case.first.key)[0].dtype
    for name, dtype in NARROW.items():
        if torch.finfo(dtype).eps <= torch.finfo(dtype_of_run).eps:
            continue
        said = _rounded(pairs, dtype, name, dtype_of_run)
        if said and case.fits(f"rounded to {name}", 0.0):
            return Diagnosis(
                cause="precision",
                evidence=f"{said}: the run is in {str(dtype_of_run).removeprefix('torch.')}, where rounding moves "
                f"{case.first.floor:.2g}",
                fix=f"find what is computed, stored or reduced in {name} here (a cast, reduce_dtype, a buffer) and "
                "keep it in the run's own dtype",
            )
    return None


def _rounded(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, name: str, dtype_of_run: torch.dtype) -> str:
    """In words how the tensors were rounded to `dtype`; empty where they were not."""
    eps = torch.finfo(dtype).eps
    # Each beside its own size: a gradient that is zero but for rounding has none.
    sizes = [float(want.abs().max()) for _, want in pairs]
    errors = [float((got - want).abs().max()) for got, want in pairs]
    if any(error > ULPS * eps * size for error, size in zip(errors, sizes, strict=True)):
        return ""
    times = _whole(torch.cat([got for got, _ in pairs]), dtype, torch.finfo(dtype_of_run).eps)
    if times:
        return f"{'all values' if times == 1 else f'{times} times each value'} are whole {name} numbers"
    # Rounding spreads to both sides, and is no smaller than half a unit: a fault has a direction and any size. So
    # small an error as float32's is hardly ever anything else; a larger one is told by the values alone.
    got, want = pairs[0]
    noise = dtype == torch.float32 and eps / 32 * sizes[0] <= errors[0] <= ULPS / 8 * eps * sizes[0]
    if noise and _both_sides(got - want) and _follows_size(got, want, eps):
        return (
            f"it is off by at most {errors[0] / (eps * sizes[0]):.2g} units in the last place of {name}, to both sides"
        )
    return ""


def _pairs(case: Case) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(got, want) of the first wrong tensor, and of several, as one alone may hold a few numbers."""
    first = case.first
    want = case.reference.tensors(first.key)
    if not want or not want[0].is_floating_point() or math.isnan(first.error):
        return
    if first.stage in ("forward", "backward"):
        shown = aligned(first.key, case.observed, case.reference)
        yield [(one.got.reshape(-1), one.want.reshape(-1)) for one in shown]
        for _, vector in vectors(case, shown):
            # Rounded before a bias was added.
            yield [
                ((one.got - bias).reshape(-1), (one.want - bias).reshape(-1))
                for one in shown
                for bias in [one.take(spread(vector, one))]
            ]
        return
    found = []
    for comparison in case.wrong[:TENSORS]:
        whole = case.reference.tensors(comparison.key)
        got = [(share.got, share.take(wide(whole[0]))) for share in case.shares(comparison)]
        found += [(torch.cat([g for g, _ in got]), torch.cat([w for _, w in got]))] if got else []
    yield found[:1]
    yield [(g, w) for g, w in found if g.numel() and not torch.equal(g, w)]


def _whole(got: Tensor, dtype: torch.dtype, eps: float) -> int:
    """The smallest number by which all values have to be multiplied to be whole in `dtype` (a mean over as many ranks
    was divided in more digits); 0 where there is none."""
    for times in range(1, DIVISORS + 1):
        many = got * times
        narrow = many.to(dtype).to(torch.float64)
        if bool(((narrow - many).abs() <= (4 if times > 1 else 0) * eps * many.abs()).all()):
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
