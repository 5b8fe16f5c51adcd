"""Ranks that torchrun has started: rank 0 leads, the others follow."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import time
from collections import Counter
from typing import Any, Self

from shardproof.errors import InvariantError, RankDied, RankError, RankHung, RankMismatch, StrategyError, UsageError
from shardproof.ranks import noise, oom
from shardproof.ranks.answer import perform
from shardproof.ranks.blame import cause
from shardproof.ranks.explained import Standstill, explained, hung, never_came, refuse_uneven
from shardproof.ranks.follow import ANSWERS, BYE, STACKS, STOP, call_key, follow, here_key, stack_key
from shardproof.ranks.heard import Heard
from shardproof.ranks.interface import choose_interface
from shardproof.ranks.journal import Call
from shardproof.ranks.last_words import LastWords
from shardproof.ranks.launch import Launch
from shardproof.ranks.mismatch import told_waiting, who_waits
from shardproof.ranks.overhear import own_journal
from shardproof.ranks.own_part import OwnPart
from shardproof.ranks.place import Place, Rendezvous
from shardproof.ranks.pool import Ranks
from shardproof.ranks.preload import preload
from shardproof.ranks.told import Told
from shardproof.ranks.wire import Wire, store

_POLL_S = 0.02
_STACKS_S = 3.0
"""How long stuck ranks may take to say where they are."""
_LOST_S = 0.25
"""The same where one has lost a peer."""
_ENDING_S = 1.0
"""How long after a SIGTERM ranks may still say that they have lost a peer, which is why the launcher sends it."""
_LOOK_S = 1.0
"""How long ranks that may be at work have to answer, while nothing is known to be wrong."""
_AGAIN_S = 3.0
"""How long after that they are asked once more, while this rank waits: one may call something else only later."""
_BYE_S = 5.0
"""How long a leader that hosts the store keeps it open for those who have not read their last message."""
_pools = itertools.count()
"""Every process of the launch runs the same program, so the n-th `start` of one meets the n-th of the others."""


class JoinedRanks(Ranks):
    """The processes of a launch by torchrun. Output goes where torchrun sends it.

    Rank 0 calls. On every other rank `with` serves until rank 0 is done, and `leader` is False after that: the caller
    has nothing left to do there. The processes are torchrun's, so that a death is torchrun's to report; after an
    error the followers end with its exit code, a little later than the leader, which may have to say why.
    """

    def __init__(self, size: int, target: object, *, launch: Launch, timeout_s: float, device: str) -> None:
        super().__init__(size)
        if size > launch.world_size:
            raise StrategyError(
                f"{size} ranks are asked for, but the launcher has started {launch.world_size}; "
                f"use --nproc-per-node (times --nnodes) {size}, or ask for {launch.world_size} ranks at most"
            )
        self.leader = launch.rank == 0
        self._target, self._launch, self._timeout_s = target, launch, timeout_s
        preload()
        noise.silence()
        choose_interface(launch, os.environ)
        self._prefix = f"shardproof/{launch.attempt}/{next(_pools)}"
        self._wire = Wire(launch, self._prefix)
        self._place = Place(
            rank=launch.rank,
            size=size,
            local_rank=launch.local_rank,
            device_type=device,
            _rendezvous=Rendezvous(lambda: store(launch, self._prefix), local_size=min(size, launch.local_world_size)),
        )
        self._own: OwnPart | None = None
        if self.leader:
            self._own = OwnPart(self._perform)
            self._place = dataclasses.replace(self._place, _tell=self._own.tell)
        self._journal = own_journal()
        self._place = dataclasses.replace(self._place, _journal=self._journal)
        self._sent: Counter[int] = Counter()
        self._read = 0
        self._asked = 0
        self._oom_kills = oom.kills()
        self._last_words = LastWords()
        self._last_words.begin()

    def __enter__(self) -> Self:
        if not self.leader:
            watching = Wire(self._launch, self._prefix)
            follow(self._launch, self._wire, watching, self._perform, self._journal, self._last_words)
            self._last_words.end()
            self._ended = "have ended: only rank 0 calls, and it is done"
        return self

    def _perform(self, message: bytes) -> bytes:
        self._place.use_device()
        return perform(self._target, self._place, message)

    def _call(self, method: str, args: tuple[Any, ...], ranks: list[int], during: str, *, live: bool) -> dict[int, Any]:
        if self._own is None:
            raise UsageError(f"rank {self._launch.rank} cannot run {method}: only rank 0 calls, inside `with`")
        own = self._own
        message = pickle.dumps((method, args))
        for rank in ranks:
            if rank == 0:
                self._own.send(message)
            else:
                self._sent[rank] += 1
                self._wire.send(call_key(rank, self._sent[rank]), message)
        stuck = Standstill(
            lambda: self._stacks(own, set(ranks), wait_s=_LOOK_S)[1],
            lambda: (self._journal.count(),),
            again_s=_AGAIN_S,
        )
        heard = self._hear(own, set(ranks), live=live, stuck=stuck)
        found = cause(heard.answers, heard.deaths, during=during)
        if found is not None:
            guilty, error = found
            if guilty in heard.answers and heard.answers[guilty].echo:
                error = self._whom_it_lost(own, guilty, error, heard, during)
            raise error from None
        if self._last_words.told_at is not None:
            self._last_words.end()
        if heard.silent:
            stacks, journals = self._stacks(own, heard.silent)
            away = [rank for rank in sorted(heard.silent - {0}) if self._wire.look(here_key(rank)) is None]
            if away:
                stacks |= dict.fromkeys(away, "  unknown: its process has not come as far as shardproof")
                raise RankHung(self._timeout_s, stacks, during=during, found=never_came(away))
            raise hung(self._timeout_s, stacks, journals, during=during)
        refuse_uneven(heard.answers, lambda: self._stacks(own, set(ranks))[1], during=during)
        return {rank: heard.answers[rank].result for rank in ranks}

    def _whom_it_lost(
        self, own: OwnPart, guilty: int, error: RankError | UsageError | InvariantError, heard: Heard, during: str
    ) -> RankError | UsageError | InvariantError:
        """A rank has lost a peer: the one that does not even say where it is, or the mismatch that came before."""
        _, asked = self._stacks(own, set(heard.silent), wait_s=_LOST_S)
        journals = {rank: answer.calls for rank, answer in heard.answers.items() if answer.echo} | asked
        error = explained(error, journals, during=during, sizes=True)
        gone = sorted(heard.silent - set(asked))
        # Several may be a whole machine, and some of them may have been ended by the launcher for the sake of one.
        if isinstance(error, RankMismatch) or len(gone) != 1:
            return error
        said = [f"its process does not answer any more, and rank {guilty} has lost it; the launcher knows how it ended"]
        if kills := oom.grown(self._oom_kills, oom.kills()):
            said.append(kills)
        if waiting := who_waits({**journals, gone[0]: ()}):
            said.append(told_waiting(waiting))
        return RankDied(gone[0], "; ".join(said), during=during)

    def _hear(self, own: OwnPart, ranks: set[int], *, live: bool, stuck: Standstill) -> Heard:
        heard = Heard(silent=ranks)
        deadline = time.monotonic() + self._timeout_s
        while heard.silent and time.monotonic() < deadline:
            spoken = self._listen(own, heard)
            if live and spoken and not heard.trouble:
                deadline = time.monotonic() + self._timeout_s
            elif not spoken and not heard.trouble and stuck():
                break
            deadline = min(deadline, heard.patience())
            if (told_at := self._last_words.told_at) is not None:
                deadline = min(deadline, told_at + _ENDING_S)
        return heard

    def _listen(self, own: OwnPart, heard: Heard) -> bool:
        """Takes what there is to hear; False where that is nothing."""
        said: bytes | Told | None = None
        if 0 in heard.silent:
            said = own.next(_POLL_S)
        else:
            time.sleep(_POLL_S / 10)
        if isinstance(said, Told):
            self.on_event(said.rank, said.event)
        elif said is not None:
            heard.answer(pickle.loads(said))
        spoken = said is not None
        while (answer := self._wire.receive(f"{ANSWERS}/{self._read + 1}")) is not None:
            self._read += 1
            heard.answer(pickle.loads(answer))
            spoken = True
        return spoken

    def _stacks(
        self, own: OwnPart, asked: set[int], wait_s: float = _STACKS_S
    ) -> tuple[dict[int, str], dict[int, list[Call]]]:
        """Where the ranks are, and what each of those that still answer has called."""
        self._asked += 1
        asking = str(self._asked).encode()
        self._wire.send(STACKS, asking)
        stacks = {0: own.stack()} if 0 in asked else {}
        journals = {0: self._journal.calls()} if 0 in asked else {}
        deadline = time.monotonic() + wait_s
        while len(stacks) < len(asked) and time.monotonic() < deadline:
            for rank in asked - set(stacks):
                told = self._wire.receive(stack_key(rank, asking))
                if told is not None:
                    stacks[rank], journals[rank] = pickle.loads(told)
            time.sleep(_POLL_S)
        unknown = "  unknown: it does not answer, perhaps its process is gone"
        return {rank: stacks.get(rank, unknown) for rank in asked}, journals

    def _end(self, error: BaseException | None) -> None:
        if self._own is None:
            return
        self._own.close()
        if error is None:
            self._last_words.end()
        code = 0 if error is None else getattr(error, "exit_code", 1)
        self._wire.send(STOP, str(code).encode())
        if self._launch.agent_store:
            return
        deadline = time.monotonic() + _BYE_S
        followers = self._launch.world_size - 1
        while time.monotonic() < deadline and self._wire.look(f"{BYE}/{followers}") is None and followers:
            time.sleep(_POLL_S)
