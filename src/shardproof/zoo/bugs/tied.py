"""Weights that are one on one device, and two in the layout (catalogue section 8)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import replicated, split
from shardproof.zoo.setting import Setting


@bug(
    cause="tied-weights-split",
    layout="ddp",
    stages="initial-state",
    where=("tok.weight", "head.weight"),
    source="uw-syfi/piper #13; Cornstarch PR #16",
)
def pp_tied_not_reduced(setting: Setting) -> Experiment:
    """The last stage has a copy of the embedding of its own, and nobody sums the gradients of the two."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.head.weight = nn.Parameter(model.tok.weight.detach().clone())
        return replicated(model, mesh, parallelism)

    return decoder(setting, tied=True, parallelize=parallelize)


@bug(
    cause="tied-weights-split",
    layout="tp",
    stages="initial-state",
    where=("tok.weight", "head.weight"),
    source="foundation-model-stack PR #331",
)
def tied_split_by_plan(setting: Setting) -> Experiment:
    """A torch plan splits embedding and head, each by itself, which makes two parameters of one."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        plan = {
            "tok": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        return parallelize_module(split(model, mesh, parallelism), mesh["tp"], plan)

    return decoder(setting, tied=True, parallelize=parallelize)
