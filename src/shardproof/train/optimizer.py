"""The experiment's optimizer over a laid-out model."""

from __future__ import annotations

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


def _over_flat_parameters(experiment: Experiment, laid_out: FullyShardedDataParallel) -> Optimizer:
    """Build the optimizer while parameters have their full shapes, then give it the shards that it will step.

    Outside `summon_full_params` every sharded parameter is one-dimensional, and "no decay on vectors" would mean all.
    """
    with FullyShardedDataParallel.summon_full_params(laid_out, writeback=False):
        names = {
            id(parameter): join(prefix, name)
            for prefix, module in canonical_modules(laid_out)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        optimizer = _checked(experiment.optimizer(laid_out.module))
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
