"""The one training step: what `check` proves is what `train` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardproof.errors import ExperimentError
from shardproof.parallel.held import Held, plain, scale_, settle_gradients
from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.train.norm import EPSILON, clip_, total_norm
from shardproof.train.scaling import LossScaler
from shardproof.train.sync import gradient_sync


@dataclass(frozen=True, kw_only=True)
class Step:
    """All that one optimizer step works on. A user's `train_step` is given one and returns the loss it would log."""

    model: nn.Module
    """The very object that the layout returned."""

    optimizer: Optimizer

    microbatches: list[Batch]
    """This rank's batches of this step."""

    loss: Callable[[nn.Module, Batch], Tensor | LossSum]
    """The experiment's loss."""

    mesh: DeviceMesh
    """With the axes `dp_replicate`, `dp_shard`, `tp`; `mesh["dp"]` is the two data axes flattened."""

    parallelism: Parallelism
    max_grad_norm: float | None
    index: int
    """Optimizer step, from 0."""

    weights: tuple[float, ...] = ()
    """Share of each micro-batch's mean in the step's mean (`1 / microbatches` where all parts are equal)."""

    data_group: dist.ProcessGroup | None = None
    """The ranks over which the batch is cut: the two data axes flattened."""

    clip_epsilon: float = EPSILON
    """Added to the norm before it divides `max_grad_norm`; a user's own step may do without."""

    loss_scale: float = 1.0
    """Factor on the loss in the backward pass, taken out of the gradients again before anybody sees them."""

    scaler: LossScaler | None = None
    """Scales the loss for float16 and skips the optimizer's step where gradients overflow. Not for a user's step."""


class Observer(Protocol):
    """What a step tells whoever records it; nothing of it changes what the step computes."""

    def gradients(self) -> None:
        """Gradients are complete and not yet clipped."""

    def norm(self, norm: Tensor) -> None:
        """The global 2-norm of the gradients before clipping."""


def train_step(step: Step, parameters: list[Held], observer: Observer | None = None) -> Tensor:
    """Run one optimizer step and return the loss that it would log, shape `()`, detached.

    `parameters` are the model's parameters as this rank holds them (`parallel.held`), for the norm.

    The loss of micro-batch m counts with `step.weights[m]`, so that the average over data ranks, which DDP and FSDP
    take, is the mean over the global batch. A `LossSum` is summed instead, and the gradients are divided by the
    global count after the last backward pass.

    Raises `ExperimentError` for a loss that is no scalar or does not depend on the model.
    """
    step.optimizer.zero_grad(set_to_none=True)
    logged, count = _forward_and_backward(step)
    settle_gradients(parameters)
    finite = True
    if step.scaler is not None:
        finite = step.scaler.unscale_(_gradients(parameters), logged.device)
        step.scaler.update()
    if step.loss_scale != 1.0:
        scale_(_gradients(parameters), 1 / step.loss_scale)
    if count is not None:
        logged = _divide_by_global_count(step, parameters, logged, count)
    if observer is not None:
        observer.gradients()
    if step.max_grad_norm is not None and finite:
        norm = total_norm(parameters, step.mesh)
        if observer is not None:
            observer.norm(norm)
        clip_(parameters, norm, step.max_grad_norm, step.clip_epsilon)
    if finite:
        step.optimizer.step()
    return logged


def one_step(experiment: Experiment, step: Step, parameters: list[Held], observer: Observer | None = None) -> Any:
    """The user's own step where there is one, else shardproof's."""
    if experiment.train_step is None:
        return train_step(step, parameters, observer)
    logged = experiment.train_step(step)
    if not (isinstance(logged, int | float) or (isinstance(logged, Tensor) and logged.numel() == 1)):
        raise ExperimentError(
            f"Experiment.train_step returned {type(logged).__name__}; it must return the loss it would log, as a scalar"
        )
    return logged


def checked(loss: Any) -> Tensor:
    """The tensor to call backward on. Raises `ExperimentError` where it could not be one."""
    value = loss.total if isinstance(loss, LossSum) else loss
    if not isinstance(value, Tensor):
        raise ExperimentError(
            f"Experiment.loss returned {type(value).__name__}; "
            "it must return a scalar tensor or sp.LossSum(total, count)"
        )
    if value.numel() != 1 or value.dim() != 0:
        raise ExperimentError(
            f"Experiment.loss returned a tensor of shape {tuple(value.shape)}; it must be a scalar: "
            "take .mean(), or return sp.LossSum(total, count)"
        )
    if not value.requires_grad:
        raise ExperimentError(
            "Experiment.loss does not depend on the model's parameters (it requires no gradient); "
            "compute it from model(batch), without detach() or no_grad()"
        )
    return value


def _forward_and_backward(step: Step) -> tuple[Tensor, Tensor | None]:
    """Every micro-batch, one after the other: the weighted sum of their losses, and the sum of `LossSum` counts."""
    last = len(step.microbatches) - 1
    logged: Tensor | None = None
    count: Tensor | None = None
    scale = step.loss_scale if step.scaler is None else step.loss_scale * step.scaler.scale
    for m, batch in enumerate(step.microbatches):
        weight = step.weights[m] if step.weights else 1 / len(step.microbatches)
        with gradient_sync(step.model, m == last):
            loss = step.loss(step.model, batch)
            value = checked(loss)
            if isinstance(loss, LossSum):
                # A filler part (weight 0) must not count.
                share = 1.0 if weight else 0.0
                # In float64: bfloat16 cannot count beyond 256.
                part_count = _whole(torch.as_tensor(loss.count, device=value.device)).to(torch.float64) * share
                count = part_count if count is None else count + part_count
            else:
                share = weight
            factor = share * scale
            (value if factor == 1.0 else value * factor).backward()  # type: ignore[no-untyped-call]
        part = _whole(value) * share
        logged = part if logged is None else logged + part
    if logged is None:
        raise ExperimentError(f"step {step.index} has no micro-batch; Experiment.batches must yield one or more a step")
    return logged, count


def _divide_by_global_count(step: Step, parameters: list[Held], total: Tensor, count: Tensor) -> Tensor:
    """Turn gradients of the sum, averaged over data ranks, into those of the mean; return the global mean."""
    both = torch.stack([total.to(torch.float64), count])
    if step.parallelism.dp > 1:
        dist.all_reduce(both, group=step.data_group)
    if not both[1] > 0:
        raise ExperimentError(
            f"step {step.index}: the counts of all LossSum parts add up to {both[1].item():g}; "
            "a batch must hold at least one element that counts"
        )
    scale_(_gradients(parameters), step.parallelism.dp / float(both[1]))
    return (both[0] / both[1]).to(total.dtype)


def _whole(value: Tensor) -> Tensor:
    """A detached loss or count as one plain number: a DTensor's may still be a partial sum or mean over `tp`."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else plain(value)


def _gradients(parameters: list[Held]) -> list[Tensor]:
    """Every gradient once: several names may share FSDP's flat parameter."""
    return list({id(held.leaf): held.leaf.grad for held in parameters if held.leaf.grad is not None}.values())
