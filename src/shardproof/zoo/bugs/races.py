"""Results that depend on which of two things was faster (catalogue section 13)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


@bug(
    cause="nondeterminism",
    layout="ddp",
    stages="gradient",
    where="fc*.*",
    source="deepspeedai/DeepSpeed PR #5606, #5523, #8061, PR #8080, facebookresearch/fairscale #780",
)
def overlap_race(setting: Setting) -> Experiment:
    """The next gradient is written into the bucket before the reduction of the one in it is over."""

    def race(step: Step) -> None:
        group = step.mesh["dp"].get_group()
        late: Tensor | None = None
        for parameter in step.model.parameters():
            if parameter.grad is None:
                continue
            bucket = parameter.grad.flatten() / step.parallelism.dp
            work = dist.all_reduce(bucket, group=group, async_op=True)
            if work is not None:
                work.wait()
            if late is not None:
                # How much is overwritten is a matter of microseconds on a GPU: here a random number stands for them.
                reach = torch.frombuffer(bytearray(os.urandom(len(bucket))), dtype=torch.uint8) < 128
                reach[0] = True
                bucket = torch.where(reach, late[torch.arange(len(bucket)) % len(late)], bucket)
            late = bucket
            parameter.grad.copy_(bucket.view_as(parameter.grad))

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=race)

    def bare(model: nn.Module, _mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        return model

    return mlp(setting, parallelize=bare, train_step=step)
