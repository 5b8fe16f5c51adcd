"""SIGTERM as a request: finish the step, save, and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from shardproof.ranks.sigterm import ONE_REQUEST_S, by_default


class Termination:
    """Inside its `with` statement the first SIGTERM sets `requested`, and a later one ends the process after all.

    SIGTERMs of the same `ONE_REQUEST_S` seconds are one request: a batch system signals every process of a job, and
    the launcher passes on what it gets. Outside the main thread, where Python handles no signals, it does nothing.
    Within another one it is that one.
    """

    requested: bool
    """Whether this process has been asked to end."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._owner = os.getpid()
        self._installed = False
        self._earlier: Any = signal.SIG_DFL

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if isinstance(outer, Termination):
                return outer
            self._earlier = signal.signal(signal.SIGTERM, self._handle)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            self._installed = False
            # None stands for a handler that was not installed from Python and cannot be installed from there.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._earlier is None else self._earlier)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            by_default()  # a child, as a worker of a pool: it has inherited the handler, not the work to save
        elif not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= ONE_REQUEST_S:
            by_default()
