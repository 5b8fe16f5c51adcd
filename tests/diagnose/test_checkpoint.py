"""What a step began with, beside what the step before it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import TEXT, at, found, named, numbers
from shardproof.zoo.fixtures.steps import plain_step


def loaded(change: Callable[[nn.Module], None], *, after: bool = False) -> Callable[[sp.Step], Tensor]:
    """A right step; before the second one (or right after the first) the weights are loaded once more."""

    def step(given: sp.Step) -> Tensor:
        if given.index == 1 and not after:
            with torch.no_grad():
                change(given.model.module)
        value = plain_step(given)
        if given.index == 0 and after:
            with torch.no_grad():
                change(given.model.module)
        return value

    return step


def permuted(model: nn.Module) -> None:
    model.words.weight.copy_(model.words.weight.roll(2, 0).clone())


def other(model: nn.Module) -> None:
    model.words.weight.copy_(numbers(*model.words.weight.shape))


def test_words_permuted_between_two_steps_were_loaded_so() -> None:
    """C24 beside C14: the same permutation before the first step is the layout's, see test_layout."""
    first = found(replace(TEXT, train_step=loaded(permuted)), "dp_replicate=2")
    assert (named(first), at(first)) == (("checkpoint", None), ("checkpoint", 0, "words.weight"))
    assert "step 1 began with another words.weight than step 0 left" in first.evidence
    assert "along dim 0 are the reference's in another order: 0 holds 9, 1 holds 10, 2 holds 0" in first.evidence


def test_other_weights_between_two_steps_were_loaded_and_within_a_step_were_not() -> None:
    """C24 beside C23."""
    between = found(replace(TEXT, train_step=loaded(other)), "dp_replicate=2")
    assert (named(between), at(between)) == (("checkpoint", None), ("checkpoint", 0, "words.weight"))
    assert "another order" not in between.evidence
    within = found(replace(TEXT, train_step=loaded(other, after=True)), "dp_replicate=2")
    assert (named(within), at(within)) == (("optimizer", None), ("update", 0, "words.weight"))


class Running(nn.Module):
    """Keeps a running mean of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, 11)
        x = self.words(tokens)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return self.head(x)


def test_statistics_of_the_own_samples_are_a_matter_of_buffers() -> None:
    """C22: weights and gradients are right."""
    first = found(replace(TEXT, model=Running), "dp_replicate=2", steps=1)
    assert (first.cause, at(first)) == ("buffers", ("buffer", 0, "mean"))
