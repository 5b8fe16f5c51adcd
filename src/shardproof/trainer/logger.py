"""Where the values of a run go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Logger(ABC):
    """Takes values from rank 0; other ranks never open one. Write `log`, and the others where they mean something."""

    def open(self, about: Mapping[str, Any]) -> None:  # noqa: B027  (nothing to do is a fine default)
        """The run starts. `about` says what it is, in plain data: strategy, ranks, precision, batch size, seed ..."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values of one step, as `{"train/loss": 0.5, "eval/accuracy": 0.9}`.

        `step` counts the optimizer steps that were over; from one call to the next it never goes down, unless a run
        was resumed.
        """

    def close(self, *, failed: bool = False) -> None:  # noqa: B027  (nothing to do is a fine default)
        """The run is over, or has `failed` with an error. Whatever is held back must be written."""
