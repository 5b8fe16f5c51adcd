"""Gradients that are right until they are clipped (catalogue section 10)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from shardproof.parallel.held import plain
from shardproof.spec.experiment import Experiment
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting

LIMIT = 0.01
"""Below the gradient norm of every setting, of a single shard too."""


def _clipped(setting: Setting, squares: Callable[[Step], Tensor]) -> Experiment:
    """The perceptron, clipped by hand with the square of a norm that is taken of the step's gradients."""

    def clip(step: Step) -> None:
        if step.max_grad_norm is None:
            raise TypeError("this step clips")
        coefficient = (step.max_grad_norm / (squares(step).sqrt() + 1e-6)).clamp(max=1.0)
        for parameter in step.model.parameters():
            if parameter.grad is not None:
                plain(parameter.grad).mul_(coefficient)

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=clip)

    return mlp(setting, train_step=step, max_grad_norm=LIMIT)


def _local_squares(step: Step) -> Tensor:
    return torch.stack([plain(p.grad).square().sum() for p in step.model.parameters() if p.grad is not None]).sum()


@bug(
    cause="grad-norm",
    layout="fsdp",
    stages="grad-norm",
    where="fc*.*",
    source="pytorch/pytorch #72548, pytorch/torchtitan #766",
)
def clip_local_shard(setting: Setting) -> Experiment:
    """Each rank clips with the norm of its own shards."""
    return _clipped(setting, _local_squares)


@bug(
    cause="grad-norm",
    layout="tp",
    stages="grad-norm",
    where="fc*.*",
    source="NVIDIA-NeMo/RL PR #3788, ROCm/TransformerEngine PR #715",
)
def norm_counts_replicated_tp(setting: Setting) -> Experiment:
    """The norm is summed over tensor-parallel ranks for replicated parameters too, which count once per rank."""

    def squares(step: Step) -> Tensor:
        total = _local_squares(step)
        dist.all_reduce(total, group=step.mesh["tp"].get_group())
        return total

    return _clipped(setting, squares)


@bug(
    cause="grad-norm",
    layout="tp",
    stages="grad-norm",
    where="fc*.*",
    source="NVIDIA/Megatron-LM PR #5916, PR #7530",
)
def norm_misses_sharded(setting: Setting) -> Experiment:
    """Shards are taken for copies, and only those of the first tensor-parallel rank count."""

    def squares(step: Step) -> Tensor:
        total = _local_squares(step)
        if step.mesh["tp"].get_local_rank():
            total.zero_()
        dist.all_reduce(total, group=step.mesh["tp"].get_group())
        return total

    return _clipped(setting, squares)
