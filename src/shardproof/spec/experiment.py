"""What is trained: the one description that every strategy lays out in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from shardproof.errors import ExperimentError
from shardproof.spec.parallelism import AXES, Parallelism

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle
    from torch.optim import Optimizer

    from shardproof.spec.loss import LossSum

Batch: TypeAlias = Any
"""Samples collated along a new first dim: a tensor, a tuple of tensors or a dict of tensors."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data, its loss and its optimizer, and nothing about how they are laid out.

    Raises `ExperimentError` at once for values that no run could use.
    """

    model: Callable[[], nn.Module]
    """Builds the whole, unsharded model. Called under the experiment's seed, on every rank."""

    data: Any
    """A map-style dataset (`len` and `[i]`), or a function that returns one. A sample is a tensor, tuple or dict.

    `sp.Trainer` takes a stream as well: an iterable of samples, or a function that returns one.
    """

    loss: Callable[[nn.Module, Batch], Tensor | LossSum]
    """The mean loss of a batch (a tensor of shape `()`), or `LossSum` where the mean is not over samples."""

    optimizer: Callable[[nn.Module], Optimizer]
    """Called once, after the model is laid out; several param groups and subsets of parameters are welcome."""

    batch_size: int
    """Samples per optimizer step, over all ranks and micro-batches."""

    microbatches: int = 1
    """Micro-batches per rank and step. The global batch is cut into dp * microbatches equal parts, in order."""

    steps: int = 3
    """Optimizer steps that `check` compares."""

    seed: int = 0
    """Seed of the initial weights, of shuffling and of every random draw in a step."""

    max_grad_norm: float | None = None
    """Global 2-norm to which gradients are clipped, or None."""

    tp_plan: Mapping[str, str | ParallelStyle] = field(default_factory=dict)
    """Module name pattern -> how it splits over `tp`: a name (`colwise`, `rowwise`, ...) or a torch ParallelStyle."""

    fsdp_units: tuple[str, ...] = ()
    """Name patterns of the modules that become FSDP units of their own, beside the root."""

    placements: Mapping[str, Mapping[str, int]] | None = None
    """Hand-written tensor parallelism that values cannot tell: {parameter name pattern: {axis: dim}}."""

    parallelize: Callable[[nn.Module, DeviceMesh, Parallelism], nn.Module] | None = None
    """Replaces shardproof's own layout: returns the laid-out model."""

    batches: Callable[[Any, DeviceMesh, Parallelism], Iterable[Batch]] | None = None
    """Replaces shardproof's own loader: yields this rank's micro-batches, one after the other."""

    train_step: Callable[[Any], Any] | None = None
    """Replaces shardproof's own step: takes a `Step`, returns the loss that it would log."""

    def __post_init__(self) -> None:
        for name in ("model", "loss", "optimizer"):
            if not callable(getattr(self, name)):
                raise ExperimentError(
                    f"Experiment.{name} is {getattr(self, name)!r}, which cannot be called; pass a function"
                )
        for name in ("parallelize", "batches", "train_step"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ExperimentError(
                    f"Experiment.{name} is {value!r}, which cannot be called; pass a function or None"
                )
        for name in ("batch_size", "microbatches", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ExperimentError(f"Experiment.{name} is {value!r}; it must be a whole number of at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ExperimentError(f"Experiment.seed is {self.seed!r}; it must be a whole number of at least 0")
        if not (self.max_grad_norm is None or _is_above_zero(self.max_grad_norm)):
            raise ExperimentError(f"Experiment.max_grad_norm is {self.max_grad_norm!r}; it must be above 0, or None")
        self._refuse_bad_patterns()

    def _refuse_bad_patterns(self) -> None:
        # None says the same as nothing: no plan, no units.
        for name, nothing in (("tp_plan", {}), ("fsdp_units", ())):
            if getattr(self, name) is None:
                object.__setattr__(self, name, nothing)
        if isinstance(self.fsdp_units, str):
            raise ExperimentError(
                f"Experiment.fsdp_units is the text {self.fsdp_units!r}; write the tuple ({self.fsdp_units!r},)"
            )
        units = self.fsdp_units
        if not isinstance(units, tuple | list) or not all(isinstance(unit, str) for unit in units):
            raise ExperimentError(f"Experiment.fsdp_units is {units!r}; it must be a tuple of name patterns")
        if not isinstance(self.tp_plan, Mapping):
            raise ExperimentError(f"Experiment.tp_plan is {self.tp_plan!r}; it must map name patterns to styles")
        if self.placements is not None and not _are_placements(self.placements):
            raise ExperimentError(
                f"Experiment.placements is {self.placements!r}; it must be {{name pattern: {{axis: dim}}}}, or None; "
                f"the axes are {', '.join(AXES)}"
            )


def _are_placements(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(axes, Mapping) and all(axis in AXES and isinstance(dim, int) for axis, dim in axes.items())
        for axes in value.values()
    )


def _is_above_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
