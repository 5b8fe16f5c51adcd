"""Numbers kept or summed in too few bits, and overflows that not every rank hears of (catalogue section 11)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.parallel.layout import sharded
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import Parts, reduce, split
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.quantised import QuantisedRow, quantised_decoder
from shardproof.zoo.fixtures.state import (
    Fragile,
    Outlying,
    Waves,
    anywhere_infinite,
    balanced_step,
    infinite,
    routed,
    scaled_step,
    wave_decoder,
)
from shardproof.zoo.setting import Setting


@bug(
    cause="precision",
    layout="fsdp",
    stages="gradient",
    where="fc*.*",
    source="pytorch/pytorch #106395",
)
def bf16_reduce(setting: Setting) -> Experiment:
    """Gradients are reduced over the data ranks in bfloat16."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
        for unit in (model.fc1, model):
            fully_shard(unit, mesh=mesh["dp_shard"], mp_policy=policy)
        return model  # type: ignore[no-any-return]

    return mlp(setting, parallelize=lay_out)


@bug(
    cause="precision",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="pytorch/pytorch #190626, PR #194628",
)
def tp_bf16_reduce(setting: Setting) -> Experiment:
    """Partial outputs are summed over the tensor-parallel ranks in bfloat16."""

    def coarse(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return reduce(x.bfloat16(), group).to(x.dtype)

    def lay_out(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        return split(model, mesh, parallelism, parts=Parts(leave=coarse))

    return decoder(setting, parallelize=lay_out)


@bug(
    cause="precision",
    layout="ddp",
    stages="buffer",
    where=("router.counts", "router.bias"),
    source="NVIDIA/Megatron-LM PR #7081",
    trusted=routed,
)
def bf16_token_counts(setting: Setting) -> Experiment:
    """Tokens per expert are counted in bfloat16, which holds no small difference of large counts."""
    return routed(setting, train_step=partial(balanced_step, axes=("dp",), dtype=torch.bfloat16))


@bug(
    cause="precision",
    layout="fsdp",
    stages="initial-state",
    where="pos.inv_freq",
    source="Modalities/modalities PR #462",
)
def bf16_inv_freq(setting: Setting) -> Experiment:
    """Mixed precision casts the frequencies of the positions to bfloat16."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        waves: Waves = model.pos
        waves.inv_freq.copy_(waves.inv_freq.bfloat16())
        return sharded(model, list(model.blocks), mesh, replicas=1)

    return wave_decoder(setting, parallelize=lay_out)


@bug(
    cause="precision",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="NVIDIA/Megatron-LM PR #442, NVIDIA/TransformerEngine PR #74",
)
def fp8_amax_group(setting: Setting) -> Experiment:
    """Each tensor-parallel rank scales its part of an eight-bit activation to its own largest element."""

    class Alone(QuantisedRow):
        def scaled_over(self) -> dist.ProcessGroup | None:
            return None

    def lay_out(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        return split(model, mesh, parallelism, parts=Parts(row=Alone))

    return quantised_decoder(setting, parallelize=lay_out)


def _fragile(setting: Setting, **changes: Any) -> Experiment:
    """The perceptron whose gradient overflows in the second step, and a scaler that shares its decision."""
    fields = {"model": lambda: Fragile(setting), "data": Outlying(setting), "train_step": _joined}
    return mlp(setting, **{**fields, **changes})


def _joined(step: Step) -> Tensor:
    return scaled_step(step, anywhere_infinite)


def _alone(step: Step) -> Tensor:
    return scaled_step(step, lambda gradients: bool(infinite(gradients)))


@bug(
    cause="overflow-not-shared",
    layout="fsdp",
    stages="update",
    where="fc*.*",
    source="pytorch/pytorch PR #115710",
    trusted=_fragile,
)
def inf_copied_before_wait(setting: Setting) -> Experiment:
    """The overflow flag is copied to the host before its reduction is over, so that each rank reads its own."""

    def early(gradients: list[Tensor]) -> bool:
        flag = infinite(gradients)
        # On a GPU the copy wins the race more often than not; here it always does.
        copied = bool(flag)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        if work is not None:
            work.wait()
        return copied

    return _fragile(setting, train_step=partial(scaled_step, overflows=early))


@bug(
    cause="overflow-not-shared",
    layout="fsdp",
    stages="update",
    where="fc*.*",
    source="facebookresearch/fairscale PR #890",
    trusted=_fragile,
)
def inf_first_tensor_only(setting: Setting) -> Experiment:
    """Only the gradient that is complete first, the last layer's, is looked at for an overflow."""

    def first_only(gradients: list[Tensor]) -> bool:
        return anywhere_infinite(gradients[-1:])

    return _fragile(setting, train_step=partial(scaled_step, overflows=first_only))


@bug(
    cause="overflow-not-shared",
    layout="tp",
    stages="update",
    where="fc*.*",
    source="hpcaitech/ColossalAI PR #1175",
    trusted=_fragile,
)
def inf_seen_by_one_shard(setting: Setting) -> Experiment:
    """Each tensor-parallel rank skips its update if its own shards overflow, and not if another's do."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        if mesh["tp"].get_local_rank():
            model.feature = None
        return parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})

    return _fragile(setting, parallelize=lay_out, train_step=_alone)
