"""Work on input of strangers: in so much memory and time, or it fails."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TookTooLong(BaseException):
    """No `Exception`, so that nothing on the way takes it for an error of the input."""


@contextmanager
def bounded(memory_bytes: int, *, seconds: int) -> Iterator[None]:
    """Inside, this process may take that much more memory than it has, and that long; more fails where it is taken."""

    def too_long(*_: object) -> None:
        raise TookTooLong(f"more than {seconds} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
