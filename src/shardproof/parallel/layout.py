"""Lay a model out over a mesh: one short function per strategy family, applied inside out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardproof.errors import ExperimentError, StrategyError, UsageError
from shardproof.parallel import plan
from shardproof.parallel.extras import Extras, checkpoint_activations, compile_units
from shardproof.parallel.flat import flat
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.patterns import select


def lay_out(
    model: nn.Module,
    experiment: Experiment,
    mesh: DeviceMesh,
    parallelism: Parallelism,
    extras: Extras | None = None,
) -> nn.Module:
    """The model under `parallelism`: by the experiment's own `parallelize` where it has one, else by shardproof's.

    Raises `StrategyError` where the strategy needs a plan that is not there, `PatternError` where names do not match,
    `UsageError` for `extras` that a user's own `parallelize` would have to see to.
    """
    extras = extras or Extras()
    if experiment.parallelize is not None:
        if replace(extras, unused_parameters=True) != Extras():
            raise UsageError(
                "Experiment.parallelize lays the model out, so that compile, activation_checkpointing and "
                "gather_precision are its own to see to; leave them out of the Training"
            )
        laid_out = experiment.parallelize(model, mesh, parallelism)
        if not isinstance(laid_out, nn.Module):
            raise ExperimentError(
                f"Experiment.parallelize returned {laid_out!r}; it must return the laid-out nn.Module"
            )
        return laid_out
    units = [model.get_submodule(name) for name in unit_names(model, experiment.fsdp_units)]
    # TP first: fully_shard and FSDP must see the tp-sharded parameter to split it once more.
    if parallelism.tp > 1:
        if not experiment.tp_plan:
            raise StrategyError(
                f"{parallelism.strategy}: tensor parallelism needs Experiment.tp_plan, as "
                '{"fc1": "colwise", "fc2": "rowwise"}, or Experiment.parallelize'
            )
        plan.apply(model, experiment.tp_plan, mesh["tp"])
    checkpoint_activations(model, extras.checkpointed, compiled=extras.compiled)
    if extras.compiled:
        # Outermost but for data parallelism, whose hooks must run between the compiled units.
        compile_units(model, units)
    if parallelism.flat_parameters:
        return flat(model, units, mesh, extras.flat_policy)
    if parallelism.dp_shard > 1:
        return sharded(model, units, mesh, replicas=parallelism.dp_replicate, policy=extras.policy)
    if parallelism.dp_replicate > 1:
        # DDP cannot hold DTensors (torch 2.13 mixes them with plain tensors in its first broadcast); HSDP with
        # one shard is the same data parallelism, and what torch's own `replicate` is made of.
        return (
            sharded(model, [], mesh, replicas=parallelism.dp_replicate)
            if parallelism.tp > 1
            else replicated(model, mesh, unused_parameters=extras.unused_parameters)
        )
    return model


def unit_names(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Modules that become FSDP units, innermost first: a unit must be sharded before the unit around it."""
    modules = dict(model.named_modules())
    names = {name for pattern in patterns for name in select(modules, pattern, field="fsdp_units")}
    return sorted(names, key=lambda name: -name.count("."))


def replicated(model: nn.Module, mesh: DeviceMesh, *, unused_parameters: bool) -> nn.Module:
    """DistributedDataParallel over the data axes."""
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if mesh.device_type == "cuda" else None,
        process_group=mesh["dp_replicate"].get_group(),
        find_unused_parameters=unused_parameters,
    )


def sharded(
    model: nn.Module,
    units: list[nn.Module],
    mesh: DeviceMesh,
    *,
    replicas: int,
    policy: MixedPrecisionPolicy | None = None,
) -> nn.Module:
    """fully_shard over `dp_shard`, with `dp_replicate` around it for HSDP."""
    axes = mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
    policy = policy or MixedPrecisionPolicy()
    for unit in units:
        fully_shard(unit, mesh=axes, mp_policy=policy)
    fully_shard(model, mesh=axes, mp_policy=policy)
    return model
