"""Samples read twice, by the wrong ranks or not at all, and layouts that were never applied (catalogue section 13)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DistributedSampler

from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.loaders import cut
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.setting import Setting


@bug(
    cause="batch-repeated-across-dp",
    layout="ddp",
    stages="batch",
    where="batch*",
    source="huggingface/datasets #5360, huggingface/transformers PR #11254",
)
def iterable_not_sharded(setting: Setting) -> Experiment:
    """An iterable data set has no sampler, and every data rank iterates over all of it."""

    def batches(data: Any, _mesh: DeviceMesh, parallelism: Parallelism) -> Iterable[Batch]:
        return cut(data, range(len(data)), setting.batch // parallelism.dp)

    return mlp(setting, batches=batches)


@bug(
    cause="batch-differs-in-group",
    layout="tp_ddp",
    stages="batch",
    where="batch*",
    source="huggingface/accelerate #3092, deepspeedai/DeepSpeed #99, pytorch/torchtitan PR #49",
)
def tp_ranks_different_data(setting: Setting) -> Experiment:
    """The sampler cuts the data over all ranks, so that tensor-parallel peers read different samples."""

    def batches(data: Any, _mesh: DeviceMesh, parallelism: Parallelism) -> Iterable[Batch]:
        sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=False)
        return cut(data, list(sampler), setting.batch // parallelism.world_size)

    return mlp(setting, batches=batches)


@bug(
    cause="data-order",
    layout="ddp",
    stages="batch",
    where="batch*",
    source="pytorch/pytorch #31771",
)
def set_epoch_missing(setting: Setting) -> Experiment:
    """The sampler is started anew for every step without being told so, and gives the same samples again."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, parallelism.dp, mesh["dp"].get_local_rank(), seed=setting.seed
        )
        while True:
            yield next(cut(data, list(sampler), setting.batch // parallelism.dp))

    return mlp(setting, batches=batches)


@bug(
    cause="data-order",
    layout="ddp",
    stages="batch",
    where="batch*",
    source="wyim-pgl/transgenic #59, huggingface/accelerate PR #4071",
)
def resume_wrong_samples(setting: Setting) -> Experiment:
    """After a resume the order is drawn anew, and as many samples of it are skipped as of the old one were read."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        share = setting.batch // parallelism.dp
        generator = torch.Generator().manual_seed(setting.seed)
        own = slice(mesh["dp"].get_local_rank(), None, parallelism.dp)
        yield next(cut(data, torch.randperm(len(data), generator=generator).tolist()[own], share))
        resumed = cut(data, torch.randperm(len(data), generator=generator).tolist()[own], share)
        next(resumed)
        yield from resumed

    return mlp(setting, batches=batches)


@bug(
    cause="data-order",
    layout="tp_ddp",
    stages="batch",
    where="batch*",
    source="deepspeedai/DeepSpeed PR #216 (the half of its fix that is easily forgotten)",
)
def sampler_of_all_ranks(setting: Setting) -> Experiment:
    """The sampler has the data rank and the number of all ranks, so that a part of the data is never read."""

    def batches(data: Any, mesh: DeviceMesh, parallelism: Parallelism) -> Iterator[Batch]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, parallelism.world_size, mesh["dp"].get_local_rank(), shuffle=False
        )
        while True:
            yield from cut(data, list(sampler), setting.batch // parallelism.dp)

    return mlp(setting, batches=batches)


@bug(
    cause="strategy-not-applied",
    layout="fsdp",
    stages="initial-state",
    where="fc1.weight",
    source="InternLM/xtuner #654",
)
def fsdp_config_ignored(setting: Setting) -> Experiment:
    """The trainer does not read the settings of FSDP and wraps the model in DDP, without a word."""
    return mlp(setting, parallelize=replicated)


@bug(
    cause="strategy-not-applied",
    layout="tp",
    stages="initial-state",
    where="fc1.weight",
    source="huggingface/transformers PR #47253, PR #37893",
)
def tp_plan_matches_nothing(setting: Setting) -> Experiment:
    """The plan's patterns match no module, and the model stays whole on every rank."""

    def lay_out(model: nn.Module, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        # Written for a model inside another one, as a trainer's own wrapper would make it.
        plan = {"model.fc1": ColwiseParallel(), "model.fc2": RowwiseParallel()}
        for name, module in list(model.named_modules()):
            if name in plan:
                parallelize_module(module, mesh["tp"], plan[name])
        return model

    return mlp(setting, parallelize=lay_out)
