"""Name a constant factor by the sizes that make it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations

from shardproof.spec.parallelism import AXES, Parallelism

LARGEST_DIVISOR = 64
"""Of the simple fractions that a measured factor is taken for: products of a few axis sizes."""


def axes_of(factor: float, parallelism: Parallelism, microbatches: int) -> str | None:
    """The axes whose size, or its inverse, is `factor`, joined by ` or ` where sizes leave it open; None for none.

    Two sizes at once (`dp_replicate and tp`) are named where no single one fits.
    """
    sizes: dict[str, int] = {}
    if parallelism.dp_replicate > 1 and parallelism.dp_shard > 1:
        sizes["dp"] = parallelism.dp
    sizes["dp_replicate"], sizes["dp_shard"] = parallelism.dp_replicate, parallelism.dp_shard
    sizes["tp"], sizes["micro-batch"] = parallelism.tp, microbatches
    sizes = {name: size for name, size in sizes.items() if size > 1}
    single = [name for name, size in sizes.items() if _is(factor, size)]
    pairs = [
        f"{one} and {two}"
        for one, two in combinations(sizes, 2)
        if _is(factor, sizes[one] * sizes[two]) and not ("dp" in (one, two) and (one + two).count("dp") > 1)
    ]
    return " or ".join(single or pairs) or None


def _is(factor: float, size: int) -> bool:
    return any(math.isclose(factor, k, rel_tol=1e-6) for k in (size, 1 / size))


def axis_name(axes: Iterable[str], parallelism: Parallelism) -> str:
    """A set of mesh axes in words: `tp`, `dp_shard`, `dp` for both data axes, `dp and tp`."""
    names = [axis for axis in AXES if axis in set(axes) and getattr(parallelism, axis) > 1]
    data = [name for name in names if name != "tp"]
    said = ["dp"] if len(data) == 2 else data
    return " and ".join([*said, *(["tp"] if "tp" in names else [])])


def simple(factor: float, tolerance: float) -> float:
    """The simple fraction that `factor` is within `tolerance` (relative), or the factor as it was measured."""
    if abs(factor) <= max(tolerance, 1e-9):
        return 0.0
    near = float(Fraction(factor).limit_denominator(LARGEST_DIVISOR))
    return near if math.isclose(near, factor, rel_tol=max(tolerance, 1e-9)) else factor
