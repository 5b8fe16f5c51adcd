"""Buffers that are wrong after a step whose gradients are right (catalogue sections 11 and 13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.loaders import summed_cross_entropy, uneven
from shardproof.zoo.fixtures.megatron import own_slice, replicated, split_mlp
from shardproof.zoo.fixtures.mlp import Mlp, mlp
from shardproof.zoo.fixtures.state import balanced_step, routed, tracked
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


@bug(
    cause="buffers",
    layout="tp_ddp",
    stages="buffer",
    where="router.*",
    source="pytorch/torchtitan PR #4154",
    trusted=routed,
)
def expert_bias_tp_axis(setting: Setting) -> Experiment:
    """Each tensor-parallel rank counts its share of the tokens, and the counts are summed over data ranks only."""

    def lay_out(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.router.own = partial(own_slice, group=mesh["tp"].get_group(), dim=0)
        return split_mlp(model, mesh, parallelism)

    return routed(setting, parallelize=lay_out, train_step=partial(balanced_step, axes=("dp",)))


@bug(
    cause="buffers",
    layout="ddp",
    stages="buffer",
    where="stats.mean",
    source="open-mmlab/mmdetection #2539, huggingface/pytorch-image-models #110",
)
def running_stats_of_rank(setting: Setting) -> Experiment:
    """Running statistics are kept of each data rank's own samples, and are never reduced."""

    def lay_out(model: nn.Module, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), broadcast_buffers=False)

    return tracked(setting, parallelize=lay_out)


@bug(
    cause="buffers",
    layout="ddp",
    stages="buffer",
    where="stats.mean",
    source="facebookresearch/fvcore #152, facebookresearch/detectron2 #5409",
)
def precise_bn_batch_size(setting: Setting) -> Experiment:
    """Statistics are averaged over data ranks as if all of them had read as many samples."""

    def mean_of_means(totals: Tensor) -> Tensor:
        means = totals / totals[-1]
        dist.all_reduce(means)
        return means

    def lay_out(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.stats.reduce = mean_of_means
        return replicated(model, mesh, parallelism)

    return tracked(setting, parallelize=lay_out, batches=partial(uneven, setting.batch), loss=summed_cross_entropy)


class _Averaged(Mlp):
    """The perceptron with an average of its last weights over the steps, and the copy that evaluation uses."""

    average: Tensor
    evaluated: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("average", self.fc3.weight.detach().clone())
        self.register_buffer("evaluated", self.fc3.weight.detach().clone())


def _averaged_step(step: Step, *, refreshes: int | None = None) -> Tensor:
    """The step, and the average of the weights; the copy for evaluation is refreshed so often, None for always."""
    logged = plain_step(step)
    model: Any = step.model
    weight = model.fc3.weight.detach()
    model.average.lerp_(weight.full_tensor() if isinstance(weight, DTensor) else weight, 0.1)
    if refreshes is None or step.index < refreshes:
        model.evaluated.copy_(model.average)
    return logged


def _averaged(setting: Setting) -> Experiment:
    return mlp(setting, model=lambda: _Averaged(setting), train_step=_averaged_step)


@bug(
    cause="buffers",
    layout="fsdp",
    stages="buffer",
    where="evaluated",
    source="pytorch/pytorch PR #106858",
    trusted=_averaged,
)
def fsdp_stale_unsharded_ema(setting: Setting) -> Experiment:
    """The unsharded copy of averaged weights that evaluation uses is made once and not refreshed."""
    return mlp(setting, model=lambda: _Averaged(setting), train_step=partial(_averaged_step, refreshes=1))
