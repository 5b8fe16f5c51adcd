"""What is asked of whoever takes part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.data import DataLoader

from shardproof.ranks import Place
from trainers.task import Task


class Contestant(ABC):
    """A model that is laid out, by the constructor and on every rank, and trains for some steps at a time."""

    def __init__(self, task: Task, place: Place) -> None:
        self.task, self.place = task, place

    @staticmethod
    def enters(task: Task) -> bool:
        """Whether it can train this model under this layout at all."""
        del task
        return True

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """As it is laid out on this rank."""

    @abstractmethod
    def steps(self, count: int) -> None:
        """Train for so many optimizer steps, reading the samples included."""

    @abstractmethod
    def loss(self) -> float:
        """The mean loss of this rank's part of the last batch."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Called once, when all is measured."""


class OwnLoop(Contestant):
    """For those who write the loop themselves: a step is given, and repeated over a loader's epochs."""

    batches: Iterator
    """Batches of this rank, without end."""

    _last: Tensor

    @abstractmethod
    def step(self, batch: object) -> Tensor:
        """One optimizer step; returns the loss, detached or not."""

    def steps(self, count: int) -> None:
        for _ in range(count):
            # Detached: the graph of one contestant must not stay in memory while another one is timed.
            self._last = self.step(next(self.batches)).detach()

    def loss(self) -> float:
        return self._last.item()


def endless(loader: DataLoader) -> Iterator:
    """Epoch after epoch."""
    while True:
        yield from loader
