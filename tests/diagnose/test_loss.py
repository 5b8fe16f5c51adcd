"""Right outputs and a wrong loss: its own arithmetic over ranks, means of means, or what is logged alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, found, named, token_mean, token_sum
from shardproof.zoo.fixtures.steps import plain_step


def test_a_mean_over_ragged_tokens_is_a_mean_of_means_in_the_loss() -> None:
    first = found(replace(TEXT, loss=token_mean), "dp_replicate=3", steps=1)
    assert (named(first), first.stage) == (("mean-of-means", "dp_replicate"), "loss")


def own_classes(model: nn.Module, batch: Any) -> Tensor:
    """Under tensor parallelism each rank takes the loss of its own classes alone."""
    logits, targets = model(batch[0]), batch[1]
    if dist.get_world_size() > 1:
        columns = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
        logits, targets = logits[..., columns], targets[..., columns]
    return F.mse_loss(logits, targets)


def test_a_loss_of_the_own_classes_alone_is_sharded() -> None:
    """C13 beside C5: there are no parts of the batch over which a mean could be wrong."""
    first = found(replace(GATED, loss=own_classes), "tp=2", steps=1)
    assert (named(first), first.stage) == (("sharded-loss", "tp"), "loss")
    assert "ranks of a tp group get different losses from the same output" in first.evidence


def one_of_all(model: nn.Module, batch: Any) -> Tensor:
    """The exponentials of all ranks are summed, though each rank has all of them."""
    logits, chosen = model(batch[0]), batch[1].argmax(-1, keepdim=True)
    total = logits.exp().sum(-1) * dist.get_world_size()
    return (total.log() - logits.gather(-1, chosen).squeeze(-1)).mean()


def test_exponentials_that_are_summed_over_ranks_that_all_have_them_add_a_logarithm() -> None:
    first = found(replace(GATED, loss=one_of_all), "tp=2", steps=1)
    assert (named(first), first.stage) == (("sharded-loss", "tp"), "loss")
    assert f"{math.log(2):.6g} = log(tp=2)" in first.evidence


def test_only_the_logged_loss_is_wrong() -> None:
    def step(given: sp.Step) -> Tensor:
        return 3 * plain_step(given)

    first = found(replace(PICTURES, train_step=step), "dp_replicate=3", steps=1)
    assert (first.cause, first.stage) == ("unexplained", "loss")
    assert "what the step returns is not: it is 3 times the reference's" in first.evidence
    assert "8 of 8 gradients" in first.evidence


def test_ragged_sums_are_right() -> None:
    assert sp.check(replace(TEXT, loss=token_sum), ("dp_replicate=3",), steps=1).proven
