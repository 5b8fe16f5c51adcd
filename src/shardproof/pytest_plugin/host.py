"""The host process, and the end of it that pytest's own process holds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, Pipe
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from shardproof.errors import UsageError
from shardproof.pytest_plugin.messages import Crew, Order, Ran
from shardproof.pytest_plugin.prompt import Terminal
from shardproof.ranks.output import flush
from shardproof.ranks.preload import preload
from shardproof.ranks.serve import outlive_nobody

if TYPE_CHECKING:
    from shardproof.pytest_plugin.crew import Ranks

_FINISH = "finish"
_END_S = 5.0
"""How long the host may take to end its ranks."""


class Host:
    """The host as pytest's process sees it. Forked when it is made: the session's tests must be collected by then."""

    def __init__(self, session: pytest.Session, device: str, terminal: Terminal | None) -> None:
        self._connection, theirs = Pipe()
        self._busy = False
        parent = os.getpid()
        flush()
        with warnings.catch_warnings():
            # Only the thread that forks lives on in the host, which takes no lock that another could hold.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
            self._pid: int | None = os.fork()
        if self._pid == 0:
            try:
                outlive_nobody(parent)
                self._connection.close()
                _serve(_Crews(session, device, terminal), theirs)
            except BaseException:  # noqa: BLE001  (whatever it is, it must not unwind into pytest's copy of the stack)
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()

    def run(self, order: Order) -> Ran:
        """Runs a test on its crew. Raises `UsageError` where there can be no such crew."""
        answer = self._ask(order)
        if isinstance(answer, UsageError):
            raise answer
        ran: Ran = answer
        return ran

    def finish(self) -> dict[int, str]:
        """Tears down the fixtures that are still alive on ranks; rank -> what went wrong."""
        if self._busy or self._pid is None:
            return {}
        errors = self._ask(_FINISH)
        return errors if isinstance(errors, dict) else {}

    def close(self) -> None:
        """Ends the host and all ranks, whatever they are doing. Does nothing the second time."""
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        self._connection.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + _END_S
            while time.monotonic() < deadline:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.005)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _ask(self, message: Order | str) -> Any:
        self._busy = True
        try:
            self._connection.send(message)
            answer = self._connection.recv()
        except (EOFError, OSError):
            return UsageError("the process that starts the ranks is gone (killed, or out of memory): run pytest again")
        self._busy = False
        return answer


class _Crews:
    """The crews that are warm, in the host."""

    def __init__(self, session: pytest.Session, device: str, terminal: Terminal | None) -> None:
        self._session, self._device, self._terminal = session, device, terminal
        self._warm: dict[Crew, Ranks] = {}
        self._errors: dict[int, str] = {}
        """Rank -> what went wrong when fixtures were torn down that no test was left for."""

    def run(self, order: Order) -> Ran | UsageError:
        from shardproof.pytest_plugin.crew import Ranks  # noqa: PLC0415  (needs torch, once there is a test to run)

        crew = order.crew
        try:
            if crew not in self._warm:
                preload()
                self._warm[crew] = Ranks(self._session, crew, _device(self._device, crew.size), self._terminal)
        except UsageError as error:
            return error
        ranks = self._warm[crew]
        ran = ranks.run(order)
        if not ranks.fit:
            if ranks.orderly:
                self._errors |= ranks.finish()
            self._warm.pop(crew).close()
        return ran

    def finish(self) -> dict[int, str]:
        for ranks in self._warm.values():
            self._errors |= ranks.finish()
        return self._errors

    def close(self) -> None:
        while self._warm:
            self._warm.popitem()[1].close()


def _serve(crews: _Crews, connection: Connection) -> None:
    """Runs what is asked for until pytest's process is done or gone."""

    def end(number: int, frame: FrameType | None) -> None:
        crews.close()
        os._exit(0)

    # Ctrl-C is for pytest's process, which then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    signal.set_wakeup_fd(-1)
    owner = os.getpid()
    try:
        while True:
            message = connection.recv()
            answer = crews.finish() if message == _FINISH else crews.run(message)
            connection.send(answer)
    except (EOFError, OSError):
        pass
    finally:
        if os.getpid() == owner:
            crews.close()
            sys.stdout.flush()


def _device(asked: str, size: int) -> str:
    """`cuda` where each rank can have a GPU of its own, unless the user says otherwise."""
    if asked != "auto":
        return asked
    # Counts without starting CUDA, which would be unusable in forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch  # noqa: PLC0415  (pytest's own process must not load it)

    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= size else "cpu"
