"""Waits for the answers of forked ranks, and hears whichever speaks first."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait

from shardproof.ranks.blame import Death
from shardproof.ranks.heard import Heard
from shardproof.ranks.process import Process
from shardproof.ranks.told import Told

POLL_S = 0.1
"""A death shows as a closed pipe at once; where user code's own children hold the pipe open, after this long."""


def hear(
    processes: Mapping[int, Process],
    timeout_s: float,
    *,
    on_event: Callable[[int, object], None],
    look: Callable[[], None] | None = None,
    heard: Heard | None = None,
    stuck: Callable[[], bool] = lambda: False,
) -> Heard:
    """Every rank's answer; what there is of them where a rank fails, dies, or the time is up (in seconds).

    `look` makes a live call of it: it is called every `POLL_S` or so until a rank fails, and the time limit counts
    from the last event or answer. `heard` is where to put it all, for a caller that has a patience of its own. `stuck`
    is called likewise, and ends the waiting where it returns True: ranks have called different collectives, and will
    not answer.
    """
    heard = Heard(silent=set(processes)) if heard is None else heard
    deadline = time.monotonic() + timeout_s
    while heard.silent:
        left_s = deadline - time.monotonic()
        ready = wait([processes[rank].connection for rank in heard.silent], max(0.0, min(POLL_S, left_s)))
        if left_s <= 0 and (look is None or heard.trouble or not ready):
            # Asked after a last look into the pipes: a caller that was stopped, or slow to show what it heard, finds
            # there what ranks have said meanwhile.
            break
        for rank in sorted(heard.silent):
            process = processes[rank]
            closed = process.connection in ready and not _listen(process, heard, on_event)
            if closed and not process.gone(wait_s=2.0):
                heard.death(
                    rank, Death("it closed its pipe to the supervisor, as code does that closes every open file")
                )
            elif closed or (process.connection not in ready and process.gone() and not process.connection.poll()):
                heard.death(rank, process.death())
        if not ready and not heard.trouble and stuck():
            break
        if look is not None and not heard.trouble:
            if ready:
                deadline = time.monotonic() + timeout_s
            look()
        deadline = min(deadline, heard.patience())
    return heard


def _listen(process: Process, heard: Heard, on_event: Callable[[int, object], None]) -> bool:
    """Takes the next message of a rank that has something to say; False where that is the end of its pipe."""
    try:
        message = pickle.loads(process.connection.recv_bytes())
    except (EOFError, OSError):
        return False
    if isinstance(message, Told):
        on_event(message.rank, message.event)
    else:
        heard.answer(message)
    return True
