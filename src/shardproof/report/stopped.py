"""What kept a check from a verdict, as plain data: a rank that failed, died or hung, or wrong use."""

from __future__ import annotations

from dataclasses import dataclass

from shardproof.errors import RankDied, RankError, RankFailed, RankLost, ShardproofError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """The error that a check ended with."""

    kind: str
    """Class of the error, as `RankFailed`."""

    message: str
    """What the command line prints."""

    exit_code: int
    """What the command line ends with: 2 for wrong use, 3 for a rank that did not come back."""

    crashed: bool
    """Whether a rank did not come back, rather than that something was wrong before ranks worked."""

    during: str = ""
    """What was being done, as `tp_fsdp` or `the comparison of tp_fsdp`; empty where that is not known."""

    rank: int | None = None
    """The rank at fault."""

    file: str | None = None
    """Of the user's own code, where an exception of it is the cause."""

    line: int | None = None
    """Line in `file`, from 1."""


def stopped(error: ShardproofError) -> Stopped:
    """What `error` says, as data."""
    failure = error.failure if isinstance(error, RankFailed) else None
    rank = error.rank if isinstance(error, RankDied | RankLost) else None
    return Stopped(
        kind=type(error).__name__,
        message=str(error),
        exit_code=error.exit_code,
        crashed=isinstance(error, RankError),
        during=str(getattr(error, "during", "")),
        rank=rank if failure is None else failure.rank,
        file=None if failure is None else failure.file,
        line=None if failure is None else failure.line,
    )
