"""Gradients that are not reduced over data ranks, or for a part of the work only (catalogue section 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardproof.spec.experiment import Experiment
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import cross_entropy, mlp
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="jingyaogong/minimind #853, moojink/openvla-oft #160",
)
def ddp_module_bypass(setting: Setting) -> Experiment:
    """The loss calls the module inside DDP, whose reducer is never armed."""

    def past_the_wrapper(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model.module if isinstance(model, DistributedDataParallel) else model, batch)

    return mlp(setting, parallelize=replicated, loss=past_the_wrapper)


@bug(
    cause="grad-partly-reduced",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="modelscope/FunASR PR #3472",
)
def ddp_sync_first_mb(setting: Setting) -> Experiment:
    """The first micro-batch is synchronised, and the others are inside no_sync."""

    def step(step: Any) -> Tensor:
        return plain_step(step, syncs=lambda m, _count: m == 0)

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)
