"""What all ranks can do, wherever their processes came from."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from shardproof.errors import UsageError


def ignore(rank: int, event: object) -> None:
    """What happens to the ranks' events unless `Ranks.on_event` says otherwise."""


def write_to_stderr(line: str) -> None:
    """Where the ranks' output goes unless `Ranks.on_output` says otherwise."""
    print(line, file=sys.stderr, flush=True)


class Ranks(ABC):
    """Processes that each hold the same target and run its methods together."""

    size: int
    """Number of ranks."""

    leader: bool = True
    """Whether this process may call. False only on torchrun's ranks above 0, whose work is done after `with`."""

    on_output: Callable[[str], None]
    """Gets each line that user code printed on the ranks, labelled and without its newline. Set it as you like."""

    on_event: Callable[[int, object], None]
    """Gets each event that a rank has passed to `Place.tell`, with the rank. Called in the thread that calls `call`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.on_event = ignore
        self.on_output = write_to_stderr
        self._ended: str | None = None

    def call(
        self, method: str, *args: Any, ranks: Iterable[int] | None = None, during: str = "", live: bool = False
    ) -> dict[int, Any]:
        """Runs `target.method(place, *args)` on `ranks` (all by default) at once; rank -> what it returned.

        Arguments and results are pickled: plain data, never tensors. `during` names the work in messages.

        `live` is for work of hours: what ranks print is shown while they run, the time limit counts from the last
        event or answer of any rank (`Place.tell` at least once in that time), and a SIGTERM is passed on to the
        ranks, which may end their work and answer; a second one ends everything at once. Signals are left alone
        outside the main thread and where somebody else handles SIGTERM. Under torchrun, which forwards signals and
        output itself, only the time limit changes.

        Raises `RankFailed`, `RankDied` or `RankHung`; a `UsageError` or `InvariantError` that a rank raised comes back
        as it was. After any error the ranks are ended. Raises `UsageError` where they have ended already.
        """
        if self._ended is not None:
            raise UsageError(f"cannot run {method} on ranks that {self._ended}; start new ones")
        chosen = sorted(set(range(self.size) if ranks is None else ranks))
        if not chosen or chosen[0] < 0 or chosen[-1] >= self.size:
            raise UsageError(f"cannot run {method} on ranks {chosen}: there are ranks 0 to {self.size - 1}")
        try:
            return self._call(method, args, chosen, during, live=live)
        except BaseException as error:
            self._end(error)
            self._ended = f"were ended by an earlier {type(error).__name__}"
            raise

    def close(self) -> None:
        """Ends every rank. Does nothing the second time."""
        if self._ended is None:
            self._ended = "are closed"
            self._end(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _call(
        self, method: str, args: tuple[Any, ...], ranks: list[int], during: str, *, live: bool
    ) -> dict[int, Any]: ...

    @abstractmethod
    def _end(self, error: BaseException | None) -> None:
        """Leaves no process and no file behind. `error` is why, None at an ordinary end."""
