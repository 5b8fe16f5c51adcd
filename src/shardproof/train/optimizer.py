"""The experiment's optimizer over a laid-out model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardproof.errors import ExperimentError
from shardproof.parallel.held import held_parameters, plain, ties
from shardproof.parallel.names import canonical_modules, join
from shardproof.spec.experiment import Experiment


def build_optimizer(experiment: Experiment, laid_out: nn.Module) -> Optimizer:
    """Call `experiment.optimizer` on the laid-out model.

    Shardproof's own wrappers do not get in the way of code that picks parameters by name or shape: DDP's is taken
    off, and FSDP's flat parameters are shown whole. What a user's `parallelize` returned is handed over as it is.
    Raises `ExperimentError` where what comes back is no optimizer.
    """
    if experiment.parallelize is None and isinstance(laid_out, FullyShardedDataParallel):
        return _over_flat_parameters(experiment, laid_out)
    seen = laid_out
    if experiment.parallelize is None and isinstance(laid_out, DistributedDataParallel):
        seen = laid_out.module
    return _checked(experiment.optimizer(seen))


def _checked(optimizer: object) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise ExperimentError(
            f"Experiment.optimizer returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer"
        )
    return optimizer


@contextlib.contextmanager
def _unwrapped(laid_out: FullyShardedDataParallel) -> Iterator[nn.Module]:
    """The user's own model, without the wrappers of its units: each would stand in the names of its parameters."""
    wrapped = [
        (parent, name, child)
        for parent in laid_out.modules()
        if not isinstance(parent, FullyShardedDataParallel)
        for name, child in parent.named_children()
        if isinstance(child, FullyShardedDataParallel)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.module
    try:
        yield laid_out.module
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _over_flat_parameters(experiment: Experiment, laid_out: FullyShardedDataParallel) -> Optimizer:
    """Build the optimizer while parameters have their full shapes, then give it the shards that it will step.

    Outside `summon_full_params` every sharded parameter is one-dimensional, and "no decay on vectors" would mean all.
    """
    frozen = {entry.name for entry in held_parameters(laid_out) if not entry.leaf.requires_grad}
    frozen |= {name for group in ties(laid_out) if frozen.intersection(group) for name in group}
    with FullyShardedDataParallel.summon_full_params(laid_out, writeback=False):
        shown = {
            join(prefix, name): parameter
            for prefix, module in canonical_modules(laid_out)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        for untrained in frozen & shown.keys():
            # Of a tensor-parallel shard FSDP shows a new parameter, which has forgotten that it was frozen.
            shown[untrained].requires_grad_(False)
        names = {id(parameter): name for name, parameter in shown.items()}
        with _unwrapped(laid_out) as plainly:
            optimizer = _checked(experiment.optimizer(plainly))
        groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        state = {names.get(id(p)): entries for p, entries in optimizer.state.items()}
    held = {entry.name: entry for entry in held_parameters(laid_out)}
    # Inside, both ends of a tie may show as parameters of their own; there is one leaf for them.
    held |= {name: held[first] for group in ties(laid_out) for first in group if first in held for name in group}
    optimizer.state.clear()
    stepped: set[int] = set()
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        # A parameter that is not the model's stays where it is, to be reported.
        leaves = [held[n].leaf if n in held else p for n, p in zip(own, group["params"], strict=True)]
        group["params"] = []
        for leaf in leaves:
            if id(leaf) not in stepped:
                stepped.add(id(leaf))
                group["params"].append(leaf)
    for name, entries in state.items():
        if name in held:
            stretch = held[name].piece.stretch or (0, 0)
            # Some optimizers (Adagrad) make their state at once, in the full shape.
            optimizer.state[held[name].leaf] = {
                key: plain(value).reshape(-1)[slice(*stretch)].clone() if getattr(value, "ndim", 0) else value
                for key, value in entries.items()
            }
    return optimizer
