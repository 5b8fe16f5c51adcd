"""Positions and arithmetic of attention, told from faults of the layers around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import GATED, WIDTH, at, drawn, found, named, passes, split
from shardproof.zoo.fixtures.megatron import cut, join, replicated, summed_over


def narrowed(model: Any, mesh: Any, parallelism: sp.Parallelism, *, scale: float) -> nn.Module:
    """The attention of this layout divides its scores by another number."""
    attn = model.attn

    def forward(x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (attn.q, attn.k, attn.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return attn.proj(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))

    attn.forward = forward
    return split(model, mesh, parallelism)


def test_scores_of_another_scale_are_attention_math_and_the_right_scale_is_right() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return narrowed(model, mesh, parallelism, scale=1.0)

    first = found(replace(GATED, parallelize=layout), "tp=2", steps=1)
    assert (named(first), first.stage) == (("attention-math", "tp"), "forward")
    assert first.where in ("attn", "attn.proj")

    def right(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return narrowed(model, mesh, parallelism, scale=3**-0.5)

    passes(replace(GATED, parallelize=right), "tp=2")


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.linspace(0.5, 1.5, grad.shape[-1], dtype=grad.dtype)


def test_a_wrong_backward_pass_inside_attention_is_told_from_one_of_the_mlp() -> None:
    def attention(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.attn.register_forward_pre_hook(lambda _m, args: (_Halved.apply(args[0]),))
        return split(model, mesh, parallelism)

    first = found(replace(GATED, parallelize=attention), "tp=2", steps=1)
    assert (named(first), at(first)) == (("attention-math", "tp"), ("gradient", 0, "norm1.weight"))

    def mlp(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.up.register_forward_pre_hook(lambda _m, args: (_Halved.apply(args[0]),))
        return replicated(model, mesh, parallelism)

    other = found(replace(GATED, parallelize=mlp), "dp_replicate=2", steps=1)
    assert (named(other), other.stage) == (("unexplained", None), "gradient")


class Waves(nn.Module):
    """Positions as sines; what follows looks at each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.start = 0
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, 5)
        places = torch.arange(x.shape[1], dtype=x.dtype) + self.start
        x = x + torch.sin(places[:, None] / torch.arange(1, WIDTH + 1))
        return self.head(self.up(self.norm(x)).tanh())


def sliced(model: Any, mesh: Any, parallelism: sp.Parallelism, *, offset: bool) -> nn.Module:
    """Each rank of a tensor-parallel group computes its own tokens."""
    group = mesh["tp"].get_group()
    model.start = 2 * mesh["tp"].get_local_rank() if offset else 0
    for parameter in model.parameters():
        summed_over(parameter, group)
    model.register_forward_pre_hook(lambda _m, args: (cut(args[0], group),))
    model.register_forward_hook(lambda _m, _a, out: join(out, group))
    return model


def test_positions_that_start_anew_on_each_rank() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return sliced(model, mesh, parallelism, offset=False)

    first = found(replace(GATED, model=Waves, parallelize=layout), "tp=2", steps=1)
    assert named(first) == ("positions", "tp")

    def right(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return sliced(model, mesh, parallelism, offset=True)

    passes(replace(GATED, model=Waves, parallelize=right), "tp=2")
