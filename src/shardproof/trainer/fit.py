"""What `Trainer.fit` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation of a run."""

    step: int
    """Optimizer steps that were over."""

    results: dict[str, float]
    """`loss` and the metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A run, or the part of it since it was resumed. Plain data."""

    step: int
    """Optimizer steps of the whole run, before a resumption included."""

    epoch: int
    """Whole passes over the data, likewise."""

    samples: int
    """Over all ranks, likewise."""

    elapsed_s: float
    """Seconds of training, evaluation and saving included, likewise of the whole run."""

    stop_reason: str
    """`max_duration`, `SIGTERM`, or what a callback gave."""

    first_step: int
    """Number of the first step of `losses`, from 0: as many steps were over before this call."""

    losses: tuple[float, ...] = ()
    """Global loss of every step of this call, before its update: the mean over the whole batch."""

    evaluations: tuple[Evaluation, ...] = ()
    checkpoint: Path | None = None
    """The last one that was saved, or that the run was resumed from and still stands in."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Ranks per mesh axis."""

    @property
    def loss(self) -> float | None:
        """The last step's."""
        return self.losses[-1] if self.losses else None

    @property
    def results(self) -> dict[str, float]:
        """Those of the last evaluation; empty without one."""
        return dict(self.evaluations[-1].results) if self.evaluations else {}
