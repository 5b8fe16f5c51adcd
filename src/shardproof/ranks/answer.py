"""What a rank says at the end of a call."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardproof import errors
from shardproof.errors import Failure, InvariantError, UsageError
from shardproof.ranks.failure import describe, only_waited
from shardproof.ranks.journal import Call, Tally
from shardproof.ranks.place import Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Exactly one of a result, a failure and an error that goes to the caller as it is."""

    rank: int
    result: Any = None
    failure: Failure | None = None
    verdict: UsageError | InvariantError | None = None
    """Not the rank failed: what it was asked to do is wrong, or it found replicas that differ."""
    echo: bool = False
    """Whether the failure says only that a peer was lost, so that the cause is elsewhere."""
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    """Process group -> what this rank called on it; of a call that went well."""
    calls: Sequence[Call] = ()
    """Of an echo: what this rank called last."""

    @property
    def good(self) -> bool:
        """Whether the call went well on this rank."""
        return self.failure is None and self.verdict is None


def perform(target: object, place: Place, message: bytes) -> bytes:
    """Runs the pickled (method, args) on `target`; the pickled `Answer`. Never raises."""
    try:
        method, args = pickle.loads(message)
        result = getattr(target, method)(place, *args)
        return pickle.dumps(Answer(rank=place.rank, result=result, tallies=place.tallies()))
    except BaseException as error:  # noqa: BLE001  (sys.exit and KeyboardInterrupt in user code are failures as well)
        return pickle.dumps(_answer(error, place))


def _answer(error: BaseException, place: Place) -> Answer:
    if isinstance(error, UsageError | InvariantError):
        return Answer(rank=place.rank, verdict=_portable(error))
    echo = only_waited(error)
    calls = place.calls() if echo else ()
    return Answer(rank=place.rank, failure=describe(error, place.rank), echo=echo, calls=calls)


def _portable(error: UsageError | InvariantError) -> UsageError | InvariantError:
    """`error`, or its nearest base among shardproof's own errors where the class itself does not pickle."""
    if isinstance(error, InvariantError):
        # What it holds is plain data, whatever class it is of.
        return InvariantError(error.violations)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (a user's class may raise anything on its way through pickle)
        nearest = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        rebuilt: UsageError | InvariantError = nearest(str(error))
        return rebuilt
    return error
