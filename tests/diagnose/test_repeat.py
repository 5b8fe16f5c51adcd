"""The same run twice: what differs from itself, and what is wrong in the same way each time."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

import shardproof as sp
from diagnose.models import PICTURES, Pictures, at, bare, edited, found, gradient, named, numbers


def raced(step: sp.Step) -> None:
    """As much of the gradient as was ready, which is another part each time."""
    grad = gradient(step, "mix.weight")
    ready = torch.frombuffer(bytearray(os.urandom(grad.numel())), dtype=torch.uint8) < 128
    grad.mul_(ready.view_as(grad))


def test_a_gradient_that_is_another_each_time_is_told_from_one_that_is_wrong_each_time() -> None:
    """C25 beside C0: half of the gradient is missing in both."""
    first = found(replace(PICTURES, train_step=edited(raced)), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("nondeterminism", None), ("gradient", 0, "mix.weight"))
    assert first.ranks == (0, 1)

    def half(step: sp.Step) -> None:
        grad = gradient(step, "mix.weight")
        grad.mul_(numbers(*grad.shape, seed=3) > 0)

    other = found(replace(PICTURES, train_step=edited(half)), "dp_replicate=2", steps=1)
    assert (named(other), at(other)) == (("unexplained", None), ("gradient", 0, "mix.weight"))


class Once(Pictures):
    """Raises where a process runs more than its first two steps, as a program does that holds a file or a socket."""

    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1:
            PASSES.append(1)
            if len(PASSES) > 2:
                raise RuntimeError("this program runs once")
        return super().forward(x)


PASSES: list[int] = []


def test_a_program_that_raises_the_second_time_keeps_its_finding() -> None:
    first = found(replace(PICTURES, model=Once, parallelize=bare), "dp_replicate=2")
    assert (named(first), at(first)) == (("grad-not-reduced", "dp_replicate"), ("gradient", 0, "head.bias"))
