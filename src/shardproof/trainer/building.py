"""What a rank trains: model, optimizer, scheduler and loss scale, made as a training asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from shardproof.errors import UsageError
from shardproof.parallel import initial
from shardproof.parallel.deferred import build_deferred, fills_first
from shardproof.parallel.extras import extras_of
from shardproof.parallel.held import Held, held_parameters
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.training import Training
from shardproof.train.arrange import Arranged, arrange
from shardproof.train.scaling import LossScaler
from shardproof.trainer.precision import COMPUTED_IN, weights_in


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """All of a run that changes as it is trained, but for its place in the data."""

    arranged: Arranged
    scheduler: LRScheduler | None
    scaler: LossScaler | None
    """For float16, where the step is shardproof's own."""


def build(
    experiment: Experiment, parallelism: Parallelism, training: Training, mesh: DeviceMesh, device: torch.device
) -> Trained:
    """Build the model, lay it out, and make what steps it. All ranks must do so alike.

    Raises what `arrange` and the layout raise, and `UsageError` for a scheduler that cannot be used.
    """
    extras = extras_of(
        training.activation_checkpointing,
        experiment.fsdp_units,
        compiled=training.compile,
        param_dtype=COMPUTED_IN.get(training.gather_precision or ""),
        unused_parameters=training.unused_parameters,
    )
    with initial.default_dtype(weights_in(training.precision)):
        model, fill = _unlaid(experiment, parallelism, training, device)
        arranged = arrange(model, experiment, mesh, parallelism, extras=extras, fill=fill)
        scheduler = None if training.scheduler is None else make_scheduler(training.scheduler, arranged.optimizer)
    scales = training.precision == "fp16" and experiment.train_step is None
    return Trained(arranged=arranged, scheduler=scheduler, scaler=LossScaler() if scales else None)


def _unlaid(
    experiment: Experiment, parallelism: Parallelism, training: Training, device: torch.device
) -> tuple[nn.Module, Callable[[nn.Module, list[Held]], None] | None]:
    """The model before it is laid out, and what is to give it values afterwards, if anything."""
    dtype = weights_in(training.precision)
    if training.init_device != "meta":
        return initial.build(experiment, dtype, device), None
    model, recipe = build_deferred(experiment, dtype)
    if fills_first(parallelism):
        recipe.fill(model, list(held_parameters(model)), device)
        return model, None
    return model, lambda root, parameters: recipe.fill(root, parameters, device)


def make_scheduler(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """What `Training.scheduler` makes of the optimizer. Raises `UsageError` where that cannot be stepped every step."""
    try:
        scheduler = make(optimizer)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        # It was not even entered: a class that wants more than an optimizer, most likely.
        raise UsageError(
            f"scheduler cannot be called with the optimizer alone ({error}); give a function that can, as "
            "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
        ) from error
    if not isinstance(scheduler, LRScheduler):
        raise UsageError(
            f"scheduler returned {type(scheduler).__name__}; it must return a torch.optim.lr_scheduler.LRScheduler"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UsageError(
            "ReduceLROnPlateau is stepped with a metric, and schedulers are stepped after every optimizer step; "
            "lower the learning rate in a callback's eval_end instead"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UsageError(
            f"scheduler returned a {type(scheduler).__name__} of another optimizer; make it of the one it is given"
        )
    return scheduler
