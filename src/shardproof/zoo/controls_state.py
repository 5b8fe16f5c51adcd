"""Right code about state: norms, buffers, optimizers, random draws, samples and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DistributedSampler

from shardproof.parallel.held import plain
from shardproof.parallel.layout import sharded
from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import control
from shardproof.zoo.fixtures.loaders import cut, summed_cross_entropy, uneven
from shardproof.zoo.fixtures.megatron import Parts, own_slice, replicated, split, split_mlp
from shardproof.zoo.fixtures.mlp import Mlp, Points, mlp
from shardproof.zoo.fixtures.optimizers import Lars, decaying, scheduled_step
from shardproof.zoo.fixtures.quantised import QuantisedRow, quantised_decoder
from shardproof.zoo.fixtures.state import (
    Fragile,
    Outlying,
    anywhere_infinite,
    balanced_step,
    routed,
    scaled_step,
    tracked,
    wave_decoder,
)
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


@control(layout="tp_fsdp")
def clipping_by_hand(setting: Setting) -> Experiment:
    """A user's step clips with the norm of whole gradients, some of them sharded over both axes."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def clip(step: Step) -> None:
        if step.max_grad_norm is None:
            raise TypeError("this step clips")
        gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
        norm = torch.stack([whole(gradient).square().sum() for gradient in gradients]).sum().sqrt()
        for gradient in gradients:
            plain(gradient).mul_((step.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    return mlp(setting, train_step=partial(plain_step, before_update=clip), max_grad_norm=0.01)


@control(layout="tp_fsdp")
def clipping(setting: Setting) -> Experiment:
    """Gradients are clipped by the step that is not a user's."""
    return mlp(setting, max_grad_norm=0.01)


@control(layout="fsdp")
def param_groups(setting: Setting) -> Experiment:
    """Weights are decayed and biases are not, each group at a learning rate of its own."""

    def groups(model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5, "lr": 0.01},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
            ]
        )

    return mlp(setting, optimizer=groups)


@control(layout="fsdp")
def frozen_parameters(setting: Setting) -> Experiment:
    """The first layer is frozen, and the optimizer is given the rest."""

    def frozen() -> nn.Module:
        model = Mlp(setting)
        model.fc1.requires_grad_(False)
        return model

    def trained(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    return mlp(setting, model=frozen, optimizer=trained)


@control(layout="fsdp")
def trust_ratio_of_whole(setting: Setting) -> Experiment:
    """An optimizer that needs the norm of whole matrices reduces it over their shards."""
    return mlp(setting, optimizer=lambda model: Lars(model.parameters()))


@control(layout="ddp", trusted=partial(mlp, optimizer=decaying, train_step=scheduled_step))
def learning_rate_schedule(setting: Setting) -> Experiment:
    """The learning rate shrinks in every step, as it does on one device."""
    return mlp(setting, optimizer=decaying, train_step=scheduled_step)


def _statistics_summed(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
    def summed(totals: Tensor) -> Tensor:
        dist.all_reduce(totals)
        return totals

    model.stats.reduce = summed
    return replicated(model, mesh, parallelism)


@control(layout="ddp")
def running_mean_reduced(setting: Setting) -> Experiment:
    """Running statistics are taken of the samples of all data ranks."""
    return tracked(setting, parallelize=_statistics_summed)


@control(layout="ddp")
def uneven_shares(setting: Setting) -> Experiment:
    """Data ranks read unequally many samples, and statistics, gradients and loss weigh them so."""
    return tracked(
        setting, parallelize=_statistics_summed, batches=partial(uneven, setting.batch), loss=summed_cross_entropy
    )


@control(layout="tp_ddp", trusted=routed)
def expert_counts_reduced(setting: Setting) -> Experiment:
    """Each tensor-parallel rank counts its share of the tokens, and the counts are summed over both axes."""

    def lay_out(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.router.own = partial(own_slice, group=mesh["tp"].get_group(), dim=0)
        return split_mlp(model, mesh, parallelism)

    return routed(setting, parallelize=lay_out, train_step=balanced_step)


@control(layout="fsdp")
def nonpersistent_buffer(setting: Setting) -> Experiment:
    """A buffer that no state dict holds is computed anew after the model was sharded."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        kept = model.pos.inv_freq.clone()
        model.pos.inv_freq = torch.zeros_like(kept)
        model = sharded(model, list(model.blocks), mesh, replicas=1)
        model.pos.inv_freq.copy_(kept)
        return model  # type: ignore[no-any-return]

    return wave_decoder(setting, parallelize=lay_out)


class _Averaged(Mlp):
    average: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("average", self.fc3.weight.detach().clone())


def _averaged(setting: Setting) -> Experiment:
    def step(step: Step) -> Tensor:
        logged = plain_step(step)
        model: Any = step.model
        weight = model.fc3.weight.detach()
        model.average.lerp_(weight.full_tensor() if isinstance(weight, DTensor) else weight, 0.1)
        return logged

    return mlp(setting, model=lambda: _Averaged(setting), train_step=step)


@control(layout="fsdp", trusted=_averaged)
def averaged_weights(setting: Setting) -> Experiment:
    """A buffer holds the average of a weight over the steps, gathered from its shards."""
    return _averaged(setting)


@control(layout="tp")
def amax_shared(setting: Setting) -> Experiment:
    """Eight-bit activations are scaled to the largest element of all tensor-parallel ranks."""

    def lay_out(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        return split(model, mesh, parallelism, parts=Parts(row=QuantisedRow))

    return quantised_decoder(setting, parallelize=lay_out)


def _scaled(setting: Setting) -> Experiment:
    return mlp(
        setting,
        model=lambda: Fragile(setting),
        data=Outlying(setting),
        train_step=partial(scaled_step, overflows=anywhere_infinite),
    )


@control(layout="fsdp", trusted=_scaled)
def overflow_shared(setting: Setting) -> Experiment:
    """All ranks skip the update of a step in which the gradients of one of them overflow."""
    return _scaled(setting)


@control(layout="ddp", trusted=_scaled)
def overflow_seen_by_all(setting: Setting) -> Experiment:
    """The same under DDP, where an overflow reaches every rank with the reduction of the gradients."""
    return _scaled(setting)


@control(layout="tp_fsdp")
def loss_scaled_and_gradients_unscaled(setting: Setting) -> Experiment:
    """A user's step multiplies the loss by a large power of two, and divides the gradients by it."""
    scale = 2.0**16

    def unscale(step: Step) -> None:
        for parameter in step.model.parameters():
            if parameter.grad is not None:
                plain(parameter.grad).div_(scale)

    step = partial(plain_step, divide=lambda count: count / scale, before_update=unscale)
    return mlp(setting, train_step=step, microbatches=setting.microbatches)


class _Dropped(Mlp):
    def __init__(self, setting: Setting, probability: float) -> None:
        super().__init__(setting)
        self.drop = nn.Dropout(probability)

    def forward(self, x: Tensor) -> Tensor:  # (batch, inputs) -> (batch, classes)
        return self.fc3(self.drop(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))))  # type: ignore[no-any-return]


@control(layout="ddp")
def dropout_of_nothing(setting: Setting) -> Experiment:
    """Dropout modules that drop nothing draw nothing that could differ."""
    return mlp(setting, model=lambda: _Dropped(setting, 0.0))


@control(layout="tp")
def dropout_alike_on_peers(setting: Setting) -> Experiment:
    """Tensor-parallel ranks drop the same features of an activation that they all hold."""
    return mlp(setting, model=lambda: _Dropped(setting, 0.25))


@control(layout="ddp")
def sampler_over_epochs(setting: Setting) -> Experiment:
    """A DistributedSampler is told of each epoch, of which there are two."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, parallelism.dp, mesh["dp"].get_local_rank(), seed=setting.seed
        )
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield from cut(data, list(sampler), setting.batch // parallelism.dp)

    return mlp(setting, batches=batches, steps=6)


@control(layout="ddp")
def sampler_fills_up(setting: Setting) -> Experiment:
    """A DistributedSampler repeats samples at the end of an epoch that does not divide by the data ranks."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        sampler: DistributedSampler[Any] = DistributedSampler(data, parallelism.dp, mesh["dp"].get_local_rank())
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield from cut(data, list(sampler), setting.batch // parallelism.dp)

    points = Points(setting)
    points.samples = 2 * setting.batch - 1
    return mlp(setting, data=points, batches=batches, steps=4)


@control(layout="tp_ddp")
def users_shuffle(setting: Setting) -> Experiment:
    """A user's own shuffle, cut over the data ranks, the same on tensor-parallel peers."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(setting.seed + 1)
        order = torch.randperm(len(data), generator=generator).tolist()
        own = order[mesh["dp"].get_local_rank() :: parallelism.dp]
        return cut(data, own, setting.batch // parallelism.dp)

    return mlp(setting, batches=batches)


@control(layout="fsdp")
def resumed_from_checkpoint(setting: Setting) -> Experiment:
    """Weights and optimizer state are taken out between two steps, lost, and put back."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(step: Step) -> Tensor:
        if step.index == 1:
            weights, state = get_state_dict(step.model, step.optimizer)
            weights, state = tree_map_only(Tensor, torch.clone, (weights, state))
            with torch.no_grad():
                for parameter in step.model.parameters():
                    plain(parameter).zero_()
            step.optimizer.state.clear()
            set_state_dict(step.model, step.optimizer, model_state_dict=weights, optim_state_dict=state)
        return plain_step(step)

    return mlp(setting, optimizer=adam, train_step=step)
