"""Name a constant factor by the sizes that make it."""

from __future__ import annotations

import math

from shardproof.spec.parallelism import Parallelism


def axes_of(factor: float, parallelism: Parallelism, microbatches: int) -> str | None:
    """The axes whose size, or its inverse, is `factor`, joined by ` or ` where sizes leave it open; None for none."""
    sizes: dict[str, int] = {}
    if parallelism.dp_replicate > 1 and parallelism.dp_shard > 1:
        sizes["dp"] = parallelism.dp
    sizes["dp_replicate"], sizes["dp_shard"] = parallelism.dp_replicate, parallelism.dp_shard
    sizes["tp"], sizes["micro-batch"] = parallelism.tp, microbatches
    names = [
        name
        for name, size in sizes.items()
        if size > 1 and any(math.isclose(factor, k, rel_tol=1e-6) for k in (size, 1 / size))
    ]
    return " or ".join(names) or None
