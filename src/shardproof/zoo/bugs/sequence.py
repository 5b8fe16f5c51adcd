"""Sequences cut over ranks: positions that restart, and attention whose parts are put together wrongly (section 7)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.attentions import decoder_with
from shardproof.zoo.fixtures.context import Mixed, Ring, SinkAttention, split_context
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import Entered, split_sequence
from shardproof.zoo.setting import Setting


def _context(setting: Setting, **changes: Any) -> Experiment:
    """A decoder with rotary positions and sinks, its sequences cut over `tp`."""
    return decoder(
        setting,
        model=lambda: decoder_with(setting, SinkAttention),
        parallelize=partial(split_context, **changes),
    )


@bug(
    cause="positions",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="Megatron-LM PR #5243, PR #6821, PR #4075",
)
def cp_rope_local_positions(setting: Setting) -> Experiment:
    """Rotary positions restart at 0 in every slice of a sequence."""
    return _context(setting, starts=lambda _rank, _length: 0)


@bug(
    cause="positions",
    layout="tp_ddp",
    stages="forward",
    where="pos",
    source="Megatron-LM PR #5243",
)
def cp_learned_local_positions(setting: Setting) -> Experiment:
    """Every slice of a sequence gets the learned positions of the first slice."""

    def first_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return x.chunk(dist.get_world_size(group), 1)[0]

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        positions = model.pos
        laid_out = split_sequence(model, mesh, parallelism)
        model.pos = Entered(positions, first_slice, mesh["tp"].get_group())
        return laid_out

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="attention-math",
    layout="tp",
    stages="gradient",
    where=("blocks.1.attn.qkv.*", "blocks.1.attn.sink"),
    source="Megatron-LM #1464",
)
def cp_attn_backward(setting: Setting) -> Experiment:
    """Ring attention's backward pass normalises each chunk of keys by its own log-sum-exp, and not by that of all."""

    class LocalBackward(Ring):
        def normaliser(self, log_sum: Tensor, scores: Tensor) -> Tensor:
            del log_sum
            return scores.logsumexp(-1, keepdim=True)

    return _context(setting, ring=LocalBackward)


@bug(
    cause="attention-math",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="ART mutation list (attn_skip_flash_lse_normalize)",
)
def cp_ring_lse(setting: Setting) -> Experiment:
    """Ring attention takes the plain mean of its chunks, and not that weighted by their log-sum-exps."""

    class Averaged(Ring):
        def merged(self, chunks: list[Mixed]) -> Mixed:
            return torch.stack([mixed for mixed, _ in chunks]).mean(0), super().merged(chunks)[1]

    return _context(setting, ring=Averaged)


@bug(
    cause="attention-math",
    layout="tp",
    stages="forward",
    where=("blocks.0.attn.proj", "blocks.0.attn"),
    source="TransformerEngine PR #3551",
)
def cp_sink_dropped(setting: Setting) -> Experiment:
    """Ring attention leaves out the sinks, which one device's attention has."""
    return _context(setting, sinks=False)
