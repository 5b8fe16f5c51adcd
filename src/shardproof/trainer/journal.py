"""What is to be logged, in the order of steps, whenever it became known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from shardproof.trainer.logger import Logger


class Journal:
    """Keeps values until they are complete up to a step: losses become known later than what callbacks log."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers
        self._opened: list[Logger] = []
        self._values: dict[int, dict[str, float]] = {}

    def open(self, about: Mapping[str, Any]) -> None:
        """The run starts."""
        for logger in self._loggers:
            logger.open(about)
            self._opened.append(logger)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""
        if self._loggers:
            self._values.setdefault(step, {}).update(values)

    def flush(self) -> None:
        """Hand everything to the loggers."""
        for step in sorted(self._values):
            # Taken out first: after a logger has failed, `close` must not tell the others the same once more.
            values = self._values.pop(step)
            for logger in self._opened:
                logger.log(values, step)

    def close(self, *, failed: bool) -> None:
        """The run is over, or has failed: what is still kept is logged, and every logger closed."""
        with ExitStack() as closing:
            # Every logger is closed, the first one first, whatever the others raise.
            for logger in reversed(self._opened):
                closing.callback(logger.close, failed=failed)
            self._opened = []
            self.flush()
