"""What no cause explains is called unexplained: a wrong cause is worse than none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardproof as sp
from diagnose.models import (
    GATED,
    PICTURES,
    SAMPLES,
    TEXT,
    WIDTH,
    Gated,
    at,
    bare,
    classes,
    drawn,
    edited,
    found,
    gradient,
    named,
    numbers,
)
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


def opposite_noise(step: sp.Step) -> None:
    """Its mean over the ranks is zero, so that the mean of the gradients is right."""
    grad = gradient(step, "conv.weight")
    grad += (1 - 2 * step.mesh.get_rank()) * numbers(*grad.shape, seed=3)


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
        opposite_noise,
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


class TwoOutputs(Gated):
    """A head of two features and a temperature: gradients of few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(WIDTH, 2), nn.Parameter(torch.tensor([1.3]))
        nn.init.normal_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, 2)
        return super().forward(x) * self.temperature


TWO = replace(GATED, model=TwoOutputs, data=TensorDataset(numbers(SAMPLES, 4, WIDTH), numbers(SAMPLES, 4, 2, seed=1)))


@pytest.mark.parametrize(
    ("experiment", "name"),
    [
        (replace(TWO, microbatches=2), "head.bias"),
        (replace(GATED, batch_size=15, microbatches=5), "head.bias"),
        (TWO, "temperature"),
    ],
    ids=["2 elements of 2 micro-batches", "5 elements of 5 micro-batches", "1 element"],
)
def test_noise_on_as_few_elements_as_a_fit_has_unknowns_is_unexplained(experiment: sp.Experiment, name: str) -> None:
    def noisy(step: sp.Step) -> None:
        gradient(step, name).add_(numbers(*gradient(step, name).shape, seed=7))

    first = found(replace(experiment, train_step=edited(noisy)), "tp=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, name))


def test_a_fit_that_holds_and_has_no_name_gives_its_coefficients() -> None:
    def doubled_on_one(step: sp.Step) -> None:
        for parameter in step.model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 3
            if step.mesh.get_rank() == 2:
                parameter.grad *= 2

    experiment = replace(PICTURES, parallelize=bare, train_step=edited(doubled_on_one))
    first = found(experiment, "dp_replicate=3", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, "head.bias"))
    assert first.ranks == (2,)
    assert "rank 0: 1, 1, 1; rank 1: 1, 1, 1; rank 2: 2, 2, 2" in first.evidence


class Normalised(nn.Module):
    """A convolution and a norm over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 2, 5, 5) -> (batch, 5)
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_batch_norm_over_the_own_part_is_unexplained_and_says_what_it_normalises_over() -> None:
    first = found(replace(PICTURES, model=Normalised, loss=classes), "dp_replicate=3", steps=1)
    assert (first.cause, at(first)) == ("unexplained", ("forward", 0, "norm"))
    assert "norm normalises over the samples of a batch, and each rank and micro-batch has a part" in first.evidence
    assert "SyncBatchNorm" in first.fix
