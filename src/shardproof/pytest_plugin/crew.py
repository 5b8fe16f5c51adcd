"""The host's side: the ranks of one crew, and what came back from them."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from shardproof.errors import UsageError
from shardproof.pytest_plugin.hung import without_runners
from shardproof.pytest_plugin.messages import Crew, Finished, Order, Ran, Reported, Stopped, Warned
from shardproof.pytest_plugin.prompt import Terminal
from shardproof.pytest_plugin.rank import RankSide
from shardproof.pytest_plugin.streams import Files
from shardproof.ranks.answer import Answer
from shardproof.ranks.blame import Death
from shardproof.ranks.explained import Standstill
from shardproof.ranks.heard import AFTER_AN_ECHO_S, Heard
from shardproof.ranks.journal import Call
from shardproof.ranks.mismatch import first_mismatch, told_mismatch
from shardproof.ranks.noise import without_noise
from shardproof.ranks.output import flush
from shardproof.ranks.place import Place, Rendezvous
from shardproof.ranks.process import Process
from shardproof.ranks.scratch import home_of_sockets, scratch_folder
from shardproof.ranks.store import host_store, join_store
from shardproof.ranks.supervise import hear

AFTER_A_FAILURE_S = 5.0
"""How long other ranks may take to end a test that has failed on one: they may be about to fail alike, or may wait for
it in a collective for ever."""
_STACKS_S = 2.0
_FINISH_S = 20.0
"""How long fixtures may take to be torn down at the end of a crew."""


@dataclass(slots=True, kw_only=True)
class _Heard(Heard):
    """What ranks have said about a test: a failure is no end of the rank, but others may wait for it."""

    ran: Ran = field(default_factory=Ran)
    debugged: bool = False
    """Whether somebody may sit at a prompt on one of the ranks, which nobody must take away."""

    def tell(self, rank: int, event: object) -> None:
        if isinstance(event, Reported):
            self.ran.reports.setdefault(rank, []).append(event)
        elif isinstance(event, Warned):
            self.ran.warned.setdefault(rank, []).append(event)
        elif isinstance(event, Stopped):
            self.ran.stopped = event.reason

    @property
    def failures(self) -> list[Reported]:
        return [report for of_rank in self.ran.reports.values() for report in of_rank if report.failed]

    def patience(self) -> float:
        if self.debugged and not self.deaths:
            return float("inf")
        if not (self.trouble or self.failures or self.ran.stopped):
            return float("inf")
        only_echoes = not self.trouble and bool(self.failures) and all(report.echo for report in self.failures)
        return time.monotonic() + (AFTER_AN_ECHO_S if only_echoes else AFTER_A_FAILURE_S)


class Ranks:
    """The processes of one crew, warm until one of them is lost."""

    def __init__(self, session: pytest.Session, crew: Crew, device: str, terminal: Terminal | None) -> None:
        self.fit = True
        self.orderly = True
        self._debugged = terminal is not None
        self._store, port = host_store()
        rendezvous = Rendezvous(lambda: join_store(port), local_size=crew.size)
        self._files = {rank: Files() for rank in range(crew.size)}
        target = RankSide(session, crew, port, self._files, terminal)
        flush()
        self._processes: dict[int, Process] = {}
        self._scratch = ExitStack()
        with home_of_sockets(self._scratch.enter_context(scratch_folder())):
            for rank in range(crew.size):
                place = Place(rank=rank, size=crew.size, local_rank=rank, device_type=device, _rendezvous=rendezvous)
                try:
                    self._processes[rank] = Process(place, target, elders=list(self._processes.values()))
                except OSError as error:
                    self.close()
                    raise UsageError(
                        f"cannot start rank {rank} of {crew.size}: {error}; ask for fewer ranks"
                    ) from error

    def run(self, order: Order) -> Ran:
        """Runs a test. After it, `fit` says whether another can be run here, `orderly` whether all ranks have ended."""
        before = {rank: process.journal.count() for rank, process in self._processes.items()}
        heard = self._call("run", order, order.limit_s, before)
        ran = heard.ran
        ran.deaths = _told(heard.deaths)
        for rank, said in heard.answers.items():
            if said.failure:
                (ran.lost if said.echo else ran.broken)[rank] = said.failure.traceback
        if heard.silent or heard.trouble or heard.failures:
            # gloo aborts a rank whose peer sends more or less than it does; a failure of the test's own may come after
            # sizes that the backend forgave.
            sizes = bool(heard.deaths) or any(said.echo for said in heard.failures)
            mismatch = first_mismatch(self._journals(before), sizes=sizes)
            if mismatch is not None:
                ran.mismatch, ran.mismatched = told_mismatch(mismatch, ""), mismatch.guilty
        ran.late = bool(heard.silent) and not ran.mismatch and not (heard.trouble or heard.failures or ran.stopped)
        ran.stacks = self._stacks(heard.silent)
        self.orderly = not (heard.silent or heard.trouble or heard.ran.stopped or any(r.echo for r in heard.failures))
        self.fit = self.orderly and self._all_fit(heard)
        ran.output = {rank: self._said(rank, dead=rank in ran.deaths) for rank in self._processes}
        return ran

    def finish(self) -> dict[int, str]:
        """Tears down what fixtures are still alive; rank -> what went wrong."""
        heard = self._call("finish", None, _FINISH_S, {})
        late = dict.fromkeys(heard.silent, f"fixtures were not torn down within {_FINISH_S:g} s")
        broken = {rank: said.failure.traceback for rank, said in heard.answers.items() if said.failure}
        return late | broken | _told(heard.deaths)

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.bury()
        for files in self._files.values():
            files.close()
        self._scratch.close()

    def _call(self, method: str, order: Order | None, limit_s: float | None, before: Mapping[int, int]) -> _Heard:
        message = pickle.dumps((method, () if order is None else (order,)))
        for process in self._processes.values():
            process.send(message)
        heard = _Heard(silent=set(self._processes), debugged=self._debugged)
        limit = float("inf") if limit_s is None else limit_s
        stuck = Standstill(
            lambda: self._journals(before), lambda: [process.journal.count() for process in self._processes.values()]
        )
        hear(self._processes, limit, on_event=heard.tell, heard=heard, stuck=lambda: not self._debugged and stuck())
        return heard

    def _journals(self, before: Mapping[int, int]) -> dict[int, list[Call]]:
        """What each rank has called since the test began: what earlier ones did is over."""
        return {rank: process.journal.calls(before.get(rank, 0)) for rank, process in self._processes.items()}

    def _all_fit(self, heard: _Heard) -> bool:
        answers: list[Answer] = list(heard.answers.values())
        ends = [answer.result for answer in answers if isinstance(answer.result, Finished)]
        kept = {end.kept for end in ends}
        # A group that outlives a failed test may still carry what its ranks had in flight.
        return len(kept) == 1 and all(end.fit for end in ends) and not (heard.failures and kept == {True})

    def _stacks(self, silent: set[int]) -> dict[int, str]:
        for rank in silent:
            self._processes[rank].stack.ask(self._processes[rank].pid)
        deadline = time.monotonic() + _STACKS_S
        return {rank: self._processes[rank].stack.read(deadline) for rank in sorted(silent)}

    def _said(self, rank: int, *, dead: bool) -> list[str]:
        lines = without_noise(self._processes[rank].output.new_lines())
        if dead:
            lines = [
                line for text in self._files[rank].text().values() for line in text.splitlines()
            ] + without_runners(lines)
        return lines


def _told(deaths: Mapping[int, Death]) -> dict[int, str]:
    return {rank: f"{death.how}, at {death.at}" if death.at else death.how for rank, death in deaths.items()}
