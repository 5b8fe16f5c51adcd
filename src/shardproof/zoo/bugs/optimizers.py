"""Right gradients, wrong updates (catalogue section 13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from shardproof.parallel.held import plain
from shardproof.parallel.layout import sharded
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.mlp import Mlp, mlp
from shardproof.zoo.fixtures.optimizers import Lars, decaying, schedule_of, scheduled_step
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


def _before_and_sharded(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
    model.before = list(model.parameters())
    return sharded(model, [], mesh, replicas=1)


@bug(
    cause="optimizer",
    layout="fsdp",
    stages=("optimizer-state", "update"),
    where=("fc*.*", "(root)"),
    source="pytorch/pytorch #149205, huggingface/accelerate #3256, PR #3835",
)
def stale_optimizer_params(setting: Setting) -> Experiment:
    """The optimizer was built before the model was sharded, and holds parameters that nobody trains any more."""

    def stale(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(getattr(model, "before", None) or list(model.parameters()), lr=0.1)

    return mlp(setting, parallelize=_before_and_sharded, optimizer=stale)


@bug(
    cause="optimizer",
    layout="fsdp",
    stages=("optimizer-state", "update"),
    where=("fc1.*", "fc2.*"),
    source="mosaicml/composer #3493, PR #3502",
)
def optimizer_gets_extra_params(setting: Setting) -> Experiment:
    """Sharding rebuilds the optimizer over all parameters, where the user had given it the last layer's."""

    def last_layer(model: Any) -> torch.optim.Optimizer:
        chosen: Any = model if isinstance(model, FSDPModule) else model.fc3
        return torch.optim.SGD(chosen.parameters(), lr=0.1)

    return mlp(setting, optimizer=last_layer)


class _Frozen(Mlp):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.fc1.requires_grad_(False)


@bug(
    cause="optimizer",
    layout="fsdp",
    stages=("gradient", "update"),
    where="fc1.*",
    source="pytorch/torchtitan PR #4282",
)
def frozen_becomes_trainable(setting: Setting) -> Experiment:
    """Frozen parameters are registered anew without their flag, and so are trained."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        for name, parameter in list(model.fc1.named_parameters()):
            model.fc1.register_parameter(name, nn.Parameter(parameter.detach()))
        return sharded(model, [], mesh, replicas=1)

    return mlp(setting, model=lambda: _Frozen(setting), parallelize=lay_out)


@bug(
    cause="optimizer",
    layout="ddp",
    stages="update",
    where="fc*.*",
    source="huggingface/accelerate #2926, huggingface/transformers PR #24088",
    trusted=partial(mlp, optimizer=decaying, train_step=scheduled_step),
)
def scheduler_stepped_per_rank(setting: Setting) -> Experiment:
    """The learning rate's schedule is stepped once per data rank, in every step."""

    def step(step: Step) -> Tensor:
        logged = plain_step(step)
        for _ in range(step.parallelism.dp):
            schedule_of(step).step()
        return logged

    return mlp(setting, optimizer=decaying, train_step=step)


@bug(
    cause="optimizer",
    layout="fsdp",
    stages="update",
    where="fc*.*",
    source="mlfoundations/open_clip PR #358, pytorch/pytorch #101343",
)
def decay_groups_flattened(setting: Setting) -> Experiment:
    """Weights are told from biases by their number of dims, and flat parameters have one: nothing is decayed."""

    def by_dims(model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)

    def lay_out(model: nn.Module, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        return FullyShardedDataParallel(model, device_mesh=mesh["dp_shard"], device_id=torch.device("cpu"))

    return mlp(setting, parallelize=lay_out, optimizer=by_dims)


@bug(
    cause="optimizer",
    layout="ddp",
    stages=("optimizer-state", "update"),
    where="fc*.*",
    source="huggingface/transformers #45656 (disputed)",
)
def optimizer_steps_twice(setting: Setting) -> Experiment:
    """The engine steps the optimizer at the end of backward, and the trainer does so again."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=lambda step: step.optimizer.step())

    return mlp(setting, optimizer=adam, train_step=step)


@bug(
    cause="optimizer",
    layout="fsdp",
    stages="update",
    where="fc*.*",
    source="hpcaitech/ColossalAI PR #5476 (which does it right)",
)
def trust_ratio_of_shard(setting: Setting) -> Experiment:
    """An optimizer that needs the norm of whole matrices takes that of its shards."""

    def alone(model: nn.Module) -> torch.optim.Optimizer:
        return Lars(model.parameters(), norm=lambda tensor: plain(tensor).norm())

    return mlp(setting, optimizer=alone)
