"""Gradients that are reduced, scaled or weighted wrongly.

Gradients are linear in the losses that they come from. So a factor on the gradient of each part's loss does what a
wrong reduction does, whatever reduces them: DDP, FSDP, or a user's own code. The value of the loss stays right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import AXES
from shardproof.train.faults.facts import Facts
from shardproof.train.faults.fault import Fault, Scene


def scale_gradient_of(value: Any, factor: float, scene: Scene) -> None:
    """From now on what flows back through a loss is multiplied by `factor`."""
    total = value.total if isinstance(value, LossSum) else value
    if isinstance(total, Tensor) and total.requires_grad:
        total.register_hook(lambda grad: grad * factor)  # type: ignore[no-untyped-call]
        scene.planted += 1


@dataclass(frozen=True, kw_only=True)
class NotReduced(Fault):
    """One data rank's own gradient in place of the mean over an axis."""

    name = "grad-not-reduced"
    stage = "gradient"

    axis: str
    size: int

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One for each data axis."""
        sizes = {axis: getattr(facts.parallelism, axis) for axis in ("dp_replicate", "dp_shard")}
        found = [cls(axis=axis, size=size) for axis, size in sizes.items() if size > 1]
        return found or "there is one data rank"

    @property
    def place(self) -> str:
        """All gradients, and the axis."""
        return f"all gradients, over {self.axis}"

    def reason(self, facts: Facts) -> str:
        """The same data on all ranks."""
        same = facts.same_reads
        return "all data ranks read the same samples, so that the gradient of one is the mean of all" if same else ""

    def loss(self, value: Tensor | LossSum, scene: Scene) -> None:
        """The first rank of the axis counts for all, and the others not at all."""
        scale_gradient_of(value, float(self.size) if scene.at[self.axis] == 0 else 0.0, scene)


@dataclass(frozen=True, kw_only=True)
class Scaled(Fault):
    """All gradients times the size of an axis: a sum where a mean is due, or a division that is missing."""

    name = "grad-scale"
    stage = "gradient"

    axis: str
    factor: float

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One for each size of an axis, and for the number of micro-batches."""
        sizes = {axis: getattr(facts.parallelism, axis) for axis in AXES} | {"micro-batch": facts.microbatches}
        axes: dict[int, list[str]] = {}
        for axis, size in sizes.items():
            axes.setdefault(size, []).append(axis)
        found = [cls(axis=" or ".join(names), factor=size) for size, names in axes.items() if size > 1]
        return found or "there is one rank and one micro-batch"

    @property
    def place(self) -> str:
        """All gradients, and the factor."""
        return f"all gradients, times {self.factor:g} ({self.axis})"

    def loss(self, value: Tensor | LossSum, scene: Scene) -> None:
        """Every part counts too much."""
        scale_gradient_of(value, self.factor, scene)


@dataclass(frozen=True, kw_only=True)
class LostMicrobatch(Fault):
    """The last micro-batch adds nothing to the gradients."""

    name = "microbatch-lost"
    stage = "gradient"

    last: int

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where there are several."""
        return [cls(last=facts.microbatches - 1)] if facts.microbatches > 1 else "a step has one micro-batch"

    @property
    def place(self) -> str:
        """Which one."""
        return f"micro-batch {self.last} of every step"

    def loss(self, value: Tensor | LossSum, scene: Scene) -> None:
        """Its gradient is nothing."""
        if scene.call == self.last:
            scale_gradient_of(value, 0.0, scene)


@dataclass(frozen=True, kw_only=True)
class MeanOfMeans(Fault):
    """Every part counts the same, however many elements it holds."""

    name = "mean-of-means"
    stage = "gradient"

    means: tuple[float, ...]
    """[step]: elements that a part holds on average."""

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where the loss is a `LossSum` over several parts."""
        if not facts.counts:
            return "the loss is a mean over samples, not an sp.LossSum"
        if len(facts.counts[0]) == 1:
            return "a step has one part"
        return [cls(means=tuple(sum(parts) / max(sum(c > 0 for c in parts), 1) for parts in facts.counts))]

    @property
    def place(self) -> str:
        """All parts."""
        return "the parts of every step"

    def reason(self, facts: Facts) -> str:
        """Equal counts."""
        equal = all(len({count for count in parts if count > 0}) <= 1 for parts in facts.counts)
        return "all parts of a step count equally many elements" if equal else ""

    def loss(self, value: Tensor | LossSum, scene: Scene) -> None:
        """Divided by its own count instead of by the mean count."""
        count = float(value.count) if isinstance(value, LossSum) else 0.0
        if count > 0 and scene.step < len(self.means):
            scale_gradient_of(value, self.means[scene.step] / count, scene)
