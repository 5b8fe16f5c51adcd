"""Where the Python code of a stuck rank stands, also while it waits in native code."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType

_SETTLED_S = 0.05
"""A stack is written in one go: this long without another byte, and it is whole."""
_ROOM = f'  File "{Path(__file__).parent}{os.sep}'
_ENTRY = f"{_ROOM}answer.py"
"""Where this room calls the target."""


class Stack:
    """The stack of one rank, written by the rank itself into a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="shardproof-")  # noqa: SIM115  (open as long as the rank lives)

    def answer_signals(self) -> None:
        """Run by the rank: from now on a signal makes it write down where its main thread stands."""
        faulthandler.register(signal.SIGUSR1, file=self._file.fileno(), all_threads=False, chain=False)

    def ask(self, pid: int) -> None:
        """Run by the parent: asks the rank, without waiting."""
        os.kill(pid, signal.SIGUSR1)

    def read(self, deadline: float) -> str:
        """Run by the parent after `ask`: the stack, innermost frame first, by `deadline` (of time.monotonic)."""
        size = 0
        while time.monotonic() < deadline:
            time.sleep(_SETTLED_S)
            now = os.fstat(self._file.fileno()).st_size
            if now and now == size:
                return trimmed(os.pread(self._file.fileno(), now, 0).decode(errors="replace"))
            size = now
        return "  unknown: it does not react to signals, as a process does that is stopped or waits for a disk"

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()


def of_frame(frame: FrameType | None) -> str:
    """The stack of a thread of this process, in the form that faulthandler writes."""
    lines = []
    while frame is not None:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
        frame = frame.f_back
    return "\n".join(lines)


def trimmed(stack: str) -> str:
    """faulthandler's text without its header and without what is in every stack: this room, and what called it."""
    frames = [line for line in stack.splitlines() if line.startswith('  File "')]
    entry = next((i for i, line in enumerate(frames) if line.startswith(_ENTRY)), len(frames))
    theirs = [line for line in frames[:entry] if not line.startswith(_ROOM)]
    return "\n".join(theirs or frames) or "  in no Python code"
