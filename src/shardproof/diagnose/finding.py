"""The first divergence of a run, explained: plain data, in the words of the public contract."""

from __future__ import annotations

from dataclasses import dataclass

from shardproof.compare.verdict import Comparison

CAUSES = (
    "strategy-not-applied",
    "batch-differs-in-group",
    "batch-repeated-across-dp",
    "data-order",
    "initial-state",
    "forward-not-reduced",
    "bias-counted-k-times",
    "sharded-loss",
    "layout-permuted",
    "grad-not-reduced",
    "grad-not-summed",
    "grad-partly-reduced",
    "microbatch-misweighted",
    "mean-of-means",
    "grad-scale",
    "grad-scale-subset",
    "wrong-group",
    "tied-weights-split",
    "positions",
    "attention-math",
    "grad-norm",
    "precision",
    "overflow-not-shared",
    "rng",
    "buffers",
    "optimizer",
    "checkpoint",
    "nondeterminism",
    "unexplained",
)
"""Every cause that a finding can name. `unexplained` where nothing fits: a wrong cause is worse than none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """One explanation that was held against the numbers."""

    name: str
    """As `one factor on all gradients`."""
    residual: float
    """What it leaves unexplained, in noise floors: `inf` where it says nothing at all."""
    holds: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Where a run first leaves the reference, by how much, and why."""

    cause: str
    """One of `CAUSES`."""

    stage: str
    """One of `spec.stages.STAGES`."""

    where: str
    """Canonical name of the first wrong tensor or module."""

    axis: str | None
    """The mesh axis at fault (`tp`, `dp`, `dp_shard`, `micro-batch` ...); `dp or tp` where sizes leave it open."""

    factor: float | None
    """Observed over reference, where that is one constant."""

    ranks: tuple[int, ...]
    """The ranks that hold the wrong pieces."""

    step: int
    """Optimizer step, from 0; -1 before the first."""

    evidence: str
    """What was measured, in numbers."""

    fix: str
    """What to change, in one sentence."""

    comparison: Comparison | None = None
    """The first wrong tensor, with a few of its values side by side."""

    polluted: int = 0
    """Later tensors that differ as well, and only because this one does, as far as that could be told."""

    tried: tuple[Hypothesis, ...] = ()
    """The hypotheses that were held against the numbers, in order."""
