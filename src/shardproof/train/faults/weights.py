"""Weights and buffers that are wrong on some ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch

from shardproof.parallel.held import plain
from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import AXES
from shardproof.train.faults.facts import Facts
from shardproof.train.faults.fault import Fault, Scene

DISTURBED = 1e-3
"""Relative change of weights: far above rounding, far below what a loss curve shows."""


@dataclass(frozen=True, kw_only=True)
class Swapped(Fault):
    """The first two ranks of an axis start with each other's shards of one parameter."""

    name = "shards-swapped"
    stage = "initial-state"

    axis: str
    parameter: str
    pieces: tuple[Piece | None, ...]
    """[rank]: what it holds instead; None where it keeps its own."""

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One for each axis over which a parameter is split."""
        found = []
        for axis in AXES:
            names = [name for name in facts.split_over(axis) if _swaps(facts, name, axis)]
            names = [name for name in names if name not in facts.constant] or names
            if names:
                name = facts.pick(names, f"{cls.name} {axis}")
                found.append(cls(axis=axis, parameter=name, pieces=_swaps(facts, name, axis)))
        return found or "no parameter has two shards of one shape"

    @property
    def place(self) -> str:
        """The parameter, and the axis."""
        return f"{self.parameter}, ranks 0 and 1 of {self.axis}"

    @property
    def wants(self) -> tuple[str, ...]:
        """The whole, of which each rank takes the other's piece."""
        return (self.parameter,)

    def reason(self, facts: Facts) -> str:
        """All the same."""
        return f"all values of {self.parameter} are the same number" if self.parameter in facts.constant else ""

    def initial(self, scene: Scene) -> None:
        """Take the other's piece; of a split by hand, whose places nobody tells, turn the own piece by a row."""
        held, theirs = scene.parameters.get(self.parameter), self.pieces[scene.rank]
        if held is None or theirs is None:
            return
        own = held.local(held.leaf)
        with torch.no_grad():
            if theirs.declared:
                own.copy_(theirs.take(scene.whole[self.parameter]))
            else:
                own.copy_(own.roll(1, 0))
        scene.planted += 1


@dataclass(frozen=True, kw_only=True)
class Disturbed(Fault):
    """One rank starts with other weights than its peers."""

    name = "weights-disturbed"
    stage = "initial-state"

    parameter: str
    rank: int

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One parameter that the last rank holds a part of."""
        rank = facts.parallelism.world_size - 1
        if rank == 0:
            return "there is one rank"
        names = [name for name, piece in facts.pieces[rank].items() if prod(piece.local_shape)]
        if not names:
            return f"rank {rank} holds no part of any parameter"
        names = [name for name in names if facts.largest.get(name)] or names
        return [cls(parameter=facts.pick(facts.clear(names), cls.name), rank=rank)]

    @property
    def place(self) -> str:
        """The parameter, and the rank."""
        return f"{self.parameter} on rank {self.rank}, by {DISTURBED:g} of its values"

    def reason(self, facts: Facts) -> str:
        """Nothing to disturb."""
        return "" if facts.largest.get(self.parameter) else f"{self.parameter} is zero"

    def initial(self, scene: Scene) -> None:
        """Scale the own part a little."""
        held = scene.parameters.get(self.parameter)
        if scene.rank == self.rank and held is not None:
            with torch.no_grad():
                held.local(held.leaf).mul_(1 + DISTURBED)
            scene.planted += 1


@dataclass(frozen=True, kw_only=True)
class Garbled(Fault):
    """A buffer that one rank updates in a way of its own."""

    name = "buffer-garbled"
    stage = "buffer"

    buffer: str
    rank: int

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One buffer."""
        rank = facts.parallelism.world_size - 1
        if rank == 0:
            return "there is one rank"
        if not facts.buffers:
            return "the model has no buffer of numbers"
        return [cls(buffer=facts.pick(facts.buffers, cls.name), rank=rank)]

    @property
    def place(self) -> str:
        """The buffer, and the rank."""
        return f"{self.buffer} on rank {self.rank}, after the first step"

    def after_optimizer(self, scene: Scene) -> None:
        """Once, as DDP may well repair it in the next forward pass."""
        buffer = scene.buffers.get(self.buffer)
        if scene.rank == self.rank and scene.step == 0 and buffer is not None:
            with torch.no_grad():
                plain(buffer).add_(1)
            scene.planted += 1


def _swaps(facts: Facts, name: str, axis: str) -> tuple[Piece | None, ...]:
    """[rank]: the other's piece on ranks 0 and 1 of an axis; empty where the shards do not fit each other."""
    found: list[Piece | None] = []
    for rank, own in enumerate(facts.pieces):
        index = facts.parallelism.coordinates(rank)[axis]
        if index > 1:
            found.append(None)
            continue
        theirs = facts.pieces[facts.peer(rank, axis, 1 - 2 * index)].get(name)
        if name not in own or theirs is None or own[name].local_shape != theirs.local_shape:
            return ()
        # A row alone cannot be turned, and nothing is no shard.
        is_shard = prod(theirs.local_shape) > (0 if theirs.declared else prod(theirs.local_shape[1:]))
        found.append(theirs if is_shard else None)
    return tuple(found) if any(found) else ()
