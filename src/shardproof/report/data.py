"""The outcome of a check: plain data, of which text, JSON and HTML are views."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardproof.compare.picture import Picture
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.finding import Finding
from shardproof.report.spelling import apart
from shardproof.report.stopped import Stopped


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One tensor that one rank held, as `--show RANK` prints it."""

    step: int
    stage: str
    name: str
    part: str
    layout: str
    """Which part of the canonical tensor the rank held."""
    shape: tuple[int, ...]
    """Of the rank's own piece."""
    values: object
    """The rank's own piece as nested lists of numbers (`tensor.tolist()`); None where it held none, as no gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One strategy against the reference."""

    strategy: str
    """The name it was asked for by."""

    degrees: Mapping[str, int]
    """Ranks per mesh axis."""

    comparisons: tuple[Comparison, ...]
    """One per tensor, in causal order."""

    findings: tuple[Finding, ...]
    """The first divergence first; empty where the run agrees with the reference."""

    sharded: Mapping[str, int] = field(default_factory=dict)
    """Mesh axis -> parameters that were really split over it when the optimizer stepped."""

    collectives: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Mesh axis (or axes, joined by `+`) -> collective -> how often it ran in the first step, on rank 0."""

    notes: tuple[str, ...] = ()
    """What a reader should know beside the verdicts."""

    pictures: tuple[Picture, ...] = ()
    """What was kept of a few tensors, for the page: those that differ first and most, and one of each layout."""

    shown: Mapping[int, tuple[Shown, ...]] = field(default_factory=dict)
    """Rank -> what it held, for the ranks that `show` asked for."""

    invariants: bool = False
    """Whether replicas were held against each other, and nothing against a reference."""

    time_s: float = 0.0
    """Wall clock of the run and its comparison."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found and something was compared: no finding, no tensor that differs, some that agree.

        That the ranks read what they should says nothing of what they made of it, and does not count.
        Without a reference nothing need be compared: where all is sharded there are no replicas.
        """
        agree = any(c.verdict in (Verdict.EQUAL, Verdict.ROUNDING) for c in self.comparisons if c.stage != "batch")
        return not self.findings and not self.verdicts[Verdict.DIFFERENT] and (agree or self.invariants)

    @property
    def proven(self) -> bool:
        """Whether the run is `ok` and gradients or updated weights were among what was compared.

        With dropout under data parallelism, for instance, everything behind the first draw is `not-checked`. Replicas
        that agree prove nothing: they may all be wrong alike.
        """
        if self.invariants:
            return False
        trained = (c for c in self.comparisons if c.stage in ("gradient", "update"))
        return self.ok and any(c.verdict in (Verdict.EQUAL, Verdict.ROUNDING) for c in trained)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many tensors got each verdict; all four are always there."""
        counted = Counter(comparison.verdict for comparison in self.comparisons)
        return {str(verdict): counted[verdict] for verdict in Verdict}

    @property
    def worst(self) -> Comparison | None:
        """The tensor furthest from the reference in units of its noise floor, or None where all are equal."""
        moved = [c for c in self.comparisons if c.verdict in (Verdict.ROUNDING, Verdict.DIFFERENT)]
        # NaN compares with nothing, and nothing is worse.
        return max(moved, key=lambda c: float("inf") if math.isnan(c.floors) else c.floors, default=None)

    @property
    def not_checked(self) -> dict[str, int]:
        """Reason -> number of tensors about which nothing can be said."""
        return dict(Counter(c.reason for c in self.comparisons if c.verdict is Verdict.NOT_CHECKED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A fault that was planted on purpose, and whether the check saw it."""

    fault: str
    """Its name, as `grad-not-reduced`."""

    place: str
    """Where it was planted, as `gradient of fc1.weight, times 2 (tp)`."""

    caught: bool
    """Whether there was a finding, a tensor that differs, or an error that stopped the run."""

    cause: str | None = None
    """What the first finding named, one of `diagnose.finding.CAUSES`."""

    stage: str | None = None
    where: str | None = None
    step: int | None = None
    """Where the run first left the reference; None where it did not, or was stopped."""

    reason: str = ""
    """Why it was missed, or how it was caught where that was by an error."""

    stopped: bool = False
    """Whether it ended the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """How many planted faults the check of one strategy would have caught."""

    strategy: str
    planted: tuple[Planted, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Fault -> why it does not apply here; not counted."""

    @property
    def caught(self) -> int:
        """How many were caught."""
        return sum(planted.caught for planted in self.planted)

    @property
    def missed(self) -> tuple[Planted, ...]:
        """Those that were not."""
        return tuple(planted for planted in self.planted if not planted.caught)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Every strategy of a check against the reference."""

    experiment: str
    """What was checked, as a reader knows it; of two recordings the path of the second."""

    runs: tuple[Run, ...]
    ranks: int
    steps: int
    dtype: str
    device: str
    reference: str
    """The trusted run, as `single`; of two recordings the path of the first."""

    warnings: tuple[str, ...] = ()
    """What the experiment itself hides; of recordings, what is missing of them."""

    proofs: tuple[Proof, ...] = ()
    """What planted faults showed, for `prove`: one for each strategy that agreed."""

    recorded: bool = False
    """Whether two recordings were compared, and nothing was trained."""

    estimated: bool = False
    """Whether noise floors were estimated from a model of rounding, as there were no disturbed runs to measure them."""

    stopped: Stopped | None = None
    """The error that the check ended with, in a report that is written all the same; None for one that went through."""

    time_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every strategy computes the same training as the reference."""
        return self.stopped is None and bool(self.runs) and all(run.ok for run in self.runs)

    @property
    def proven(self) -> bool:
        """Whether every strategy is `ok`, and each by gradients or updated weights that were compared."""
        return self.stopped is None and bool(self.runs) and all(run.proven for run in self.runs)

    @property
    def trusted(self) -> str:
        """The reference by a name that is short: of the path of a recording only what tells it from the other."""
        return apart(self.reference, self.experiment)[0] if self.recorded else self.reference

    @property
    def invariants(self) -> bool:
        """Whether replicas were held against each other, and nothing against a reference."""
        return any(run.invariants for run in self.runs)

    @property
    def first(self) -> Finding | None:
        """The first finding of the first run that has one, or None."""
        return next((finding for run in self.runs for finding in run.findings), None)

    def to_json(self, path: str | Path) -> None:
        """Write the report to `path`, in the public names plus `schema_version`."""
        from shardproof.report.json import write  # noqa: PLC0415 (views are loaded when asked for)

        write(self, Path(path))

    def to_junit(self, path: str | Path) -> None:
        """Write the report to `path` as JUnit XML: a suite for each strategy, a case for each stage."""
        from shardproof.report.junit import write  # noqa: PLC0415 (views are loaded when asked for)

        write(self, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write the report to `path` as one self-contained page."""
        from shardproof.report.html import write  # noqa: PLC0415 (views are loaded when asked for)

        write(self, Path(path))

    def __str__(self) -> str:
        from shardproof.report.text import plain  # noqa: PLC0415 (views are loaded when asked for)

        return plain(self)
