"""A fault: what it does on a rank, at which point of a run, and what would hide it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.parallel.data import Microbatch
from shardproof.parallel.held import Held
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.train.faults.facts import Facts

Batches = list[list[Microbatch]]
"""Of one rank: [step][micro-batch]."""


@dataclass(kw_only=True)
class Scene:
    """Where a fault is at work: one rank of one run, and how far that has come."""

    rank: int
    parallelism: Parallelism
    parameters: Mapping[str, Held] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """The initial values that the fault asked for, before they were laid out."""
    step: int = -1
    call: int = 0
    """Losses that this step has computed so far."""
    planted: int = 0
    """How often the fault was at work."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What the fault remembers from one point of the run to a later one."""

    @property
    def at(self) -> dict[str, int]:
        """Where the rank lies on the mesh."""
        return self.parallelism.coordinates(self.rank)


class Points:
    """The points of a run at which a fault can be at work, in their order; here it does nothing."""

    def initial(self, scene: Scene) -> None:
        """The model is laid out, and nothing has been recorded."""

    def batches(self, batches: Batches, others: Callable[[str, int], list[list[Any]] | None], scene: Scene) -> Batches:
        """This rank has read its batches; `others(run, rank)` are those of another rank in an earlier run, if known."""
        del others, scene
        return batches

    def loss(self, value: Tensor | LossSum, scene: Scene) -> None:
        """The loss of a micro-batch is there, and backward has not run."""

    def gradients(self, scene: Scene) -> None:
        """The last backward pass of a step is over."""

    def before_optimizer(self, scene: Scene) -> None:
        """The gradients are as the optimizer will see them: clipped, if they are."""

    def after_optimizer(self, scene: Scene) -> None:
        """The optimizer has stepped."""


@dataclass(frozen=True, kw_only=True)
class Fault(Points, ABC):
    """One fault in one place. Every edit is local: no fault calls a collective, so none can hang by itself."""

    name: ClassVar[str]
    stage: ClassVar[str]
    """The first stage at which it shows, if it does."""

    in_loader: ClassVar[bool] = False
    """Whether it changes what is read."""

    @classmethod
    @abstractmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """The faults of this kind that fit a run, or why none does."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is planted, in a few words."""

    @property
    def steps(self) -> int | None:
        """Steps after which it shows, if it does at once; None where only the whole run can tell."""
        return 1

    @property
    def wants(self) -> tuple[str, ...]:
        """Parameters whose whole initial values it needs."""
        return ()

    def reason(self, facts: Facts) -> str:
        """Why this experiment hides it, as far as that is a matter of mathematics; empty where it does not."""
        del facts
        return ""
