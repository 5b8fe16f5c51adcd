"""Random masks: alike over tp, different over data ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardproof as sp
from diagnose.models import PICTURES, TEXT, WORDS, Pictures, at, drawn, found, named
from shardproof.zoo.fixtures.steps import plain_step


class Dropped(nn.Module):
    """Drops some features of each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)
        self.drop = nn.Dropout(0.3)
        self.up = nn.Linear(6, 8)
        self.head = nn.Linear(8, WORDS)
        drawn(self)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, WORDS)
        return self.head(self.up(self.drop(self.words(tokens))).tanh())


DROPPED = replace(TEXT, model=Dropped, parallelize=None, tp_plan={"up": "colwise", "head": "rowwise"})


def seeded_alike(step: sp.Step) -> Tensor:
    torch.manual_seed(step.index)
    return plain_step(step)


def seeded_by_rank(step: sp.Step) -> Tensor:
    torch.manual_seed(100 * step.index + step.mesh.get_rank())
    return plain_step(step)


def test_masks_that_differ_where_they_must_be_alike_and_are_alike_where_they_must_differ() -> None:
    peers = found(replace(DROPPED, train_step=seeded_by_rank), "tp=2", steps=1)
    assert (named(peers), at(peers)) == (("rng", "tp"), ("forward", 0, "drop"))
    data = found(replace(DROPPED, train_step=seeded_alike), "dp_replicate=2", steps=1)
    assert (named(data), at(data)) == (("rng", "dp"), ("forward", 0, "drop"))


def test_masks_of_each_data_ranks_own_are_no_finding() -> None:
    report = sp.check(replace(DROPPED, train_step=seeded_by_rank), ("dp_replicate=2",), steps=1)
    assert report.first is None, str(report)


def test_a_dropout_that_is_off_under_one_layout_is_no_matter_of_seeds() -> None:
    """C20 beside whatever else may be wrong with a module that draws."""

    def awake(step: sp.Step) -> Tensor:
        for module in step.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.6
        return plain_step(step)

    first = found(replace(DROPPED, train_step=awake), "tp=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("forward", 0, "drop"))


class Jittered(Pictures):
    """Adds noise where there is more than one rank."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.randn_like(out) if dist.is_initialized() and dist.get_world_size() > 1 else out


def test_a_layout_that_alone_draws_random_numbers_is_a_matter_of_them() -> None:
    first = found(replace(PICTURES, model=Jittered), "dp_replicate=2", steps=1)
    assert (first.cause, first.stage, first.step) == ("rng", "forward", 0)
    assert "none on one device" in first.evidence
