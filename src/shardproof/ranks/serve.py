"""The life of one forked rank, from the fork to the end of its process."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import signal
import sys
from multiprocessing.connection import Connection

from shardproof.ranks import noise
from shardproof.ranks.answer import perform
from shardproof.ranks.journal import Journal
from shardproof.ranks.loopback import loopback
from shardproof.ranks.output import Caught, flush
from shardproof.ranks.overhear import overhear
from shardproof.ranks.place import Place
from shardproof.ranks.stacks import Stack
from shardproof.ranks.told import Voice

_PR_SET_PDEATHSIG = 1


def live(target: object, place: Place, connection: Connection, output: Caught, stack: Stack, journal: Journal) -> None:
    """Answers calls until the parent is gone; mostly the parent ends this process before that."""
    _settle(place, output, stack)
    voice = Voice(place.rank, connection)
    place = dataclasses.replace(place, _tell=voice.tell, _journal=journal)
    overhear(journal)
    while True:
        try:
            message = voice.hear()
        except (EOFError, OSError):
            return  # the parent is gone
        place.use_device()
        answer = perform(target, place, message)
        flush()
        voice.answer(answer)


def _settle(place: Place, output: Caught, stack: Stack) -> None:
    # A group of its own: Ctrl-C in the terminal reaches the parent alone, which ends the ranks without a traceback,
    # and whatever user code has started from a rank (data loaders) ends with it.
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _read_nothing()
    output.catch()
    stack.answer_signals()
    noise.silence()
    # What the parent has made is here to stay: the collector neither looks at it nor copies its pages.
    gc.freeze()
    _settle_torch(place)


def _settle_torch(place: Place) -> None:
    import torch  # noqa: PLC0415  (the room must be importable without torch; here the fork has brought it)

    torch.set_num_threads(1)
    if (interface := loopback()) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if place.device_type == "cpu":
        # Code that picks a device by itself picks the CPU as well.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def outlive_nobody(parent: int) -> None:
    """Makes the kernel end this process with its parent, however that ends. Linux only; elsewhere the pipe tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has ended since the fork


def _read_nothing() -> None:
    """User code that asks a question on stdin gets an end of file instead of a rank that waits for ever."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (open as long as the rank lives)
