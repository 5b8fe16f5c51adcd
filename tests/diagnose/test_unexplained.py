"""What no cause explains is called unexplained: a wrong cause is worse than none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, at, edited, found, gradient, named, numbers
from shardproof.zoo.fixtures.megatron import replicated


def noise(step: sp.Step) -> None:
    """Alike on all ranks, as large as the gradient."""
    grad = gradient(step, "conv.weight")
    grad += numbers(*grad.shape, seed=7) * grad.std()


def little_noise(step: sp.Step) -> None:
    grad = gradient(step, "conv.weight")
    grad += numbers(*grad.shape, seed=7) * grad.std() * 1e-4


def noise_of_its_own(step: sp.Step) -> None:
    grad = gradient(step, "conv.weight")
    grad += numbers(*grad.shape, seed=step.mesh.get_rank()) * grad.std()


def noise_on_one_rank(step: sp.Step) -> None:
    if step.mesh.get_rank() == 1:
        noise(step)


def weight_decay(step: sp.Step) -> None:
    weight = step.model.module.conv.weight
    weight.grad += 0.1 * weight.detach()


def one_sign(step: sp.Step) -> None:
    gradient(step, "conv.weight")[1, 1, 1, 1] *= -1


def upside_down(step: sp.Step) -> None:
    grad = gradient(step, "conv.weight")
    grad.copy_(grad.transpose(2, 3).clone())


def normed(step: sp.Step) -> None:
    """A step for each sign, as some optimizers take, taken by the gradient."""
    gradient(step, "conv.weight").sign_()


@pytest.mark.parametrize(
    "edit",
    [
        noise,
        little_noise,
        noise_of_its_own,
        noise_on_one_rank,
        weight_decay,
        one_sign,
        upside_down,
        normed,
    ],
)
def test_one_gradient_that_follows_no_rule_is_unexplained(edit: Callable[[sp.Step], None]) -> None:
    first = found(replace(PICTURES, train_step=edited(edit)), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, "conv.weight"))
    assert first.factor is None
    assert "ruled out: " in first.evidence
    assert not any(hypothesis.holds for hypothesis in first.tried)


def test_a_gradient_that_is_anothers_is_unexplained() -> None:
    def exchanged(step: sp.Step) -> None:
        gradient(step, "gate.weight").copy_(gradient(step, "up.weight").clone())

    first = found(replace(GATED, train_step=edited(exchanged)), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, "gate.weight"))


def test_noise_on_all_gradients_is_unexplained() -> None:
    def everywhere(step: sp.Step) -> None:
        for number, parameter in enumerate(step.model.parameters()):
            parameter.grad += numbers(*parameter.shape, seed=number) * 0.01

    first = found(replace(TEXT, train_step=edited(everywhere)), "dp_replicate=2", steps=1)
    assert (named(first), first.stage) == (("unexplained", None), "gradient")


def test_a_gradient_lost_on_one_of_two_paths_is_unexplained() -> None:
    """The gate's input is detached under this layout alone: no reduction says why."""

    def layout(model: torch.nn.Module, mesh: object, parallelism: sp.Parallelism) -> torch.nn.Module:
        model.gate.register_forward_pre_hook(lambda _m, args: (args[0].detach(),))
        return replicated(model, mesh, parallelism)

    first = found(replace(GATED, parallelize=layout), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, "norm2.weight"))
