"""A request to end that reaches the supervisor of ranks goes to the ranks, which have work to save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ONE_REQUEST_S = 2.0
"""SIGTERMs within this time are one request. A batch system signals every process of a job, and a launcher passes on
to its children what they have been sent already."""


@contextmanager
def passed_on(to_ranks: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGTERM calls `to_ranks`, and a second request calls `end` and then ends this process.

    Does nothing outside the main thread, where Python handles no signals, and where somebody else handles SIGTERM.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner, first = os.getpid(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if os.getpid() == owner and not first:
            first = now
            to_ranks()
        elif os.getpid() != owner or now - first >= ONE_REQUEST_S:
            if os.getpid() == owner:
                end()
            by_default()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def by_default() -> None:
    """Ends this process as a SIGTERM does that nobody handles. To be called by a handler of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)
