"""Where the Python code of a stuck rank stands, also while it waits in native code."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shardproof.ranks.failure import is_user_code
from shardproof.ranks.journal import Spot

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
        """Run by the rank: from now on it writes down where its main thread stands when a signal asks for it.

        So it does when it crashes in native code, and when it ends itself by `os._exit`.
        """
        descriptor = self._file.fileno()
        faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=False, chain=False)
        faulthandler.enable(file=descriptor, all_threads=False)
        owner, end = os.getpid(), os._exit

        def leave_a_trace(status: int) -> NoReturn:
            if os.getpid() == owner:  # children of a rank end that way as a rule
                faulthandler.dump_traceback(descriptor, all_threads=False)
            end(status)

        os._exit = leave_a_trace

    def ask(self, pid: int) -> None:
        """Run by the parent: asks the rank, without waiting."""
        os.kill(pid, signal.SIGUSR1)

    def read(self, deadline: float) -> str:
        """Run by the parent after `ask`: the stack, innermost frame first, by `deadline` (of time.monotonic)."""
        size = -1
        while True:
            time.sleep(_SETTLED_S)
            now = os.fstat(self._file.fileno()).st_size
            if now and now == size:
                return self.left()
            if time.monotonic() >= deadline:
                return "  unknown: it does not react to signals, as a process that waits for a disk"
            size = now

    def left(self) -> str:
        """Run by the parent: the stack that is there already, as of a rank that has crashed, or nothing."""
        size = os.fstat(self._file.fileno()).st_size
        return trimmed(os.pread(self._file.fileno(), size, 0).decode(errors="replace")) if size else ""

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


_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


def user_line(stack: str) -> Spot | None:
    """The innermost line of the user's own code in a stack; None where there is none."""
    return next((spot for spot in _spots(stack) if is_user_code(spot.file)), None)


def innermost(stack: str) -> Spot | None:
    """The innermost line of a stack, whoever's it is."""
    return next(_spots(stack), None)


def _spots(stack: str) -> Iterator[Spot]:
    for line in stack.splitlines():
        frame = _FRAME.match(line)
        if frame is not None:
            yield Spot(frame[1], int(frame[2]), frame[3])


def process_state(pid: int) -> str:
    """`T` for one that is stopped, and so on (proc(5)); nothing where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
