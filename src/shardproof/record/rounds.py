"""When a step is over, where it takes more than one optimizer.

A step ends when every optimizer that was attached has stepped, or when one of them steps a second time: then the step
had ended with whatever stepped before it, and the next has begun.
"""

from __future__ import annotations

from torch.optim import Optimizer


class Round:
    """The optimizers of a loop, and which of them have stepped in this step."""

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self._stepped: set[int] = set()

    def add(self, optimizer: Optimizer) -> bool:
        """Whether it is a new one."""
        if any(optimizer is known for known in self.optimizers):
            return False
        self.optimizers.append(optimizer)
        return True

    def overdue(self, optimizer: Optimizer) -> bool:
        """Whether it is about to step for the second time, so that the step has ended already."""
        return id(optimizer) in self._stepped

    def stepped(self, optimizer: Optimizer) -> bool:
        """It has stepped; whether the step is over with that."""
        self._stepped.add(id(optimizer))
        return all(id(known) in self._stepped for known in self.optimizers)

    def begin(self) -> None:
        """A new step."""
        self._stepped.clear()
