"""Optimizers that leave a parameter behind, or forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shardproof.parallel.held import plain
from shardproof.train.faults.facts import CLEAR, Facts
from shardproof.train.faults.fault import Fault, Scene


@dataclass(frozen=True, kw_only=True)
class Stale(Fault):
    """One parameter that the optimizer does not step, as where it was built before the model was laid out."""

    name = "parameter-not-updated"
    stage = "update"

    parameter: str

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One parameter."""
        names = facts.trained()
        if not names:
            return "no parameter of the reference has a gradient"
        return [cls(parameter=facts.pick(facts.clear(names, facts.moved), cls.name))]

    @property
    def place(self) -> str:
        """The parameter."""
        return f"{self.parameter}, on all ranks"

    def reason(self, facts: Facts) -> str:
        """Nothing to lose."""
        floors = facts.moved.get(self.parameter, 0.0)
        return "" if floors > CLEAR else f"a step does not move {self.parameter} by more than round-off"

    def before_optimizer(self, scene: Scene) -> None:
        """Keep its value."""
        held = scene.parameters.get(self.parameter)
        if held is not None:
            scene.kept["value"] = held.local(held.leaf.detach()).clone()

    def after_optimizer(self, scene: Scene) -> None:
        """Put it back."""
        held = scene.parameters.get(self.parameter)
        if held is not None and "value" in scene.kept:
            with torch.no_grad():
                held.local(held.leaf).copy_(scene.kept["value"])
            scene.planted += 1


@dataclass(frozen=True, kw_only=True)
class Forgotten(Fault):
    """The optimizer's state is lost before the second step, as where a checkpoint was loaded without it."""

    name = "optimizer-state-lost"
    stage = "optimizer-state"

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where there is state, and a second step to use it."""
        if facts.steps == 1:
            return "there is no second step"
        return [cls()] if facts.has_state else "the optimizer keeps no state"

    @property
    def place(self) -> str:
        """All of it."""
        return "all state, before step 1"

    @property
    def steps(self) -> int | None:
        """The second step."""
        return 2

    def before_optimizer(self, scene: Scene) -> None:
        """Zero what is there: an optimizer that makes its state when it is built would miss entries."""
        if scene.step != 1 or scene.optimizer is None:
            return
        for entries in scene.optimizer.state.values():
            for value in entries.values() if isinstance(entries, dict) else ():
                if isinstance(value, Tensor):
                    plain(value.detach()).zero_()
                    scene.planted += 1
