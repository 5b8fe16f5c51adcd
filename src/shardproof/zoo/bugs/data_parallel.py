"""Gradients not reduced over data ranks, for a part of the work only, or over the wrong ranks (catalogue section 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardproof.parallel.held import plain
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder, token_mean
from shardproof.zoo.fixtures.layouts import bare, sharded_alone, split_alone
from shardproof.zoo.fixtures.megatron import replicated, split
from shardproof.zoo.fixtures.mlp import MlpWithSpare, cross_entropy, mlp
from shardproof.zoo.fixtures.steps import average, plain_step
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
    cause="grad-not-reduced",
    layout="tp_ddp",
    stages="gradient",
    where="head.weight",
    source="jingyaogong/minimind #853, moojink/openvla-oft #160",
)
def ddp_module_bypass_tp(setting: Setting) -> Experiment:
    """The loss calls the tensor-parallel module inside DDP, so that every tp group trains alone."""

    def past_the_wrapper(model: nn.Module, batch: Any) -> Tensor:
        return token_mean(model.module if isinstance(model, DistributedDataParallel) else model, batch)

    return decoder(setting, parallelize=split, loss=past_the_wrapper)


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


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch #128949, #112152",
)
def ddp_unused_param(setting: Setting) -> Experiment:
    """A registered layer gets no gradient, so that its DDP bucket (here the only one) never completes."""
    # DDP complains at the second forward pass; until then nothing is said.
    return mlp(setting, model=lambda: MlpWithSpare(setting), parallelize=replicated, steps=1)


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc2.*",
    source="pytorch/pytorch #69031",
)
def ddp_early_only_param(setting: Setting) -> Experiment:
    """A layer that the last micro-batch does not mark as ready is left out of the reduction."""

    # Torch 2.13 reduces such a layer with DDP, so a reduction by hand leaves it out.
    def all_but_one(step: Step) -> None:
        for name, parameter in step.model.named_parameters():
            if parameter.grad is not None and not name.startswith("fc2."):
                average(parameter.grad, step.mesh["dp"].get_group())

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=all_but_one)

    return mlp(setting, parallelize=bare, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch #12603, #104336",
)
def ddp_param_replaced(setting: Setting) -> Experiment:
    """A weight is assigned anew after DDP hooked the old one, whose bucket (here the only one) never completes."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        laid_out = replicated(model, mesh, parallelism)
        model.fc2.weight = nn.Parameter(model.fc2.weight.detach().clone())
        return laid_out

    # DDP complains at the second forward pass; until then nothing is said.
    return mlp(setting, parallelize=parallelize, steps=1)


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc2.weight",
    source="pytorch/pytorch #12603, #104336",
)
def ddp_param_replaced_found_unused(setting: Setting) -> Experiment:
    """A weight is assigned anew after DDP hooked the old one, which find_unused_parameters then takes for unused."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        laid_out = DistributedDataParallel(model, process_group=mesh["dp"].get_group(), find_unused_parameters=True)
        model.fc2.weight = nn.Parameter(model.fc2.weight.detach().clone())
        return laid_out

    return mlp(setting, parallelize=parallelize)


@bug(
    cause="grad-not-reduced",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch PR #187732",
)
def ddp_static_graph_nosync(setting: Setting) -> Experiment:
    """The static graph's count of hooks is off from the second step on, and the reduction does not happen again."""

    def step(step: Step) -> Tensor:
        return plain_step(step, syncs=lambda m, count: m == count - 1 and step.index == 0)

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-not-reduced",
    layout="fsdp",
    stages="gradient",
    where="fc2.*",
    source="pytorch/pytorch #98281, BrotherHappy/OSTQuant #15",
)
def fsdp_ignored_params(setting: Setting) -> Experiment:
    """FSDP neither shards nor reduces the parameters that it is told to ignore, and nobody else reduces them."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        fully_shard(model, mesh=mesh["dp_shard"], ignored_params=set(model.fc2.parameters()))
        return model  # type: ignore[no-any-return]

    return mlp(setting, parallelize=parallelize)


@bug(
    cause="grad-not-summed",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch #154888, verl-project/verl #7493",
)
def hsdp_n_by_1(setting: Setting) -> Experiment:
    """FSDP1's HYBRID_SHARD with a shard group of one divides gradients by the replicas and sums them over nobody."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh["dp_replicate", "dp_shard"],
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )

    return mlp(setting, parallelize=parallelize)


@bug(
    cause="grad-partly-reduced",
    layout="hsdp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch PR #125484",
)
def hsdp_early_mb_not_replicated(setting: Setting) -> Experiment:
    """Only the last micro-batch is averaged over the replicas; what was accumulated before stays in its shard group."""

    def step(step: Step) -> Tensor:
        group = step.mesh["dp_replicate"].get_group()
        early: dict[nn.Parameter, Tensor] = {}

        def after_backward(step: Step, m: int) -> None:
            last = m == len(step.microbatches) - 1
            for parameter in step.model.parameters():
                if parameter.grad is None:
                    continue
                grad = plain(parameter.grad)
                if not last:
                    early[parameter] = grad.clone()
                    continue
                grad -= early[parameter]
                average(grad, group)
                grad += early[parameter]

        return plain_step(step, after_backward=after_backward)

    return mlp(setting, parallelize=sharded_alone, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-not-reduced",
    layout="hsdp",
    stages="gradient",
    where="fc3.*",
    source="NVIDIA/Megatron-LM PR #5006, #7452",
)
def hsdp_replicas_forgotten(setting: Setting) -> Experiment:
    """Gradients are averaged over the ranks of the own shard group, and the replicas were forgotten."""
    return mlp(setting, parallelize=sharded_alone)


@bug(
    cause="wrong-group",
    layout="hsdp",
    stages="gradient",
    where="head.weight",
    source="NVIDIA/Megatron-LM PR #5006, #7452",
)
def wrong_group_all_shards(setting: Setting) -> Experiment:
    """Shards of gradients are averaged over all data ranks instead of the replicas, which mixes different slices."""

    def over_all(step: Step) -> None:
        for parameter in step.model.parameters():
            if parameter.grad is not None:
                average(plain(parameter.grad), step.mesh["dp"].get_group())

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=over_all)

    return decoder(setting, parallelize=sharded_alone, train_step=step)


@bug(
    cause="wrong-group",
    layout="tp_ddp",
    stages="gradient",
    where="blocks.1.down.weight",
    source="NVIDIA/Megatron-LM PR #5006, #7452",
)
def wrong_group_world(setting: Setting) -> Experiment:
    """Gradients are averaged over all ranks instead of the data ranks, which mixes the slices of split weights."""

    def over_all(step: Step) -> None:
        for parameter in step.model.parameters():
            if parameter.grad is not None:
                average(parameter.grad, dist.group.WORLD)  # type: ignore[arg-type]

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=over_all)

    return decoder(setting, parallelize=split_alone, train_step=step)
