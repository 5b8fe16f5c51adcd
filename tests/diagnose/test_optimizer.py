"""Right gradients and wrong weights, beside gradients that were changed on their way to the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import PICTURES, TEXT, TIED, at, edited, found, named
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.steps import plain_step


def decayed(model: nn.Module, *, skip: Callable[[str], bool]) -> torch.optim.Optimizer:
    names = {name: skip(name) for name, _ in model.named_parameters()}
    groups = [
        {"params": [model.get_parameter(n) for n, free in names.items() if not free], "weight_decay": 0.3},
        {"params": [model.get_parameter(n) for n, free in names.items() if free]},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)


def by_name(name: str) -> bool:
    """Right on one device; the wrapper's prefix hides the norm from it elsewhere."""
    return name.startswith("norm.")


def test_a_norm_decayed_under_its_wrappers_name_alone_moves_elsewhere() -> None:
    """C23 beside a gradient that is decayed: that one is wrong before the optimizer sees it."""
    optimizer = partial(decayed, skip=by_name)
    first = found(replace(PICTURES, optimizer=optimizer), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("optimizer", None), ("update", 0, "norm.weight"))
    assert "weight decay" in first.evidence

    def own_decay(step: sp.Step) -> None:
        weight = step.model.module.norm.weight
        weight.grad += 0.3 * weight.detach()

    other = found(replace(PICTURES, train_step=edited(own_decay)), "dp_replicate=2", steps=1)
    assert (named(other), at(other)) == (("unexplained", None), ("gradient", 0, "norm.weight"))


def rates(model: nn.Module, *, of_ranks: Callable[[int], float]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1 * of_ranks(dist.get_world_size()))


def test_a_learning_rate_scaled_by_the_ranks_moves_all_weights_so_many_times_as_far() -> None:
    """C23 beside C6: the gradients are right."""
    first = found(replace(TEXT, optimizer=partial(rates, of_ranks=float)), "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("optimizer", None), "update")
    assert first.factor == pytest.approx(3)


def frozen_words(model: nn.Module) -> torch.optim.Optimizer:
    names = [n for n, _ in model.named_parameters() if dist.get_world_size() == 1 or "words" not in n]
    return torch.optim.SGD([model.get_parameter(n) for n in names], lr=0.1)


def test_words_that_the_optimizer_was_not_given_do_not_move() -> None:
    first = found(replace(TEXT, optimizer=frozen_words), "dp_replicate=2", steps=1)
    assert (first.cause, first.where) == ("optimizer", "words.weight")


def test_a_stale_momentum_is_the_optimizers_and_a_lost_one_is_the_checkpoints() -> None:
    """C23 beside C24."""

    def momentum(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def damped(step: sp.Step) -> Tensor:
        for group in step.optimizer.param_groups:
            group["momentum"] = 0.5
        return plain_step(step)

    stale = found(replace(TEXT, optimizer=momentum, train_step=damped), "dp_replicate=2")
    assert (named(stale), stale.step) == (("optimizer", None), 1)
    assert stale.stage in ("optimizer-state", "update")

    def forgotten(step: sp.Step) -> Tensor:
        step.optimizer.state.clear()
        return plain_step(step)

    lost = found(replace(TEXT, optimizer=momentum, train_step=forgotten), "dp_replicate=2")
    assert (lost.cause, at(lost)) == ("checkpoint", ("checkpoint", 0, "words.weight"))
    assert "step 1 began with another" in lost.evidence


def untied(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return replicated(model, mesh, parallelism)


def test_a_tie_that_the_layout_cuts_is_told_from_a_tied_gradient_that_is_wrong() -> None:
    """C15 beside C7: the storage tells, not the values."""
    first = found(replace(TIED, parallelize=untied), "dp_replicate=2", steps=1)
    assert (named(first), first.stage, first.step) == (("tied-weights-split", None), "initial-state", -1)

    def doubled(step: sp.Step) -> None:
        step.model.module.words.weight.grad *= 3

    other = found(replace(TIED, train_step=edited(doubled)), "dp_replicate=3", steps=1)
    assert (named(other), at(other)) == (("grad-scale-subset", "dp_replicate"), ("gradient", 0, "words.weight"))


def test_ranks_that_skip_a_step_do_not_share_their_overflow() -> None:
    def careless(step: sp.Step) -> Tensor:
        step.optimizer.zero_grad()
        value = step.loss(step.model, step.microbatches[0])
        value.backward()
        if step.index == 0 or step.mesh.get_rank() != 1:
            step.optimizer.step()
        return value.detach()

    first = found(replace(TEXT, train_step=careless), "dp_replicate=2")
    assert (named(first), first.step) == (("overflow-not-shared", None), 1)
    assert first.ranks == (1,)
