"""Every error that shardproof raises on purpose, in one tree.

    ShardproofError
    ├── UsageError              wrong use or a broken experiment; exit code 2
    │   ├── ExperimentError     the experiment cannot be loaded, built or trained on one device
    │   │   └── PatternError    a name pattern of the experiment matches nothing
    │   ├── StrategyError       a strategy that does not fit the ranks, the data or the model
    │   ├── CheckpointError     a checkpoint that is missing, damaged, of another model, or cannot be written
    │   └── TraceError          a recording that is missing, damaged, of another version, or cannot be written
    ├── RankError               a rank did not come back; exit code 3
    │   ├── RankFailed          user code raised on a rank
    │   ├── RankDied            the process of a rank ended (a signal, os._exit, out of memory)
    │   ├── RankHung            no rank answered within the time limit
    │   ├── RankMismatch        ranks called different collectives
    │   └── RankLost            in a launch (torchrun), a peer of this rank is gone or does not answer
    ├── ParityError             layouts that should agree do not (also an AssertionError); exit code 1
    └── InvariantError          replicas that should hold the same bits do not (also an AssertionError); exit code 1

The exit codes are those of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ShardproofError(Exception):
    """Base of all errors that shardproof raises on purpose."""

    exit_code = 2


class UsageError(ShardproofError):
    """Wrong use: the message names the place, the values and the way out."""


class ExperimentError(UsageError):
    """The experiment itself is broken: it cannot be loaded, built or trained, even on one device."""


class PatternError(ExperimentError):
    """A name pattern of the experiment (`tp_plan`, `fsdp_units`, `placements`) matches nothing."""


class StrategyError(UsageError):
    """A strategy that does not fit the number of ranks, the batch or the model."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, unreadable or of another model, or that could not be written."""


class TraceError(UsageError):
    """A recording that is missing, unreadable, of another version or does not fit together, or that cannot be written.

    Of a recording of which some ranks can be read there is a partial answer instead.
    """


class RankError(ShardproofError):
    """A rank did not come back with an answer."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a rank knew about the exception that stopped it: plain data, so that it crosses a pipe."""

    rank: int
    type_name: str
    """Name of the exception's class, as `TypeError`."""
    message: str
    file: str
    """Innermost file of the user's own code (not of torch, not of shardproof), or the innermost file at all."""
    line: int
    traceback: str
    """The traceback from the first frame of the user's code on."""


class RankFailed(RankError):
    """User code raised on a rank. `failure` holds the rank, the user's file and line and the traceback."""

    def __init__(self, failure: Failure, *, during: str = "") -> None:
        self.failure = failure
        self.during = during
        where = f" in {during}" if during else ""
        super().__init__(
            f"rank {failure.rank} failed{where} at {failure.file}:{failure.line}: "
            f"{failure.type_name}: {failure.message}\n\n{failure.traceback.rstrip()}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_failed, (self.failure, self.during)


def _rebuild_failed(failure: Failure, during: str) -> RankFailed:
    return RankFailed(failure, during=during)


class RankDied(RankError):
    """The process of a rank ended before it answered: killed, out of memory, or `os._exit` in user code.

    `how` says how it ended and `at` where: a line of the user's code, with the rest of the stack below it, as far as
    either is known.
    """

    def __init__(self, rank: int, how: str, *, during: str = "", at: str = "", stack: str = "") -> None:
        self.rank, self.how, self.during, self.at, self.stack = rank, how, during, at, stack
        where = (f" in {during}" if during else "") + (f" at {at}" if at else "")
        below = f"\n\nWhere it was:\n\n{stack.rstrip()}" if stack else ""
        super().__init__(f"rank {rank} died{where}: {how}{below}")


class RankHung(RankError):
    """No answer within the time limit. `stacks` maps each rank to its Python stack at that moment.

    `found` says who waits for whom, as far as the ranks' collectives tell.
    """

    def __init__(self, timeout_s: float, stacks: dict[int, str], *, during: str = "", found: str = "") -> None:
        self.timeout_s, self.stacks, self.during, self.found = timeout_s, stacks, during, found
        where = f" in {during}" if during else ""
        shown = "\n\n".join(f"rank {rank}:\n{stack.rstrip()}" for rank, stack in sorted(stacks.items()))
        super().__init__(
            f"no answer{where} within {timeout_s:g} s{f': {found}' if found else ''}; "
            f"raise the limit with --timeout if the step is just slow. Where each rank was:\n\n{shown}"
        )


class RankMismatch(RankError):
    """Ranks of one process group called different collectives, or the same with other sizes, or in another order.

    `ranks` are those that differ from the others; all of them where there is no majority.
    """

    def __init__(self, ranks: tuple[int, ...], text: str) -> None:
        self.ranks = ranks
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return RankMismatch, (self.ranks, str(self))


class RankLost(RankError):
    """Under a launcher: a collective of this rank had no answer from a peer, which is gone or cannot be reached."""

    def __init__(self, rank: int, how: str, *, during: str = "", way_on: str = "") -> None:
        self.rank, self.how, self.during, self.way_on = rank, how, during, way_on
        where = f" in {during}" if during else ""
        super().__init__(
            f"rank {rank} lost a peer{where}: {how}; if that rank could still say why, it did so in its own output"
            + (f"\n{way_on}" if way_on else "")
        )


class ParityError(ShardproofError, AssertionError):
    """Layouts that should compute the same training do not. The text is the report, `report` the data."""

    exit_code = 1

    def __init__(self, report: object) -> None:
        self.report = report
        super().__init__(f"\n{report}")


SHOWN_VIOLATIONS = 8
"""Violations that an InvariantError's text lists: the first ones are what the others follow from."""


class InvariantError(ShardproofError, AssertionError):
    """Ranks that should hold the same bits do not. `violations` holds what `check_invariants` would have returned."""

    exit_code = 1

    def __init__(self, violations: Sequence[object]) -> None:
        self.violations = list(violations)
        shown = [f"  {violation}" for violation in self.violations[:SHOWN_VIOLATIONS]]
        if len(self.violations) > SHOWN_VIOLATIONS:
            shown.append(f"  and {len(self.violations) - SHOWN_VIOLATIONS} more")
        super().__init__("\n".join(["ranks that should hold the same do not:", *shown]))

    def __reduce__(self) -> tuple[object, ...]:
        return InvariantError, (self.violations,)
