"""Right code that splits a model over `tp`, and looks like a bug in one way or another: none may get a finding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import control
from shardproof.zoo.fixtures.adapters import adapted_decoder, split_adapted
from shardproof.zoo.fixtures.attentions import Grouped, HeadNorm, MultiQuery, decoder_with, split_groups, split_queries
from shardproof.zoo.fixtures.context import SinkAttention, split_context
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.experts import Attached, mixture
from shardproof.zoo.fixtures.gated import gated, split_gated
from shardproof.zoo.fixtures.megatron import replicated, split, summed_over
from shardproof.zoo.fixtures.mlp import Mlp, cross_entropy, mlp
from shardproof.zoo.fixtures.plans import sequence_plan
from shardproof.zoo.fixtures.vocabulary import split_words, word_loss
from shardproof.zoo.setting import Setting


@control(layout="tp_ddp")
def tensor_parallel_by_hand(setting: Setting) -> Experiment:
    """Fused query, key and value are cut per block; the gradient of the key's bias is nothing but round-off."""
    return decoder(setting, parallelize=split)


@control(layout="tp_ddp")
def fused_gate_up_cut_per_block(setting: Setting) -> Experiment:
    """A rank's piece of a fused gate-up matrix is no contiguous slice of the whole."""
    return gated(setting, parallelize=split_gated)


@control(layout="tp_fsdp")
def sequence_parallel_plan(setting: Setting) -> Experiment:
    """Torch's own styles with sequence slices: norm gradients are partial sums until somebody asks for them."""
    return decoder(
        setting, model=lambda: decoder_with(setting, partial(Grouped, heads=setting.heads)), tp_plan=sequence_plan()
    )


@control(layout="tp_ddp")
def vocabulary_gathered(setting: Setting) -> Experiment:
    """Embedding and head hold some of the words each, and logits are gathered for the loss."""
    return decoder(setting, parallelize=partial(split_words, gathers=True))


@control(layout="tp")
def vocabulary_split_loss(setting: Setting) -> Experiment:
    """The loss is computed from logits of the own words: what the model returns is a slice on every rank."""
    return decoder(setting, parallelize=split_words, loss=word_loss())


@control(layout="tp_fsdp")
def tied_in_plan(setting: Setting) -> Experiment:
    """One weight is embedding and head, both split by words."""
    return decoder(
        setting,
        tied=True,
        tp_plan={"tok": "rowwise", "head": "colwise_gather", "blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
    )


@control(layout="fsdp")
def tied_in_root_unit(setting: Setting) -> Experiment:
    """One weight is embedding and head, both in the root's FSDP unit."""
    return decoder(setting, tied=True)


@control(layout="tp")
def fewer_key_heads_than_ranks(setting: Setting) -> Experiment:
    """Two ranks hold the same key and value head: their copies are no shards, and their gradients are summed."""
    heads = setting.tp // 2
    return decoder(
        setting, model=lambda: decoder_with(setting, partial(Grouped, heads=heads)), parallelize=split_groups
    )


@control(layout="tp_ddp")
def one_key_head(setting: Setting) -> Experiment:
    """All ranks hold the one key and value head, and sum the gradient of what it gives."""
    return decoder(setting, model=lambda: decoder_with(setting, MultiQuery), parallelize=split_queries)


@control(layout="tp_ddp")
def head_norm_summed(setting: Setting) -> Experiment:
    """A norm that all heads share sees the own heads only, and its gradient is summed over tp."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        for block in model.blocks:
            summed_over(block.attn.out_norm.weight, mesh["tp"].get_group())
        return split(model, mesh, parallelism)

    return decoder(setting, model=lambda: decoder_with(setting, HeadNorm), parallelize=parallelize)


@control(layout="tp_ddp")
def adapters_on_frozen_layers(setting: Setting) -> Experiment:
    """Frozen layers have no gradient, here or on one device; adapters have theirs whole."""
    return decoder(setting, model=lambda: adapted_decoder(setting), parallelize=split_adapted)


@control(layout="tp_ddp")
def ring_attention(setting: Setting) -> Experiment:
    """Sequences are cut over tp, with rotary positions that go on from slice to slice and keys that come in chunks."""
    return decoder(setting, model=lambda: decoder_with(setting, SinkAttention), parallelize=split_context)


@control(layout="tp_ddp")
def router_summed(setting: Setting) -> Experiment:
    """Experts are split over tp, and what their router learns from each rank's is summed; its own loss counts once."""
    return mixture(setting)


@control(layout="ddp")
def auxiliary_hung_on(setting: Setting) -> Experiment:
    """An auxiliary loss runs in the backward pass of the main one, which it has no part in, at full weight."""
    return mixture(setting, model=lambda: Attached(setting), loss=cross_entropy)


@control(layout="tp_fsdp")
def relu_network(setting: Setting) -> Experiment:
    """Kinks in the loss, and a bias beside a row-parallel layer of torch's own."""

    class Relu(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))  # type: ignore[no-any-return]

    return mlp(setting, model=lambda: Relu(setting))


@control(layout="tp_ddp")
def blocks_recomputed(setting: Setting) -> Experiment:
    """Activation checkpointing runs every block, and its collectives, a second time inside the backward pass."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        split(model, mesh, Parallelism(tp=parallelism.tp))
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return replicated(model, mesh, parallelism)

    return decoder(setting, parallelize=parallelize)
