"""What a user sees while a training runs: a bar on a terminal, and what ranks print.

All of it goes to the console that it is given, which should be stderr's. Forked ranks do not draw: their parent does,
from what rank 0 tells it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

REDRAWN_S = 0.1
"""Least time between two drawings: a terminal should not slow training down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """How far training is, in plain data that travels between processes."""

    step: int
    """Optimizer steps done."""

    total_steps: int | None
    """Steps of the whole training; None where nobody knows: it ends by time, or the data have no length."""

    epoch: int
    """From 0."""

    fraction: float
    """Of `max_duration` that is over, 0 to 1."""

    loss: float | None = None
    """The last global loss; None before the first one."""

    samples_per_s: float | None = None
    lr: float | None = None
    """Learning rate of the first param group."""


class Screen(Protocol):
    """Told how training goes on."""

    def update(self, shown: Shown) -> None:
        """Some steps are over."""

    def message(self, text: str) -> None:
        """A line that a rank printed."""

    def close(self) -> None:
        """Nothing more will come; also called when training failed, and more than once."""


class NoBar:
    """Passes on what ranks print, and draws nothing: for logs, where `ConsoleLogger` writes lines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def update(self, shown: Shown) -> None:
        """Says nothing."""

    def message(self, text: str) -> None:
        """The text as it came."""
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Nothing to tidy up."""


class Bar:
    """One line, below what ranks print. It stays when training is over, as its last state."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        # No refresh from a thread: ranks are forked from this process, and a thread that holds the lock of
        # stderr at that moment would leave it locked in the rank for ever.
        self._progress = Progress(
            TextColumn("{task.fields[where]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[how]}", markup=False),
            console=console,
            expand=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=1.0, where="", how="")
        self._began: tuple[float, float] | None = None
        self._drawn_s = 0.0
        self._waiting: Shown | None = None

    def update(self, shown: Shown) -> None:
        """Draw, but not too often."""
        now = self._clock()
        if self._began is None:
            self._began = (now, shown.fraction)
            self._progress.start()
        elif now - self._drawn_s < REDRAWN_S:
            self._waiting = shown
            return
        self._draw(shown, now)

    def message(self, text: str) -> None:
        """Print the text above the bar."""
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Draw the last state and leave it there."""
        if self._waiting is not None:
            self._draw(self._waiting, self._clock())
        self._progress.stop()

    def _draw(self, shown: Shown, now: float) -> None:
        self._waiting, self._drawn_s = None, now
        steps = f"{shown.step}" if shown.total_steps is None else f"{shown.step}/{shown.total_steps}"
        how = [
            None if shown.loss is None else f"loss {shown.loss:.4g}",
            None if shown.lr is None else f"lr {shown.lr:.3g}",
            None if shown.samples_per_s is None else f"{shown.samples_per_s:.4g} samples/s",
            self._left(shown, now),
        ]
        self._progress.update(
            self._task,
            completed=shown.fraction,
            where=f"epoch {shown.epoch} step {steps}",
            how="  ".join(part for part in how if part),
            refresh=True,
        )

    def _left(self, shown: Shown, now: float) -> str | None:
        """Time left if the rest goes as fast as what this process has seen; a resumed run starts above 0."""
        if self._began is None or shown.fraction >= 1:
            return None
        since_s, done = now - self._began[0], shown.fraction - self._began[1]
        return f"{_clock_time(since_s / done * (1 - shown.fraction))} left" if done > 0 else None


def screen_on(console: Console, *, progress_bar: bool = True) -> Screen:
    """A bar where `console` is a terminal and one is wanted; else nothing but what ranks print."""
    # isatty, not rich's is_terminal: FORCE_COLOR turns that on in CI logs, which cannot erase a line.
    drawable = console.file.isatty() and not console.is_dumb_terminal
    return Bar(console) if progress_bar and drawable else NoBar(console)


def _clock_time(seconds: float) -> str:
    """`1:02:03`, or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
