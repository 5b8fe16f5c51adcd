"""What a process of a torchrun launch does above rank 0: serve the leader, and end with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from shardproof.ranks.journal import Journal
from shardproof.ranks.last_words import LastWords
from shardproof.ranks.launch import Launch
from shardproof.ranks.output import flush
from shardproof.ranks.stacks import of_frame, trimmed
from shardproof.ranks.wire import Wire

ANSWERS, BYE, STACKS, STOP = "answers", "bye", "stacks", "stop"
"""Keys: answers and goodbyes are numbered in the order in which they come; `STACKS` holds how often the leader has
asked for them; `STOP` is written once."""

_IDLE_S = 0.01
"""How often a process without work looks for some."""
_WATCH_S = 0.2
"""How often a process looks whether the leader has given up."""
_LAST_WORDS_S = 10.0
"""How long followers outlive an error. When one of its processes ends, torchrun ends the others: the leader first
has to say what went wrong, and to end with its own exit code."""
_LEADER_GONE = 3
"""Exit code where the leader's store is gone: some rank has crashed."""


def call_key(rank: int, number: int) -> str:
    """Where the leader writes its call `number` (from 1 on) to `rank`."""
    return f"call/{rank}/{number}"


def here_key(rank: int) -> str:
    """Where `rank` writes that it has come, before it serves."""
    return f"here/{rank}"


def stack_key(rank: int, asked: bytes) -> str:
    """Where `rank` writes where it stands, and what it has called on its process groups; `asked` is what it was asked
    with."""
    return f"stack/{rank}/{asked.decode()}"


def follow(
    launch: Launch,
    wire: Wire,
    watching: Wire,
    perform: Callable[[bytes], bytes],
    journal: Journal,
    last_words: LastWords,
) -> None:
    """Serves calls until the leader is done. After an error it never returns: the process ends."""
    wire.send(here_key(launch.rank), b"")
    main = threading.get_ident()
    done = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(watching, launch, main, done, journal, last_words), name="shardproof watch", daemon=True
    )
    watch.start()
    number = 1
    try:
        while (stop := wire.look(STOP)) is None:
            message = wire.receive(call_key(launch.rank, number))
            if message is None:
                time.sleep(_IDLE_S)
                continue
            number += 1
            answer = perform(message)
            wire.send(_numbered(wire, ANSWERS), answer)
        if int(stop) == 0:
            # Before the leader hears of it and may close the store, and before Python ends: a thread that is in the
            # store's client by then takes the whole process down.
            done.set()
            watch.join()
            wire.send(_numbered(wire, BYE), b"")
            return
    except _store_errors():
        pass  # as the watch finds out as well, which ends the process
    threading.Event().wait()


def _watch(
    wire: Wire, launch: Launch, main: int, done: threading.Event, journal: Journal, last_words: LastWords
) -> None:
    """Ends the process after an error, also where its main thread is stuck in a collective."""
    shown = b""
    try:
        while (stop := wire.look(STOP)) is None:
            if (asked := wire.look(STACKS)) is not None and asked != shown:
                stack = trimmed(of_frame(sys._current_frames().get(main)))
                wire.send(stack_key(launch.rank, asked), pickle.dumps((stack, journal.calls())))
                shown = asked
            if done.wait(_WATCH_S):
                return
        code = int(stop)
        if code == 0:
            return
        wire.send(_numbered(wire, BYE), b"")
        _outlive_store(launch, last_words)
    except _store_errors():
        code = _LEADER_GONE
    flush()
    os._exit(code)


def _outlive_store(launch: Launch, last_words: LastWords) -> None:
    """Waits until whoever holds the store is gone or the launcher asks this process to end, at most `_LAST_WORDS_S`.

    On a connection that is never used: the store's own client logs at length when its server goes.
    """
    until = time.monotonic() + _LAST_WORDS_S
    with contextlib.suppress(OSError), socket.create_connection((launch.host, launch.port), _LAST_WORDS_S) as idle:
        while time.monotonic() < until and last_words.told_at is None:
            if select.select([idle], [], [], _WATCH_S)[0]:
                return


def _numbered(wire: Wire, key: str) -> str:
    return f"{key}/{wire.count(key)}"


def _store_errors() -> tuple[type[Exception], ...]:
    from torch.distributed import DistError  # noqa: PLC0415  (the room must be importable without torch)

    return (DistError, RuntimeError)
