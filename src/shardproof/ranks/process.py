"""The process of one forked rank, as the parent sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Pipe

from shardproof.ranks import oom
from shardproof.ranks.blame import Death, how_it_ended
from shardproof.ranks.journal import Journal
from shardproof.ranks.mismatch import told_spot
from shardproof.ranks.output import Caught
from shardproof.ranks.place import Place
from shardproof.ranks.serve import live, outlive_nobody
from shardproof.ranks.stacks import Stack, process_state, user_line


class Process:
    """A rank: its process, the pipe to it, what it prints, where it stands."""

    def __init__(self, place: Place, target: object, *, elders: Sequence[Process]) -> None:
        """Forks, or raises `OSError`. The rank must not hold open the pipes of `elders`, which were forked before."""
        self.rank = place.rank
        self.connection, theirs = Pipe()
        self.output = Caught()
        self.stack = Stack()
        self.journal = Journal()
        self._calls_before = 0
        self._oom_kills = oom.kills()
        self._exit_code: int | None = None
        self._reaped = False
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python warns of threads that hold locks during the fork; which threads there may be is checked before.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
            try:
                self.pid = os.fork()
            except OSError:
                theirs.close()
                self._give_back()
                raise
        if self.pid == 0:
            try:
                outlive_nobody(parent)
                for pipe in (self.connection, *(elder.connection for elder in elders)):
                    pipe.close()
                live(target, place, theirs, self.output, self.stack, self.journal)
            except BaseException:  # noqa: BLE001  (whatever it is, it must not unwind into the parent's copy of the stack)
                traceback.print_exc()
            finally:
                # Not sys.exit: that would run the parent's clean-up, atexit hooks included, once more in every rank.
                os._exit(1)
        theirs.close()
        # The rank does the same: whoever comes first, the group exists before anybody signals it.
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def send(self, message: bytes) -> None:
        """Hands the rank a call. A rank that is gone does not raise here: that shows while its answer is awaited."""
        self._calls_before = self.journal.count()
        with contextlib.suppress(OSError):
            self.connection.send_bytes(message)

    def gone(self, *, wait_s: float = 0.0) -> bool:
        """Whether the process has ended, waiting for its end up to `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        while not self._reaped:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._reaped = True  # somebody else has reaped it: SIGCHLD is ignored, or a wait for any child
                break
            if pid:
                self._reaped, self._exit_code = True, os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(0.005)
        return True

    def death(self) -> Death:
        """How a process that is gone has ended, and where, as far as it could leave word."""
        how = how_it_ended(self._exit_code, killed=oom.told(self._oom_kills, oom.kills()))
        stack = self.stack.left()
        if (spot := user_line(stack)) is not None:
            return Death(how, at=told_spot(spot), stack=stack)
        return Death(how + self._last_called(), stack=stack)

    def where(self, deadline: float) -> str:
        """The stack of a rank that `stack.ask` was called for."""
        if process_state(self.pid) == "T":
            return f"  stopped (by SIGSTOP or a debugger: SIGCONT lets it go on){self._last_called()}"
        return self.stack.read(deadline)

    def _last_called(self) -> str:
        """Ends a sentence: the user's line that called the last collective since `send`, or nothing."""
        calls = self.journal.calls(self._calls_before)
        spot = next((call.spot for call in reversed(calls) if call.spot is not None), None)
        return "" if spot is None else f"; your code last called a collective at {told_spot(spot)}"

    @property
    def exit_code(self) -> int | None:
        """Of a process that is gone: negative for a signal, None where somebody else has reaped it."""
        return self._exit_code

    def ask_to_end(self) -> None:
        """Sends SIGTERM to the rank alone: its own children, as data loaders, are the rank's to end."""
        if not self._reaped:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process and all that it has started, without waiting."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        if not self._reaped:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    def bury(self) -> None:
        """After `kill`: leaves no zombie, no pipe and no file."""
        if not self._reaped:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._reaped = True
        self._give_back()

    def _give_back(self) -> None:
        self.connection.close()
        self.output.close()
        self.stack.close()
        self.journal.close()
