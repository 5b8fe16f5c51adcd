"""Work of hundreds of ranks' records, done by two processes: the second is forked, and knows all that was read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_halves(work: Callable[[int, int], list[Item]]) -> list[Item]:
    """`work(number, count)` for both numbers of two, each in a process of its own; what they found, in one list.

    Results are plain data, and the work must change nothing. Where no process can be made, or it ends early, its half
    is done here.
    """
    reading, writing = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        return work(0, 1)
    if child == 0:
        _answer(work, writing)
    os.close(writing)
    threads = torch.get_num_threads()
    with os.fdopen(reading, "rb") as answer:
        try:
            # Two processes have one core each, and threads that wait for each other would take both.
            torch.set_num_threads(1)
            own = work(0, 2)
            theirs = answer.read()
        finally:
            torch.set_num_threads(threads)
            # Ends the other one as well where this one is interrupted: it finds nobody to write to.
            answer.close()
            os.waitpid(child, 0)
    # A file that nobody else could write to: our own process made it a moment ago.
    return [*own, *(pickle.loads(theirs) if theirs else work(1, 2))]


def _answer(work: Callable[[int, int], list[Item]], writing: int) -> None:
    """The forked process's part; it never returns."""
    try:
        # The threads of the process that was forked are not here.
        torch.set_num_threads(1)
        answer = pickle.dumps(work(1, 2))
        with os.fdopen(writing, "wb") as file:
            file.write(answer)
    finally:
        # Whatever went wrong here goes wrong again where it can be told.
        os._exit(0)
