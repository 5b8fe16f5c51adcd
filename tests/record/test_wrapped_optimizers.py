"""What a loop calls its optimizer may be something that a framework put around one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Model, built, events, of, trace_of, train

import shardproof as sp


class NoHooks(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by its class only."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class LentHooks:
    """As Fabric's and Lightning's: its class is made to be the inner one's too, whose attributes it shows."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._inner = optimizer
        self.__class__ = type("Lent" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._inner

    def step(self) -> None:
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("around", [NoHooks, LentHooks])
def test_an_optimizer_is_recorded_as_the_loop_has_it(tmp_path: Path, around: type) -> None:
    model, optimizer = built(Model)
    wrapped = around(optimizer)
    with sp.record(tmp_path, model, wrapped):
        train(model, wrapped)
    trace = trace_of(tmp_path)
    assert [event["event"] for event in trace.events] == ["layout", "step", "step", "step", "closed"]
    assert [event["backwards"] for event in events(trace, "step")] == [1, 1, 1]
    assert events(trace, "layout")[0]["optimizers"] == ["AdamW"]
    for step in range(3):
        assert len(of(trace, "optimizer-state", "head.weight", "exp_avg", step)) == 1


def test_an_optimizer_around_another_that_steps_by_itself_is_the_one_that_counts(tmp_path: Path) -> None:
    class Twice(torch.optim.Optimizer):
        """As those that look ahead: the inner one steps twice in each step of its own."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()
            self.optimizer.step()

    model, optimizer = built(Model)
    outer = Twice(optimizer)
    with sp.record(tmp_path, model, outer):
        train(model, outer)
    assert len(events(trace_of(tmp_path), "step")) == 3
