"""Values as lines of text, on a terminal or in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from shardproof.errors import UsageError
from shardproof.spec.duration import Duration, parse_duration
from shardproof.trainer.logger import Logger


class ConsoleLogger(Logger):
    """Prints one line every so often, as `step 40  train/loss 0.5123  lr/group0 0.001`.

    A trainer has them printed to stdout, above its progress bar where one is drawn on the same terminal.

    A line holds the newest value of every name since the line before. Values of an evaluation (`eval/...`) are printed
    at once; others when the next step is heard of, as callbacks log one step's values one after the other.
    """

    def __init__(self, every: int | str | Duration = "10s", *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raise `UsageError` for an `every` that is neither steps nor time.

        Args:
            every: optimizer steps (`50`, `50ba`) or time (`30s`, `5min`) between two lines.
            clock: tells the time in seconds.
        """
        if isinstance(every, int):
            every = f"{every}ba"
        self.every = parse_duration(every, field="ConsoleLogger: every")
        if self.every.unit not in ("ba", "s"):
            raise UsageError(f"ConsoleLogger: every={str(self.every)!r}; give steps (50ba) or time (30s)")
        self._clock = clock
        self.write: Callable[[str], object] = _print_now
        """Takes each line. A trainer that draws a progress bar puts in what prints above it."""
        self._start()

    def _start(self) -> None:
        self._values: dict[str, float] = {}
        self._step = 0
        self._printed_step: int | None = None
        self._printed_s = 0.0

    def open(self, about: Mapping[str, Any]) -> None:
        """Print what the run is, on one line."""
        self._start()
        if about:
            self._print("run", about)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Gather the values, and print a line where one is due."""
        if self._values and step != self._step and self._due():
            self._report()
        self._values.update(values)
        self._step = step
        if any(name.startswith("eval/") for name in values):
            self._report()

    def close(self, *, failed: bool = False) -> None:
        """Print what has been gathered since the last line."""
        del failed
        if self._values:
            self._report()

    def _due(self) -> bool:
        # The first line comes at once: it is what people wait for.
        if self._printed_step is None:
            return True
        if self.every.unit == "s":
            return self._clock() - self._printed_s >= self.every.count
        return self._step // self.every.count > self._printed_step // self.every.count

    def _report(self) -> None:
        self._print(f"step {self._step}", self._values)
        self._values = {}
        self._printed_step, self._printed_s = self._step, self._clock()

    def _print(self, head: str, values: Mapping[str, Any]) -> None:
        self.write("  ".join([head, *(f"{name} {_spelled(value)}" for name, value in values.items())]))


def _print_now(line: str) -> None:
    # Flushed, as a log file is read while the run goes on.
    print(line, flush=True)


def _spelled(value: Any) -> str:
    """Four significant digits, or all digits before the point where those are more."""
    if not isinstance(value, float):
        return " ".join(str(value).split())
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
