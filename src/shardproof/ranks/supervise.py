"""Waits for the answers of forked ranks, and hears whichever speaks first."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from multiprocessing.connection import wait

from shardproof.ranks.blame import how_it_ended
from shardproof.ranks.heard import Heard
from shardproof.ranks.process import Process

POLL_S = 0.1
"""A death shows as a closed pipe at once; where user code's own children hold the pipe open, after this long."""


def hear(processes: Mapping[int, Process], timeout_s: float) -> Heard:
    """Every rank's answer; what there is of them where a rank fails, dies, or the time is up (in seconds)."""
    heard = Heard(silent=set(processes))
    deadline = time.monotonic() + timeout_s
    while heard.silent and (now := time.monotonic()) < deadline:
        ready = wait([processes[rank].connection for rank in heard.silent], min(POLL_S, deadline - now))
        for rank in sorted(heard.silent):
            process = processes[rank]
            closed = process.connection in ready and not _listen(process, heard)
            if closed and not process.gone(wait_s=2.0):
                heard.death(rank, "it closed its pipe to the supervisor, as code does that closes every open file")
            elif closed or (process.connection not in ready and process.gone() and not process.connection.poll()):
                heard.death(rank, how_it_ended(process.exit_code))
        deadline = min(deadline, heard.patience())
    return heard


def _listen(process: Process, heard: Heard) -> bool:
    """Takes the answer of a rank that has something to say; False where that is the end of its pipe."""
    try:
        heard.answer(pickle.loads(process.connection.recv_bytes()))
    except (EOFError, OSError):
        return False
    return True
