"""What a trace says of the run beside its tensors: wrappers, groups of ranks, ties, and what the optimizer holds."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from shardproof.parallel.held import Held, held_parameters, ties
from shardproof.parallel.names import ROOT, inside, join, within
from shardproof.record.axes import Axes, found_axes, told
from shardproof.record.hints import hints
from shardproof.record.places import compiled_by_wrapper, compiled_in_place, wrappers_of

SHOWN = 8
"""Strangers that are described one by one."""


def outermost(model: nn.Module) -> nn.Module:
    """The wrapper around `model` that nobody attached: a trainer may have made it for itself. Or `model`.

    Every object of the process is looked at, which takes some 0.1 s.
    """
    around: dict[int, nn.Module] = {}
    for found in gc.get_objects():
        # By its real class: to ask a lazy stand-in for its own would build what it stands for.
        if issubclass(type(found), nn.Module) and "_modules" in vars(found):
            inner = within(found)
            # A model may have been compiled for something else than what is recorded; sharding it is for good.
            if inner is not None and not compiled_by_wrapper(found):
                around[id(inner)] = found
    while id(model) in around:
        model = around[id(model)]
    return model


def axes_of(model: nn.Module, mesh: DeviceMesh | None, parameters: Iterable[Held]) -> tuple[Axes, str]:
    """(axes, where they are from). Raises `UsageError` for a `mesh` that cannot be meant."""
    found = found_axes(model, parameters)
    if mesh is not None:
        return told(mesh, found), "mesh="
    return found, "wrappers and DTensors" if found else ""


def layout(
    model: nn.Module, optimizers: Sequence[Optimizer], mesh: DeviceMesh | None, declared: str
) -> dict[str, object]:
    """The facts of the event `layout`, as plain data."""
    parameters = list(held_parameters(model))
    axes, source = axes_of(model, mesh, parameters)
    return {
        "ties": [list(group) for group in ties(model)],
        "strangers": strangers(parameters, optimizers),
        "left_behind": left_behind(parameters, optimizers),
        "wrappers": wrappers(model),
        "axes": axes,
        "axes_from": source,
        "declared": declared or intended(),
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "train": model.training,
        "hints": hints(model, parameters),
    }


def strangers(parameters: Iterable[Held], optimizers: Iterable[Optimizer]) -> list[str]:
    """Parameters that an optimizer steps and the model does not have, as after sharding that came too late."""
    own = {id(held.leaf) for held in parameters}
    found = [
        f"{type(optimizer).__name__}: group {number}, parameter {index}, shape {tuple(parameter.shape)}"
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) not in own
    ]
    return found if len(found) <= SHOWN else [*found[:SHOWN], f"and {len(found) - SHOWN} more"]


def left_behind(parameters: Iterable[Held], optimizers: Iterable[Optimizer]) -> list[str]:
    """Parameters that want a gradient, and that no optimizer steps; none while no optimizer is known."""
    optimizers = list(optimizers)
    if not optimizers:
        return []
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [held.name for held in parameters if held.leaf.requires_grad and id(held.leaf) not in stepped]


def wrappers(model: nn.Module) -> dict[str, list[str]]:
    """Class of a wrapper -> canonical names of the modules that it is around."""
    found: dict[str, list[str]] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> None:
        own = inside(module)
        if id(own) in seen:
            return
        seen.add(id(own))
        around = wrappers_of(module)
        classes = [type(wrapper).__name__ for wrapper in around]
        if isinstance(own, FSDPModule):
            classes.append("FSDPModule")
        if any(compiled_in_place(part) for part in (*around, own)):
            classes.append("OptimizedModule")
        for word in dict.fromkeys(classes):
            found.setdefault(word, []).append(name or ROOT)
        for child_name, child in own.named_children():
            walk(child, join(name, child_name))

    walk(model, "")
    return found


def intended() -> str:
    """What a launcher was asked for in the environment: "fsdp", "ddp", or nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        return "fsdp"
    return ""
