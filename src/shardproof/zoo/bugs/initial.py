"""Weights and buffers that are wrong before the first step (catalogue section 9)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardproof.parallel.layout import sharded
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import Column, Parts, split, split_mlp
from shardproof.zoo.fixtures.mlp import Mlp, mlp, sizes
from shardproof.zoo.fixtures.state import Tracked, Waves, tracked, wave_decoder
from shardproof.zoo.setting import Setting


@bug(
    cause="initial-state",
    layout="hsdp",
    stages="initial-state",
    where="fc*.*",
    source="allenai/OLMo-core PR #319",
)
def hsdp_rank_seeded_init(setting: Setting) -> Experiment:
    """Each rank draws its weights under its global rank's seed, and fully_shard broadcasts nothing."""

    def model() -> nn.Module:
        torch.manual_seed(setting.seed + dist.get_rank())
        return Mlp(setting)

    return mlp(setting, model=model)


@bug(
    cause="initial-state",
    layout="tp",
    stages="initial-state",
    where=("blocks.*.attn.qkv.*", "blocks.*.up.*"),
    source="modelscope/ms-swift PR #7944, allenai/OLMo-core PR #307",
)
def tp_same_seed_shards(setting: Setting) -> Experiment:
    """Tensor-parallel ranks draw their shards under one seed, so that all shards are copies."""

    class Drawn(Column):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            torch.manual_seed(setting.seed)
            nn.init.normal_(self.weight, std=0.3)

    def lay_out(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        return split(model, mesh, parallelism, parts=Parts(column=Drawn))

    return decoder(setting, parallelize=lay_out)


class _Adapted(Mlp):
    """The perceptron with a low-rank adapter beside its last layer; no part of it starts at zero."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        _, hidden, classes = sizes(setting)
        self.lora_a = nn.Linear(hidden, 2, bias=False)
        self.lora_b = nn.Linear(2, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, inputs) -> (batch, classes)
        hidden = torch.tanh(self.fc2(torch.tanh(self.fc1(x))))
        return self.fc3(hidden) + self.lora_b(self.lora_a(hidden))  # type: ignore[no-any-return]


@bug(
    cause="initial-state",
    layout="tp",
    stages="initial-state",
    where=("lora_a.weight", "lora_b.weight"),
    source="NVIDIA-NeMo/Megatron-Bridge PR #5396",
)
def shared_adapter_init_differs(setting: Setting) -> Experiment:
    """An adapter that all tensor-parallel ranks hold whole is drawn from each rank's own stream."""

    def lay_out(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        torch.manual_seed(setting.seed + 1 + mesh["tp"].get_local_rank())
        model.lora_a.reset_parameters()
        model.lora_b.reset_parameters()
        return split_mlp(model, mesh, parallelism)

    return mlp(setting, model=lambda: _Adapted(setting), parallelize=lay_out)


@bug(
    cause="initial-state",
    layout="hsdp",
    stages="initial-state",
    where="stats.mean",
    source="pytorch/pytorch PR #178569",
)
def hsdp_buffers_not_broadcast(setting: Setting) -> Experiment:
    """Buffers are broadcast inside the first shard group only, and others keep what their memory held."""

    def lay_out(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        if isinstance(model, Tracked) and mesh["dp_replicate"].get_local_rank():
            model.stats.mean.copy_(_garbage(model.stats.mean))
        return sharded(model, [], mesh, replicas=parallelism.dp_replicate)

    return tracked(setting, parallelize=lay_out)


@bug(
    cause="initial-state",
    layout="fsdp",
    stages="initial-state",
    where="pos.inv_freq",
    source="hiyouga/LlamaFactory PR #10820, EvolvingLMMs-Lab/lmms-engine PR #185, huggingface/transformers #45902",
)
def nonpersistent_buffer_garbage(setting: Setting) -> Experiment:
    """Ranks that load a state dict into empty memory leave buffers that it does not hold as they find them."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        waves: Waves = model.pos
        if mesh["dp_shard"].get_local_rank():
            waves.inv_freq.copy_(_garbage(waves.inv_freq))
        return sharded(model, list(model.blocks), mesh, replicas=1)

    return wave_decoder(setting, parallelize=lay_out)


@bug(
    cause="initial-state",
    layout="fsdp",
    stages="initial-state",
    where="pos.inv_freq",
    source="NovaSky-AI/SkyRL #1709, PR #1725",
)
def buffer_bytes_reinterpreted(setting: Setting) -> Experiment:
    """Rank 0 broadcasts the bytes of a float32 buffer, which the others receive into a bfloat16 one."""

    def lay_out(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        waves: Waves = model.pos
        if mesh["dp_shard"].get_local_rank():
            received = waves.inv_freq.float().view(torch.bfloat16)[: waves.inv_freq.numel()]
            waves.inv_freq.copy_(received)
        return sharded(model, list(model.blocks), mesh, replicas=1)

    return wave_decoder(setting, parallelize=lay_out)


def _garbage(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
