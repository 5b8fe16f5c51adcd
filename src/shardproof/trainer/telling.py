"""What a run says of itself: to whoever watches it, and to its loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shardproof.spec.duration import Duration
from shardproof.trainer.screen import Shown

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop


def shown(
    loop: Loop, until: Duration, steps_per_epoch: int | None, *, loss: float | None, samples_per_s: float | None
) -> Shown:
    """How far the run is on its way to `until`. `steps_per_epoch` is None where nobody knows."""
    total = {
        "ba": until.count,
        "ep": None if steps_per_epoch is None else until.count * steps_per_epoch,
        "sp": -(-until.count // loop.experiment.batch_size),
        "s": None,
    }[until.unit]
    samples_per_epoch = None if steps_per_epoch is None else steps_per_epoch * loop.experiment.batch_size
    groups = loop.optimizer.param_groups
    return Shown(
        step=loop.progress.step,
        total_steps=None if total is None else int(total),
        epoch=loop.progress.epoch,
        fraction=loop.progress.share(until, samples_per_epoch),
        loss=loss,
        samples_per_s=samples_per_s,
        lr=float(groups[0]["lr"]) if groups else None,
    )


def about(loop: Loop) -> dict[str, Any]:
    """What a logger is told of the run when it starts: plain data."""
    return {
        "strategy": loop.parallelism.strategy,
        "ranks": loop.parallelism.world_size,
        **sizes(loop),
        "device": str(loop.device.type),
        "precision": loop.training.precision,
        "batch_size": loop.experiment.batch_size,
        "microbatches": loop.experiment.microbatches,
        "seed": loop.experiment.seed,
        "max_duration": str(loop.training.max_duration),
        "max_grad_norm": loop.experiment.max_grad_norm,
        "parameters": sum(torch.Size(shape).numel() for shape in loop.shapes.values()),
        "optimizer": type(loop.optimizer).__name__,
        "first_step": loop.progress.step,
    }


def sizes(loop: Loop) -> dict[str, int]:
    """Ranks per mesh axis."""
    return dict(zip(loop.mesh.mesh_dim_names or (), loop.mesh.shape, strict=True))
