"""Shows what ranks print while they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from shardproof.ranks.output import Caught

LOOK_S = 0.2
"""Output is shown this long after it was first seen, with what the other ranks have printed meanwhile: equal lines of
several ranks, which come at almost the same time, are then one line."""


class Live:
    """Decides when the output of running ranks is worth showing; `show` is then called."""

    def __init__(self, outputs: Collection[Caught], show: Callable[[], None]) -> None:
        self._outputs, self._show = outputs, show
        self._seen = False
        self._next = time.monotonic()

    def look(self) -> None:
        """To be called often; it looks at the files every `LOOK_S` only."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_S
        if self._seen:
            self._show()
            for output in self._outputs:
                output.free()
            self._seen = False
        else:
            self._seen = any(output.has_more() for output in self._outputs)
