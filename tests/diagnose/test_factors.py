"""A constant factor is named by the sizes that make it."""

from __future__ import annotations

import pytest

from shardproof.diagnose.factors import axes_of
from shardproof.spec.parallelism import Parallelism


@pytest.mark.parametrize(
    ("factor", "degrees", "microbatches", "axes"),
    [
        (2.0, {"tp": 2}, 1, "tp"),
        (0.5, {"tp": 2}, 1, "tp"),
        (3.0, {"tp": 2, "dp_shard": 3}, 1, "dp_shard"),
        (1 / 3, {"dp_replicate": 3}, 1, "dp_replicate"),
        (4.0, {"tp": 2}, 4, "micro-batch"),
        (6.0, {"dp_replicate": 2, "dp_shard": 3}, 1, "dp"),
        (3.0, {"dp_replicate": 2, "dp_shard": 3}, 1, "dp_shard"),
        (2.0, {"tp": 2, "dp_shard": 2}, 1, "dp_shard or tp"),
        (0.5, {"dp_replicate": 2, "tp": 2}, 2, "dp_replicate or tp or micro-batch"),
        (4.0, {"dp_replicate": 2, "dp_shard": 2, "tp": 4}, 1, "dp or tp"),
        (5.0, {"tp": 2, "dp_shard": 3}, 4, None),
        (1.0, {}, 1, None),
        (-2.0, {"tp": 2}, 1, None),
        (2.0001, {"tp": 2}, 1, None),
        (float("nan"), {"tp": 2}, 1, None),
        (float("inf"), {"tp": 2}, 1, None),
    ],
)
def test_a_size_or_its_inverse_is_named_and_several_where_sizes_leave_it_open(
    factor: float, degrees: dict[str, int], microbatches: int, axes: str | None
) -> None:
    assert axes_of(factor, Parallelism(**degrees), microbatches) == axes
