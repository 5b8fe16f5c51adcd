"""Ranks of our own: forked from this process, warm from the first call to the last."""

from __future__ import annotations

import os
import pickle
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardproof.errors import RankDied, RankMismatch, UsageError
from shardproof.ranks.blame import cause
from shardproof.ranks.explained import Standstill, explained, hung, refuse_uneven
from shardproof.ranks.heard import Heard
from shardproof.ranks.journal import Call
from shardproof.ranks.live import Live
from shardproof.ranks.noise import NATIVE_LOG, without_noise
from shardproof.ranks.output import flush, grouped, label
from shardproof.ranks.place import Place, Rendezvous
from shardproof.ranks.pool import Ranks
from shardproof.ranks.preload import preload
from shardproof.ranks.process import Process
from shardproof.ranks.safety import refuse_unsafe_fork
from shardproof.ranks.sigterm import passed_on
from shardproof.ranks.store import host_store, join_store
from shardproof.ranks.supervise import hear

_STACKS_S = 2.0
"""How long stuck ranks may take to write down where they are."""


class ForkedRanks(Ranks):
    """`size` processes forked from this one. They end with it, however it ends.

    The thread that makes them must outlive them: Linux takes its end for the end of their parent.
    """

    def __init__(self, size: int, target: object, *, timeout_s: float, device: str) -> None:
        super().__init__(size)
        self._timeout_s = timeout_s
        preload()
        refuse_unsafe_fork(device)
        self._store, port = host_store()
        rendezvous = Rendezvous(lambda: join_store(port), local_size=size)
        # What the parent holds back in its buffers would be written once more by every rank.
        flush()
        self._processes: dict[int, Process] = {}
        # Also where nobody closes them: at the end of the interpreter, or when the last reference is gone.
        self._finish = weakref.finalize(self, _end_all, self._processes, os.getpid())
        for rank in range(size):
            place = Place(rank=rank, size=size, local_rank=rank, device_type=device, _rendezvous=rendezvous)
            try:
                self._processes[rank] = Process(place, target, elders=list(self._processes.values()))
            except OSError as error:
                self._finish()
                raise UsageError(f"cannot start rank {rank} of {size}: {error}; ask for fewer ranks") from error

    def _call(self, method: str, args: tuple[Any, ...], ranks: list[int], during: str, *, live: bool) -> dict[int, Any]:
        message = pickle.dumps((method, args))
        called = {rank: self._processes[rank] for rank in ranks}
        for process in called.values():
            process.send(message)
        stuck = Standstill(
            lambda: self._journals(called), lambda: [process.journal.count() for process in called.values()]
        )
        if live:
            heard = self._hear_live(called, during, stuck)
        else:
            heard = hear(called, self._timeout_s, on_event=self.on_event, stuck=stuck)
        found = cause(heard.answers, heard.deaths, during=during)
        if found is not None:
            guilty, error = found
            for process in self._processes.values():
                process.kill()
            echo = guilty in heard.answers and heard.answers[guilty].echo
            sizes = echo or isinstance(error, RankDied)
            error = explained(error, self._journals(called), during=during, sizes=sizes)
            # After a mismatch, what any rank says natively comes of it.
            self._show(self._processes, during, guilty=-1 if isinstance(error, RankMismatch) else guilty)
            raise error from None
        if heard.silent:
            # Before the signal that asks for stacks, which may wake up a rank that then goes on.
            journals = self._journals(called)
            stacks = _stacks(heard, called)
            self._show(self._processes, during)
            raise hung(self._timeout_s, stacks, journals, during=during)
        self._show(self._processes, during)
        refuse_uneven(heard.answers, lambda: self._journals(called), during=during)
        return {rank: heard.answers[rank].result for rank in ranks}

    def _journals(self, called: Mapping[int, Process]) -> dict[int, list[Call]]:
        return {rank: process.journal.calls() for rank, process in called.items()}

    def _hear_live(self, called: Mapping[int, Process], during: str, stuck: Standstill) -> Heard:
        def ask_to_end() -> None:
            for process in called.values():
                process.ask_to_end()

        outputs = [process.output for process in self._processes.values()]
        output = Live(outputs, lambda: self._show(self._processes, during, whole=True))
        with passed_on(ask_to_end, self._finish):
            return hear(called, self._timeout_s, on_event=self.on_event, look=output.look, stuck=stuck)

    def _show(
        self, processes: Mapping[int, Process], during: str, *, guilty: int | None = None, whole: bool = False
    ) -> None:
        lines = {rank: without_noise(process.output.new_lines(whole=whole)) for rank, process in processes.items()}
        if guilty is not None:
            lines = {rank: text if rank == guilty else _before_the_echo(text) for rank, text in lines.items()}
        for ranks, line in grouped(lines):
            self.on_output(f"{label(ranks, during)} {line}".rstrip())

    def _end(self, error: BaseException | None) -> None:
        self._finish()
        del self._store


def _stacks(heard: Heard, called: Mapping[int, Process]) -> dict[int, str]:
    for rank in heard.silent:
        called[rank].stack.ask(called[rank].pid)
    deadline = time.monotonic() + _STACKS_S
    return {rank: called[rank].where(deadline) for rank in sorted(heard.silent)}


def _before_the_echo(lines: Sequence[str]) -> list[str]:
    """What an innocent rank printed before torch logged, at length, that it had lost a peer."""
    end = next((i for i, line in enumerate(lines) if NATIVE_LOG.match(line)), len(lines))
    return list(lines[:end])


def _end_all(processes: dict[int, Process], owner: int) -> None:
    if os.getpid() != owner:
        return  # a copy of this object in a fork of the owner
    everyone: Iterable[Process] = list(processes.values())
    for process in everyone:
        process.kill()
    for process in everyone:
        process.bury()
    processes.clear()
