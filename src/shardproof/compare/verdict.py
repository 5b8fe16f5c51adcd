"""What was found out about one tensor of a run, held against the reference: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a tensor of a run relates to the same tensor of the reference."""

    EQUAL = "equal"
    """Bitwise the same."""

    ROUNDING = "rounding"
    """Inside the measured noise floor."""

    DIFFERENT = "different"
    """Further away than rounding can bring it, or NaN."""

    NOT_CHECKED = "not-checked"
    """Nothing can be said, for the reason given. Never a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One element of a tensor, held side by side."""

    rank: int
    index: tuple[int, ...]
    """Index into the canonical tensor."""
    got: float
    want: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One tensor of a run against the reference, over all the ranks that hold a piece of it."""

    step: int
    """Optimizer step, from 0; -1 before the first."""

    stage: str
    """One of `spec.stages.STAGES`."""

    name: str
    """Canonical name of the parameter, buffer or module; `(root)` is the model itself."""

    part: str = ""
    """Which leaf of an output or batch, which entry of an optimizer state, which micro-batch or call."""

    verdict: Verdict

    reason: str = ""
    """Why nothing can be said (`not-checked`), or what is wrong beside the values (`different`)."""

    shape: tuple[int, ...] = ()
    """Of the canonical tensor."""

    layout: str = ""
    """Where the pieces lie, as `tp: slices of dim 0, dp_shard: slices of dim 0`, or `replicated`."""

    error: float = 0.0
    """max|got - want|, in the tensor's own unit."""

    floor: float = 0.0
    """How far rounding alone moves this tensor: the noise floor, in the tensor's own unit."""

    ranks: tuple[int, ...] = ()
    """The ranks whose piece differs."""

    ratio: float | None = None
    """got / want where it is one constant over the whole tensor and not 1."""

    samples: tuple[Sample, ...] = ()
    """The elements that differ most."""

    errors: tuple[float | None, ...] = ()
    """max|got - want| on each rank, in order, None for one that shows no piece; empty where there is no difference, or
    where the ranks were not looked at one by one."""

    @property
    def key(self) -> tuple[int, str, str, str]:
        """Step, stage, name, part."""
        return (self.step, self.stage, self.name, self.part)

    @property
    def floors(self) -> float:
        """The error in units of the noise floor: a pure number, 0 when identical."""
        if self.error == 0:
            return 0.0
        return self.error / self.floor if self.floor > 0 else float("inf")
