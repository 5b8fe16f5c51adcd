"""An experiment's model laid out over a mesh, with its optimizer: what `check` and the trainer step alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from shardproof.parallel.extras import Extras
from shardproof.parallel.held import Held, held_parameters
from shardproof.parallel.layout import lay_out
from shardproof.parallel.names import canonical_buffers
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.patterns import select
from shardproof.train.optimizer import build_optimizer

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arranged:
    """A laid-out model and its optimizer on this rank."""

    model: nn.Module
    """The very object that the layout returned."""

    root: nn.Module
    """The module whose names are the experiment's: `model`, or what a user's own wrapper hides."""

    optimizer: Optimizer

    parameters: list[Held]
    """As this rank holds them after the layout."""

    shapes: Shapes
    """Canonical name of each parameter -> its shape on one device."""

    buffers: Shapes
    """Likewise of each buffer."""


def arrange(
    model: nn.Module,
    experiment: Experiment,
    mesh: DeviceMesh,
    parallelism: Parallelism,
    *,
    extras: Extras | None = None,
    fill: Callable[[nn.Module, list[Held]], None] | None = None,
) -> Arranged:
    """Lay `model` out and build its optimizer.

    `fill` gives values to a model that was built without storage: it is called with the root and the parameters after
    the layout and before the optimizer. Raises what the layout and the optimizer raise, and `PatternError` where a
    pattern of `Experiment.placements` matches nothing.
    """
    shapes = {held.name: tuple(held.leaf.shape) for held in held_parameters(model)}
    buffers = {name: tuple(b.shape) for name, b in canonical_buffers(model) if isinstance(b, Tensor)}
    for pattern in experiment.placements or {}:
        select(shapes, pattern, field="placements", kind="parameter")
    laid_out = lay_out(model, experiment, mesh, parallelism, extras)
    root = _root(laid_out, model, shapes)
    if fill is not None:
        fill(root, list(held_parameters(root, shapes)))
    optimizer = build_optimizer(experiment, laid_out)
    return Arranged(
        model=laid_out,
        root=root,
        optimizer=optimizer,
        parameters=list(held_parameters(root, shapes)),
        shapes=shapes,
        buffers=buffers,
    )


def _root(laid_out: nn.Module, model: nn.Module, shapes: Shapes) -> nn.Module:
    if any(held.name in shapes for held in held_parameters(laid_out)):
        return laid_out
    return next((module for module in laid_out.modules() if module is model), laid_out)
