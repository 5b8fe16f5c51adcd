"""Partial gradients that nobody sums over tp (catalogue section 6)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.adapters import adapted_decoder, split_adapted
from shardproof.zoo.fixtures.attentions import Grouped, HeadNorm, MultiQuery, decoder_with, same, split_queries
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.experts import mixture, split_experts
from shardproof.zoo.fixtures.megatron import (
    Parts,
    Row,
    copy,
    gather,
    gathered,
    own_slice,
    reduce_scatter,
    split,
    split_sequence,
    summed_over,
)
from shardproof.zoo.fixtures.mlp import cross_entropy
from shardproof.zoo.fixtures.plans import sequence_plan
from shardproof.zoo.fixtures.vocabulary import log_total, own_words, split_words, word_loss
from shardproof.zoo.setting import Setting


@bug(
    cause="grad-not-summed",
    layout="tp_ddp",
    stages="gradient",
    where=("norm.*", "blocks.*norm*"),
    source="EleutherAI/gpt-neox PR #1257; Megatron-LM #1446, #474; TransformerEngine #435",
)
def sp_norm_unsynced(setting: Setting) -> Experiment:
    """Norms see a slice of the sequence, and their gradients are not summed over tp."""

    def all_but_norms(parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
        if not getattr(parameter, "of_norm", False):
            summed_over(parameter, group)

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.of_norm = "norm" in name  # type: ignore[attr-defined]
        return split_sequence(model, mesh, parallelism, sums=all_but_norms)

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="grad-not-summed",
    layout="tp_fsdp",
    stages="gradient",
    where="blocks.1.norm2.*",
    source="EleutherAI/gpt-neox PR #1257; Megatron-LM #1446",
)
def sp_norm_missing_in_plan(setting: Setting) -> Experiment:
    """A torch plan splits the sequence and forgets the norms of the MLPs, which then hold plain parameters."""
    plan = {name: style for name, style in sequence_plan().items() if name != "blocks.*.norm2"}
    return decoder(setting, model=lambda: decoder_with(setting, partial(Grouped, heads=setting.heads)), tp_plan=plan)


@bug(
    cause="grad-not-summed",
    layout="tp_ddp",
    stages="gradient",
    where="gate.weight",
    source="pytorch/torchtitan #2387, PR #2416, #1805, PR #1878, PR #4054",
)
def moe_router_unsynced(setting: Setting) -> Experiment:
    """The router's shares enter the experts as a DTensor whose gradient is taken for replicated, and is partial."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        def weigh(shares: Tensor, _group: dist.ProcessGroup) -> Tensor:
            return DTensor.from_local(shares, mesh["tp"], (Replicate(),), run_check=False).to_local()

        return split_experts(model, mesh, parallelism, weigh=weigh)

    return mixture(setting, loss=cross_entropy, parallelize=parallelize)


@bug(
    cause="grad-not-summed",
    layout="tp",
    stages="gradient",
    where="blocks.1.norm2.*",
    source="pytorch/torchtitan #2387, PR #2416 (the same at another boundary)",
)
def missing_f_operator(setting: Setting) -> Experiment:
    """The input gradient of column-parallel layers is not summed over tp."""
    return decoder(setting, parallelize=partial(split, parts=Parts(enter=same)))


@bug(
    cause="grad-not-summed",
    layout="tp_ddp",
    stages="gradient",
    where="blocks.1.attn.kv.bias",
    source="bigcode-project/Megatron-LM #11, PR #12",
)
def mqa_kv_bias_distopt(setting: Setting) -> Experiment:
    """The bias of the one key and value head, which all ranks share, is left out of the sum over tp."""

    def only_weight(layer: nn.Module, group: dist.ProcessGroup) -> None:
        summed_over(layer.get_parameter("weight"), group)

    return decoder(
        setting,
        model=lambda: decoder_with(setting, MultiQuery),
        parallelize=partial(split_queries, enter=copy, leave=same, keep=only_weight),
    )


@bug(
    cause="grad-not-summed",
    layout="tp",
    stages="gradient",
    where="blocks.1.attn.kv.weight",
    source="Megatron-LM PR #6839",
)
def mla_shared_k_rope(setting: Setting) -> Experiment:
    """Of a fused projection that all heads share, the rows of the key get the gradient of the own heads alone."""

    def only_value(kv: Tensor, group: dist.ProcessGroup) -> Tensor:
        k, v = kv.chunk(2, -1)
        return torch.cat([k, copy(v, group)], -1)

    return decoder(
        setting,
        model=lambda: decoder_with(setting, MultiQuery),
        parallelize=partial(split_queries, leave=only_value),
    )


@bug(
    cause="grad-not-summed",
    layout="tp",
    stages="gradient",
    where="blocks.1.attn.out_norm.weight",
    source="Megatron-LM #7452 finding 11",
)
def gdn_out_norm(setting: Setting) -> Experiment:
    """A norm that all heads share sees the own heads only; without sequence parallelism nobody sums its gradient."""
    return decoder(setting, model=lambda: decoder_with(setting, HeadNorm), parallelize=split)


@bug(
    cause="grad-not-summed",
    layout="tp_ddp",
    stages="gradient",
    where="blocks.1.up.lora_a.weight",
    source="modelscope/mcore-bridge PR #173; ISEEKYAN/Megatron-LM PR #131",
)
def lora_replicated_factor(setting: Setting) -> Experiment:
    """An adapter's whole first factor gets the gradient through the own part of the second factor alone."""
    return decoder(setting, model=lambda: adapted_decoder(setting), parallelize=partial(split_adapted, between=same))


@bug(
    cause="grad-not-summed",
    layout="tp",
    stages="gradient",
    where="blocks.1.up.*",
    source="huggingface/nanotron PR #172",
)
def nanotron_row_async(setting: Setting) -> Experiment:
    """A row-parallel layer gathers input gradients, made with other ranks' weights, in place of output gradients."""
    return decoder(
        setting,
        parallelize=partial(split_sequence, parts=Parts(row=_AsyncRow, enter=gather, leave=reduce_scatter)),
    )


class _AsyncRow(Row):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Async.apply(x, self.weight, self.group)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Async(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        out = F.linear(x, weight)
        dist.all_reduce(out, group=group)
        return own_slice(out, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole = gathered(grad, ctx.group)
        # Each slice of the tokens comes back multiplied by the weights of the rank that holds it.
        return gathered(grad @ weight, ctx.group), whole.flatten(0, 1).T @ x.flatten(0, 1), None


@bug(
    cause="grad-not-summed",
    layout="tp",
    stages="gradient",
    where="head.weight",
    source="modelscope/ms-swift PR #9947",
)
def vp_logprob_nograd_allreduce(setting: Setting) -> Experiment:
    """Log-probabilities come from the rank that owns the word, by a sum that no gradient passes on the other ranks."""

    def owned(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        index, own = own_words(targets, logits.shape[-1], group)
        logged = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - log_total(logits, group)
        logged = logged * own
        total = logged.detach().clone()
        dist.all_reduce(total, group=group)
        return -(logged + (total - logged).detach()).mean()

    return decoder(setting, parallelize=split_words, loss=word_loss(owned))
