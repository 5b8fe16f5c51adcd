"""Train a PyTorch model under any parallel layout, and prove that every layout computes the same training."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardproof.compare.verdict import Comparison, Verdict
    from shardproof.diagnose.finding import Finding
    from shardproof.diff import diff
    from shardproof.errors import (
        CheckpointError,
        ExperimentError,
        InvariantError,
        ParityError,
        PatternError,
        RankDied,
        RankError,
        RankFailed,
        RankHung,
        RankLost,
        RankMismatch,
        ShardproofError,
        StrategyError,
        TraceError,
        UsageError,
    )
    from shardproof.invariants import Violation, check_invariants
    from shardproof.parity import assert_parity, check
    from shardproof.record.watch import record
    from shardproof.report.data import Report, Run
    from shardproof.report.schemas import report_schema
    from shardproof.spec.duration import Duration
    from shardproof.spec.experiment import Experiment
    from shardproof.spec.loading import load
    from shardproof.spec.loss import LossSum
    from shardproof.spec.parallelism import Parallelism
    from shardproof.spec.training import Training
    from shardproof.train.step import Step
    from shardproof.trainer.callback import Callback
    from shardproof.trainer.callbacks.early_stopping import EarlyStopping
    from shardproof.trainer.callbacks.gradient_norm import GradientNorm
    from shardproof.trainer.callbacks.learning_rate import LearningRateMonitor
    from shardproof.trainer.callbacks.memory import MemoryMonitor
    from shardproof.trainer.callbacks.throughput import Throughput
    from shardproof.trainer.fit import Fit
    from shardproof.trainer.logger import Logger
    from shardproof.trainer.loggers.console import ConsoleLogger
    from shardproof.trainer.loggers.json_lines import JSONLinesLogger
    from shardproof.trainer.loggers.mlflow import MLflowLogger
    from shardproof.trainer.loggers.tensorboard import TensorBoardLogger
    from shardproof.trainer.loggers.wandb import WandbLogger
    from shardproof.trainer.metrics import Metrics
    from shardproof.trainer.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "trainer.callback",
    "CheckpointError": "errors",
    "Comparison": "compare.verdict",
    "ConsoleLogger": "trainer.loggers.console",
    "Duration": "spec.duration",
    "EarlyStopping": "trainer.callbacks.early_stopping",
    "Experiment": "spec.experiment",
    "ExperimentError": "errors",
    "Finding": "diagnose.finding",
    "Fit": "trainer.fit",
    "GradientNorm": "trainer.callbacks.gradient_norm",
    "InvariantError": "errors",
    "JSONLinesLogger": "trainer.loggers.json_lines",
    "LearningRateMonitor": "trainer.callbacks.learning_rate",
    "Logger": "trainer.logger",
    "LossSum": "spec.loss",
    "MLflowLogger": "trainer.loggers.mlflow",
    "MemoryMonitor": "trainer.callbacks.memory",
    "Metrics": "trainer.metrics",
    "Parallelism": "spec.parallelism",
    "ParityError": "errors",
    "PatternError": "errors",
    "RankDied": "errors",
    "RankError": "errors",
    "RankFailed": "errors",
    "RankHung": "errors",
    "RankLost": "errors",
    "RankMismatch": "errors",
    "Report": "report.data",
    "Run": "report.data",
    "ShardproofError": "errors",
    "Step": "train.step",
    "StrategyError": "errors",
    "TensorBoardLogger": "trainer.loggers.tensorboard",
    "Throughput": "trainer.callbacks.throughput",
    "TraceError": "errors",
    "Trainer": "trainer.trainer",
    "Training": "spec.training",
    "UsageError": "errors",
    "Verdict": "compare.verdict",
    "Violation": "invariants",
    "WandbLogger": "trainer.loggers.wandb",
    "assert_parity": "parity",
    "check": "parity",
    "check_invariants": "invariants",
    "diff": "diff",
    "load": "spec.loading",
    "record": "record.watch",
    "report_schema": "report.schemas",
}
"""Public name -> the module it lives in, loaded when the name is first used: `import shardproof` loads no torch."""

__all__ = [
    "Callback",
    "CheckpointError",
    "Comparison",
    "ConsoleLogger",
    "Duration",
    "EarlyStopping",
    "Experiment",
    "ExperimentError",
    "Finding",
    "Fit",
    "GradientNorm",
    "InvariantError",
    "JSONLinesLogger",
    "LearningRateMonitor",
    "Logger",
    "LossSum",
    "MLflowLogger",
    "MemoryMonitor",
    "Metrics",
    "Parallelism",
    "ParityError",
    "PatternError",
    "RankDied",
    "RankError",
    "RankFailed",
    "RankHung",
    "RankLost",
    "RankMismatch",
    "Report",
    "Run",
    "ShardproofError",
    "Step",
    "StrategyError",
    "TensorBoardLogger",
    "Throughput",
    "TraceError",
    "Trainer",
    "Training",
    "UsageError",
    "Verdict",
    "Violation",
    "WandbLogger",
    "__version__",
    "assert_parity",
    "check",
    "check_invariants",
    "diff",
    "load",
    "record",
    "report_schema",
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


class _Package(ModuleType):
    """This package: `sp.record` and `sp.diff` stay functions, though rooms of these names are imported.

    Python puts each module that is imported into its package, under its name, over what is there.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
