"""Where in a stream of random numbers a constructor draws, told without drawing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from shardproof.parallel.replay import Draw

STEPS = 997
"""By how many numbers, at most, a generator is moved: by another each time, so that points do not fall together."""


class Streams:
    """The generators that a constructor draws from, and where each of them is set anew.

    Nothing is drawn while the constructor runs, so a generator would not move. It is moved by a few numbers after each
    operation that draws, which gives every point in the stream a state of its own: a state that is put back later
    is known again.
    """

    def __init__(self) -> None:
        self._generators: list[torch.Generator] = [torch.default_generator]
        self._now: dict[int, bytes] = {}
        self._points: dict[bytes, int] = {}
        self._aside: Tensor | None = None

    def before(self, generator: torch.Generator | None) -> Draw:
        """The draw that an operation is about to make."""
        stream = self._stream(generator)
        state = self._generators[stream].get_state()
        key = state.numpy().tobytes()
        if key == self._now.get(stream):
            return Draw(stream)
        if key in self._points:
            return Draw(stream, self._points[key])
        return Draw(stream, state)

    def after(self, generator: torch.Generator | None, number: int) -> None:
        """Operation `number` has drawn."""
        stream = self._stream(generator)
        found = self._generators[stream]
        key, steps = None, 1 + number % STEPS
        while key is None or key in self._points:
            torch.empty(steps, dtype=torch.int64).random_(generator=found)
            key = found.get_state().numpy().tobytes()
        self._points[key] = number
        self._now[stream] = key

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, torch's own generator is where values that were asked for have left it."""
        own = torch.default_generator.get_state()
        if self._aside is not None:
            torch.default_generator.set_state(self._aside)
        try:
            yield
        finally:
            self._aside = torch.default_generator.get_state()
            torch.default_generator.set_state(own)

    def _stream(self, generator: torch.Generator | None) -> int:
        if generator is None:
            return 0
        for stream, known in enumerate(self._generators):
            if known is generator:
                return stream
        self._generators.append(generator)
        return len(self._generators) - 1
