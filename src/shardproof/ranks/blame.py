"""From what every rank said, or did not say, to the one error worth raising."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from shardproof.errors import InvariantError, RankDied, RankError, RankFailed, UsageError
from shardproof.ranks.answer import Answer

_SIGNALS = {
    "SIGTERM": "it was asked to end",
    "SIGSEGV": "a crash in native code",
    "SIGABRT": "native code gave up",
    "SIGBUS": "a crash in native code, or shared memory (/dev/shm) is full",
    "SIGFPE": "a division by zero in native code",
    "SIGILL": "native code built for another processor",
}
"""What each signal commonly means to someone who trains models."""


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of the end of a rank's process."""

    how: str
    at: str = ""
    """The user's line where it ended, where that is known."""
    stack: str = ""


def cause(
    answers: Mapping[int, Answer], deaths: Mapping[int, Death], *, during: str
) -> tuple[int, RankError | UsageError | InvariantError] | None:
    """The guilty rank and the error to raise: the lowest rank that is no mere echo. None where all went well."""
    bad = [answer for answer in answers.values() if not answer.good]
    suspects = [(answer.echo, answer.rank) for answer in bad] + [(False, rank) for rank in deaths]
    if not suspects:
        return None
    _, rank = min(suspects)
    if rank in deaths:
        death = deaths[rank]
        return rank, RankDied(rank, death.how, during=during, at=death.at, stack=death.stack)
    guilty = answers[rank]
    if guilty.failure is not None:
        return rank, RankFailed(guilty.failure, during=during)
    return rank, guilty.verdict or UsageError("a rank failed without saying why")


def how_it_ended(exit_code: int | None, *, killed: str = "out of memory, or killed by hand") -> str:
    """The end of a process in words; `exit_code` is negative for signals, None where nobody knows.

    `killed` says what may have sent a SIGKILL.
    """
    if exit_code is None:
        return "its process is gone, and its exit code with it"
    if exit_code >= 0:
        return f"its process exited with code {exit_code} in the middle of the call"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        return f"killed by signal {-exit_code}"
    meaning = killed if name == "SIGKILL" else _SIGNALS.get(name)
    return f"killed by signal {-exit_code} ({name})" + (f": {meaning}" if meaning else "")
