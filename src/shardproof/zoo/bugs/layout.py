"""Right values in wrong places (catalogue sections 7 and 13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.attentions import decoder_with
from shardproof.zoo.fixtures.context import RotaryAttention
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.gated import gated, split_gated
from shardproof.zoo.fixtures.megatron import Parts, split
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.setting import Setting


@bug(
    cause="layout-permuted",
    layout="tp",
    stages=("initial-state", "forward"),
    where=("blocks.0.attn.qkv*", "blocks.0.attn", "blocks.0.attn.proj"),
    source="sglang PR #34529; nnsight PR #719; ART PR #619",
)
def fused_qkv_plain_shard(setting: Setting) -> Experiment:
    """A fused query-key-value matrix is cut by rows, and not each of its three blocks."""
    return decoder(setting, parallelize=partial(split, parts=Parts(blocks=1)))


@bug(
    cause="layout-permuted",
    layout="tp_fsdp",
    stages=("initial-state", "forward"),
    where=("blocks.0.attn.qkv*", "blocks.0.attn", "blocks.0.attn.proj"),
    source="sglang PR #34529; nnsight PR #719; ART PR #619",
)
def fused_qkv_plain_shard_in_plan(setting: Setting) -> Experiment:
    """A torch plan makes a fused query-key-value matrix column-parallel, which cuts it by rows."""
    plan = {"blocks.*.attn.qkv": "colwise", "blocks.*.attn.proj": "rowwise"}
    return decoder(setting, tp_plan={**plan, "blocks.*.up": "colwise", "blocks.*.down": "rowwise"})


@bug(
    cause="layout-permuted",
    layout="tp_ddp",
    stages=("initial-state", "forward"),
    where=("gate_up*", "down", "(root)"),
    source="sglang PR #34529; nnsight PR #719; Megatron-LM PR #5714",
)
def fused_gate_up_plain_shard(setting: Setting) -> Experiment:
    """A fused gate-up matrix is cut by rows, so that the first ranks hold nothing but gates."""
    return gated(setting, parallelize=partial(split_gated, blocks=1))


@bug(
    cause="layout-permuted",
    layout="tp",
    stages=("initial-state", "forward"),
    where=("blocks.0.attn.qkv*", "blocks.0.attn", "blocks.0.attn.proj"),
    source="transformers PR #48519",
)
def rope_permute_on_shard(setting: Setting) -> Experiment:
    """Query and key rows are reordered for rotary positions with the wrong head size: whole rows over heads / tp."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        for block in model.blocks:
            for parameter in block.attn.qkv.parameters():
                q, k, v = parameter.detach().chunk(3)
                q, k = (_halves(_pairs(part, setting.heads), setting.heads // parallelism.tp) for part in (q, k))
                parameter.data = torch.cat([q, k, v])
        return split(model, mesh, parallelism)

    return decoder(setting, model=lambda: decoder_with(setting, RotaryAttention), parallelize=parallelize)


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of halves, as the model's rotary positions want them, to pairs, as the checkpoint holds them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of pairs to halves."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


@bug(
    cause="layout-permuted",
    layout="tp_fsdp",
    stages="initial-state",
    where="fc1.*",
    source="pytorch #129206, PR #130760",
)
def fsdp_tp_shard_order(setting: Setting) -> Experiment:
    """Shards are loaded as if data ranks cut a matrix before tp does, where tp comes first."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        whole = {name: value.clone() for name, value in model.state_dict().items()}
        parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp_shard"])
        number = mesh["dp_shard"].get_local_rank() * parallelism.tp + mesh["tp"].get_local_rank()
        with torch.no_grad():
            for name in ("fc1.weight", "fc1.bias"):
                shard: DTensor = model.get_parameter(name)
                shard.to_local().copy_(whole[name].chunk(parallelism.dp * parallelism.tp)[number])
        return model  # type: ignore[no-any-return]

    return mlp(setting, parallelize=parallelize)
