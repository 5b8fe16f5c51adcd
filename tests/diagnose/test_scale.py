"""One factor on all gradients or on some, and what it is taken for: a lost sum, a loss that is scaled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import (
    GATED,
    PICTURES,
    TEXT,
    Pictures,
    at,
    classes,
    edited,
    found,
    gradient,
    named,
    same,
    split,
)
from shardproof.zoo.fixtures.megatron import copy
from shardproof.zoo.fixtures.steps import plain_step

LAYERS = ("gate", "up")


def test_micro_batches_that_nobody_divides_by_are_one_factor_on_all_gradients() -> None:
    step = partial(plain_step, divide=lambda count: 1.0)
    first = found(replace(PICTURES, microbatches=3, train_step=step), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("grad-scale", "micro-batch"), ("gradient", 0, "head.bias"))
    assert first.factor == pytest.approx(3)
    assert "all 8 gradients are 3 times the reference's; the loss does not carry it" in first.evidence


def scaled_loss_step(step: sp.Step) -> Tensor:
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0]) * step.parallelism.dp
    value.backward()
    step.optimizer.step()
    return value.detach()


def test_a_loss_that_is_scaled_before_backward_is_told_from_gradients_that_are_scaled_after_it() -> None:
    before = found(replace(PICTURES, train_step=scaled_loss_step), "dp_replicate=3", steps=1)
    assert (named(before), before.stage) == (("grad-scale", "dp_replicate"), "loss")
    assert before.factor == pytest.approx(3)

    def three_times(step: sp.Step) -> None:
        for parameter in step.model.parameters():
            parameter.grad *= 3

    after = found(replace(PICTURES, train_step=edited(three_times)), "dp_replicate=3", steps=1)
    assert (named(after), after.stage) == (("grad-scale", "dp_replicate"), "gradient")


def test_a_factor_that_no_size_has_is_given_without_an_axis() -> None:
    def shrunk(step: sp.Step) -> None:
        for parameter in step.model.parameters():
            parameter.grad *= 0.7

    first = found(replace(TEXT, train_step=edited(shrunk)), "dp_replicate=2", steps=1)
    assert named(first) == ("grad-scale", None)
    assert first.factor == pytest.approx(0.7)


def test_a_factor_on_the_gradients_of_one_layer_is_a_subset() -> None:
    def recurrent_twice(step: sp.Step) -> None:
        for name in ("weight_ih_l0", "weight_hh_l0"):
            gradient(step, f"lstm.{name}").mul_(3)

    first = found(replace(TEXT, train_step=edited(recurrent_twice)), "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("grad-scale-subset", "dp_replicate"), "gradient")
    assert first.factor == pytest.approx(3)
    assert first.where in ("lstm.weight_ih_l0", "lstm.weight_hh_l0")
    assert "2 gradients" in first.evidence


def twice(x: Tensor, group: Any) -> Tensor:
    """The gradient is summed, and the sum is summed again."""
    return copy(copy(x, group), group)


@pytest.mark.parametrize(
    ("through", "cause", "factor"), [(twice, "grad-scale-subset", 2.0), (same, "grad-not-summed", None)]
)
def test_a_gradient_summed_twice_over_tp_is_told_from_one_that_is_not_summed(
    through: Any, cause: str, factor: float | None
) -> None:
    layout = partial(split, enter=dict.fromkeys("qkv", through))
    first = found(replace(GATED, parallelize=layout), "tp=2", steps=1)
    assert (named(first), at(first)) == ((cause, "tp"), ("gradient", 0, "norm1.weight"))
    assert first.factor == factor
    assert first.ranks == (0, 1)


class _Louder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: float) -> Tensor:
        ctx.times = times
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.times, None


def with_penalty(model: nn.Module, batch: Any) -> Tensor:
    """Logits are held near zero, as a router's are."""
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()


def louder_penalty(step: sp.Step) -> Tensor:
    """The penalty has three times its gradient; its value is right."""
    step.optimizer.zero_grad()
    inputs, targets = step.microbatches[0]
    logits = step.model(inputs)
    penalty = _Louder.apply(logits.square().mean(), 3.0)
    value = nn.functional.cross_entropy(logits, targets) + 0.1 * penalty
    value.backward()
    step.optimizer.step()
    return value.detach()


def test_an_addend_of_the_loss_that_counts_more_is_told_from_a_whole_loss_that_does() -> None:
    first = found(replace(PICTURES, loss=with_penalty, train_step=louder_penalty), "dp_replicate=3", steps=1)
    assert (named(first), at(first)) == (("grad-scale-subset", "dp_replicate"), ("gradient", 0, "head.bias"))
    assert first.factor == pytest.approx(3)
    assert "addend 2 of 2 counts 3 times" in first.evidence


class Routed(Pictures):
    """Gives an auxiliary loss beside its output, as routers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.mix(self.norm(self.conv(x)).tanh()).tanh()
        return self.head(hidden.flatten(1)), hidden.square().mean()


def with_auxiliary(model: nn.Module, batch: Any) -> Tensor:
    """The auxiliary loss counts once on one device, and once for every rank on several."""
    logits, auxiliary = model(batch[0])
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return F.cross_entropy(logits, batch[1]) + 0.1 * ranks * auxiliary


def test_an_auxiliary_loss_that_counts_once_for_every_data_rank_is_a_subset() -> None:
    first = found(replace(PICTURES, model=Routed, loss=with_auxiliary), "dp_replicate=3", steps=1)
    assert named(first) == ("grad-scale-subset", "dp_replicate")
    assert first.factor == pytest.approx(3)


def test_gradients_that_are_scaled_before_clipping_are_no_fault_of_the_norm() -> None:
    """C6 beside C10: clipping hides the factor in the update, not in the gradients before it."""

    def scaled_and_clipped(step: sp.Step) -> None:
        for parameter in step.model.parameters():
            parameter.grad *= 3
        nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm)

    experiment = replace(PICTURES, loss=classes, max_grad_norm=0.01, train_step=edited(scaled_and_clipped))
    first = found(experiment, "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("grad-scale", "dp_replicate"), "gradient")
    assert first.factor == pytest.approx(3)
