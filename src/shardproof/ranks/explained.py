"""From the errors of ranks to those that say more, by what each rank has called."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from shardproof.errors import InvariantError, RankError, RankHung, RankMismatch, UsageError
from shardproof.ranks.answer import Answer
from shardproof.ranks.failure import is_user_code
from shardproof.ranks.journal import SLOTS, Call
from shardproof.ranks.mismatch import (
    first_mismatch,
    told_mismatch,
    told_spot,
    told_waiting,
    uneven_groups,
    who_waits,
)
from shardproof.ranks.output import numbers
from shardproof.ranks.stacks import innermost, user_line

STANDSTILL_S = 1.0
"""How often a supervisor looks whether ranks still call collectives."""

_REST = 10
"""How much longer it leaves them alone than it has looked."""

Journals = Mapping[int, Sequence[Call]]


def explained(
    error: RankError | UsageError | InvariantError, journals: Journals, *, during: str, sizes: bool
) -> RankError | UsageError | InvariantError:
    """`error`, or the mismatch that came before it. `sizes` as in `first_mismatch`."""
    mismatch = first_mismatch(journals, sizes=sizes) if isinstance(error, RankError) else None
    if mismatch is None:
        return error
    first, _, _ = str(error).partition("\n")
    return RankMismatch(mismatch.guilty, f"{told_mismatch(mismatch, during)}\nWhat came of it: {first}")


def hung(timeout_s: float, stacks: dict[int, str], journals: Journals, *, during: str) -> RankHung | RankMismatch:
    """The error where ranks have not answered: those of `stacks`."""
    mismatch = first_mismatch(journals, sizes=True)
    if mismatch is not None:
        came = f"ranks {numbers(stacks)} would never have answered"
        return RankMismatch(mismatch.guilty, f"{told_mismatch(mismatch, during)}\nWhat came of it: {came}")
    return RankHung(timeout_s, stacks, during=during, found=_who_hangs(stacks, journals))


def refuse_uneven(answers: Mapping[int, Answer], journals: Callable[[], Journals], *, during: str) -> None:
    """Raises `RankMismatch` where all went well, but ranks called different collectives, which nobody noticed.

    `journals` is asked only then.
    """
    if not uneven_groups({rank: answer.tallies for rank, answer in answers.items()}):
        return
    known = journals()
    mismatch = first_mismatch(known, sizes=False)
    if mismatch is not None:
        raise RankMismatch(mismatch.guilty, told_mismatch(mismatch, during))
    waiting = who_waits(known)
    where = f" in {during}" if during else ""
    if waiting is not None:
        raise RankMismatch(
            waiting.missing, f"ranks called a different number of collectives{where}: {told_waiting(waiting)}"
        )
    raise RankMismatch(
        tuple(sorted(known)),
        f"ranks called different collectives{where}, more than {SLOTS} calls before the end, which is as many as are "
        "kept; use fewer steps to see which",
    )


def never_came(ranks: Sequence[int], within: str = "") -> str:
    """Of processes of a launch that shardproof has not heard of."""
    few = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {numbers(ranks)} have"
    return (
        f"{few} not come{within}: the launcher started a process that ended, or still works, before shardproof was "
        "called in it, as in an import, or in a branch for some ranks only"
    )


class Standstill:
    """Notices that ranks have called different collectives, long before the time limit of a call."""

    def __init__(
        self, journals: Callable[[], Journals], counts: Callable[[], Sequence[int]], *, again_s: float = math.inf
    ) -> None:
        """`counts` says how many each rank has called; where it knows of some only, look once more after `again_s`."""
        self._journals, self._counts, self._again_s = journals, counts, again_s
        self._before: Sequence[int] = ()
        self._look_at = math.inf
        self._next = time.monotonic() + STANDSTILL_S

    def __call__(self) -> bool:
        """To be called often; looks into the journals once nobody has called anything for a while."""
        now_s = time.monotonic()
        if now_s < self._next:
            return False
        self._next = now_s + STANDSTILL_S
        now = self._counts()
        if now != self._before:
            self._before, self._look_at = now, now_s
            return False
        if now_s < self._look_at:
            return False
        self._look_at = now_s + self._again_s
        found = first_mismatch(self._journals(), sizes=False) is not None
        # Of ranks on other machines journals take a while: a run whose every step has a pause is not to wait for them.
        self._next = max(self._next, time.monotonic() + _REST * (time.monotonic() - now_s))
        return found


def _who_hangs(stacks: Mapping[int, str], journals: Journals) -> str:
    """Who waits for whom, and where the others are."""
    waiting = who_waits(journals)
    if waiting is not None:
        parts = [_where(rank, stacks) for rank in waiting.missing]
        return "; ".join((*parts, told_waiting(waiting)))
    busy = [
        rank for rank, stack in stacks.items() if (spot := innermost(stack)) is not None and is_user_code(spot.file)
    ]
    return "; ".join(_where(rank, stacks) for rank in busy)


def _where(rank: int, stacks: Mapping[int, str]) -> str:
    if rank not in stacks:
        return f"rank {rank} is done"
    spot = user_line(stacks[rank])
    if spot is None:
        first = stacks[rank].strip().splitlines()[0]
        return f"rank {rank} is {first if first.startswith('stopped') else 'in no line of yours'}"
    return f"rank {rank} is at {told_spot(spot)}"
