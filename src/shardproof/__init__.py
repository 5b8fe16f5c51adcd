"""Train a PyTorch model under any parallel layout, and prove that every layout computes the same training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardproof.compare.verdict import Comparison, Verdict
    from shardproof.diagnose.finding import Finding
    from shardproof.errors import (
        ExperimentError,
        InvariantError,
        ParityError,
        PatternError,
        RankDied,
        RankError,
        RankFailed,
        RankHung,
        ShardproofError,
        StrategyError,
        UsageError,
    )
    from shardproof.invariants import Violation, check_invariants
    from shardproof.parity import assert_parity, check
    from shardproof.report.data import Report, Run
    from shardproof.spec.experiment import Experiment
    from shardproof.spec.loading import load
    from shardproof.spec.loss import LossSum
    from shardproof.spec.parallelism import Parallelism
    from shardproof.train.step import Step

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "compare.verdict",
    "Experiment": "spec.experiment",
    "ExperimentError": "errors",
    "Finding": "diagnose.finding",
    "InvariantError": "errors",
    "LossSum": "spec.loss",
    "Parallelism": "spec.parallelism",
    "ParityError": "errors",
    "PatternError": "errors",
    "RankDied": "errors",
    "RankError": "errors",
    "RankFailed": "errors",
    "RankHung": "errors",
    "Report": "report.data",
    "Run": "report.data",
    "ShardproofError": "errors",
    "Step": "train.step",
    "StrategyError": "errors",
    "UsageError": "errors",
    "Verdict": "compare.verdict",
    "Violation": "invariants",
    "assert_parity": "parity",
    "check": "parity",
    "check_invariants": "invariants",
    "load": "spec.loading",
}
"""Public name -> the module it lives in, loaded when the name is first used: `import shardproof` loads no torch."""

__all__ = [
    "Comparison",
    "Experiment",
    "ExperimentError",
    "Finding",
    "InvariantError",
    "LossSum",
    "Parallelism",
    "ParityError",
    "PatternError",
    "RankDied",
    "RankError",
    "RankFailed",
    "RankHung",
    "Report",
    "Run",
    "ShardproofError",
    "Step",
    "StrategyError",
    "UsageError",
    "Verdict",
    "Violation",
    "__version__",
    "assert_parity",
    "check",
    "check_invariants",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Kept, so that the next use costs nothing, and so that `sp.check` stays the function when the module is loaded.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
