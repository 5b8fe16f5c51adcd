"""Outputs, losses and shards that are wrong before any gradient is (catalogue sections 6 and 7)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.adapters import AdaptedRow, adapted_decoder, split_adapted
from shardproof.zoo.fixtures.attentions import same
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import Parts, Row, reduce, replicated, split, split_sequence, summed_over
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.vocabulary import entropy, log_total, smooth, split_words, word_loss
from shardproof.zoo.setting import Setting


@bug(
    cause="bias-counted-k-times",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="Wenyueh/MinivLLM #80; EleutherAI/gpt-neox #962; PaddlePaddle PR #35186",
)
def row_bias_tp_times(setting: Setting) -> Experiment:
    """Every rank adds the whole bias of a row-parallel layer before the sum."""

    class BiasBefore(Row):
        def forward(self, x: Tensor) -> Tensor:
            return self.leave(F.linear(x, self.weight, self.bias), self.group)

    return decoder(setting, parallelize=partial(split, parts=Parts(row=BiasBefore)))


@bug(
    cause="bias-counted-k-times",
    layout="tp_ddp",
    stages="forward",
    where=("blocks.0.down", "blocks.0"),
    source="NVIDIA-NeMo/Megatron-Bridge #5634, PR #5635",
)
def expert_lora_suppressed_comm(setting: Setting) -> Experiment:
    """A layer's output became a partial sum, and its adapter's whole delta is added to every part of it."""

    class DeltaBefore(AdaptedRow):
        def forward(self, x: Tensor) -> Tensor:
            base: Any = self.base
            return reduce(F.linear(x, base.weight) + self.delta(x), base.group) + base.bias  # type: ignore[no-any-return]

    return decoder(setting, model=lambda: adapted_decoder(setting), parallelize=partial(split_adapted, row=DeltaBefore))


@bug(
    cause="forward-not-reduced",
    layout="tp_ddp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="ART mutation list; generic",
)
def skip_forward_reduce(setting: Setting) -> Experiment:
    """The partial outputs of row-parallel layers are not summed."""
    return decoder(setting, parallelize=partial(split, parts=Parts(leave=same)))


@bug(
    cause="forward-not-reduced",
    layout="tp_fsdp",
    stages="forward",
    where="fc2",
    source="ART mutation list; generic",
)
def skip_forward_reduce_in_plan(setting: Setting) -> Experiment:
    """A torch plan declares the output of a row-parallel layer partial, where the next layer needs it whole."""
    return mlp(setting, tp_plan={"fc1": "colwise", "fc2": RowwiseParallel(output_layouts=Partial())})


@bug(
    cause="sharded-loss",
    layout="tp",
    stages="loss",
    where="(root)",
    source="Megatron-LM #7452 finding 2",
)
def ce_on_gathered_logits(setting: Setting) -> Experiment:
    """The cross entropy for split words is given logits that were gathered: it counts every word tp times."""

    def of_gathered(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return (log_total(logits, group) - target).mean()

    return decoder(setting, parallelize=partial(split_words, gathers=True), loss=word_loss(of_gathered))


@bug(
    cause="sharded-loss",
    layout="tp",
    stages="loss",
    where="(root)",
    source="Megatron-LM #737, #7464",
)
def label_smoothing_local_mean(setting: Setting) -> Experiment:
    """Label smoothing averages the log-probabilities of the own words only."""

    def smoothed(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        spread = log_total(logits, group) - logits.mean(-1)
        return 0.9 * entropy(logits, targets, group) + 0.1 * spread.mean()

    return decoder(setting, parallelize=split_words, loss=word_loss(smoothed, smooth))


@bug(
    cause="initial-state",
    layout="tp_ddp",
    stages="initial-state",
    where="blocks.0.attn.qkv.weight",
    source="pytorch #102280",
)
def fsdp_overwrites_tp_shards(setting: Setting) -> Experiment:
    """Data parallelism is wrapped around all ranks, and its first broadcast puts rank 0's tp shards everywhere."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model = split(model, mesh, Parallelism(tp=parallelism.tp))
        return DistributedDataParallel(model)

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="wrong-group",
    layout="tp_ddp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="Megatron-LM PR #5006, #7452",
)
def wrong_group_collective(setting: Setting) -> Experiment:
    """Partial outputs are summed over the data ranks, where they have to be summed over tp."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        data = mesh["dp"].get_group()

        def leave(x: Tensor, _group: dist.ProcessGroup) -> Tensor:
            return reduce(x, data)

        return split(model, mesh, parallelism, parts=Parts(leave=leave))

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="wrong-group",
    layout="tp_ddp",
    stages="gradient",
    where=("norm.*", "blocks.*norm*"),
    source="Megatron-LM PR #5006, #7452",
)
def wrong_group_sp_norm(setting: Setting) -> Experiment:
    """What sees a slice of the sequence has its gradient summed over the data ranks, where it has to be over tp."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        def over_data(parameter: nn.Parameter, _group: dist.ProcessGroup) -> None:
            summed_over(parameter, mesh["dp"].get_group())

        return split_sequence(model, mesh, parallelism, sums=over_data)

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="wrong-group",
    layout="tp_ddp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="Megatron-LM PR #5215, #7452",
)
def cp_stale_group(setting: Setting) -> Experiment:
    """From the second micro-batch on, partial outputs are summed over a group that was left behind: the data ranks'."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        groups = [mesh["tp"].get_group(), mesh["dp"].get_group()]
        batches: list[int] = []
        model.register_forward_pre_hook(lambda _module, _inputs: batches.append(1))

        def leave(x: Tensor, _group: dist.ProcessGroup) -> Tensor:
            return reduce(x, groups[min(len(batches), 2) - 1])

        return split(model, mesh, parallelism, parts=Parts(leave=leave))

    return decoder(setting, parallelize=parallelize, microbatches=setting.microbatches)


@bug(
    cause="wrong-group",
    layout="tp_ddp",
    stages="gradient",
    where=("blocks.1.down.weight", "blocks.1.attn.*", "blocks.1"),
    source="Megatron-LM #7452 finding 4",
)
def recompute_wrong_group(setting: Setting) -> Experiment:
    """Activation checkpointing recomputes blocks with sums over the data ranks, where they were over tp at first."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        data = mesh["dp"].get_group()

        def leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
            # Inside a backward pass there is a graph task: this is the second forward pass.
            return reduce(x, group if torch._C._current_graph_task_id() == -1 else data)

        model = split(model, mesh, Parallelism(tp=parallelism.tp), parts=Parts(leave=leave))
        for block in model.blocks:
            forward = block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)
        return replicated(model, mesh, parallelism)

    return decoder(setting, parallelize=parallelize)
