"""transformers' Llama, small, with weights at random, and the plan that its configuration brings in torch's words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from shardproof.spec.experiment import Experiment

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "use_cache": False,
}
"""Four tensor-parallel ranks divide vocabulary, heads and MLP."""

TP_PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
"""What `LlamaConfig.base_model_tp_plan` and `LlamaForCausalLM._tp_plan` say in transformers 5.23."""

FSDP_UNITS = ("model.embed_tokens", "model.layers.*")
"""transformers also makes a unit of the last norm and the head; here the root holds these two, which gathers alike."""


def build() -> nn.Module:
    """The model in float32, ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy over tokens (batch, length) and the tokens that follow them."""
    tokens, targets = batch
    return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without groups."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def experiment(data: Any) -> Experiment:
    """Trains on samples (tokens, next tokens)."""
    return Experiment(
        model=build,
        data=data,
        loss=loss,
        optimizer=optimizer,
        batch_size=16,
        tp_plan=TP_PLAN,
        fsdp_units=FSDP_UNITS,
    )
