"""The process group of a test, and when it is a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from shardproof.pytest_plugin.guard import Guard
from shardproof.pytest_plugin.messages import Order
from shardproof.ranks.place import Place


class World:
    """Each test gets a new default process group: what another has left in flight cannot reach it.

    Except where a fixture of a wider scope than the test is alive after it: that may hold on to groups, meshes and
    wrapped models, so that the group stays for as long as it does, and only groups that the test has made are left.
    """

    def __init__(self, port: int, guard: Guard) -> None:
        self._port, self._guard = port, guard
        self._open: AbstractContextManager[None] | None = None
        self._kept = False
        self._tests = 0

    @property
    def kept(self) -> bool:
        """Whether the group that is there now stays for the next test."""
        return self._open is not None and self._kept

    @contextmanager
    def entered(self, place: Place, order: Order) -> Iterator[None]:
        """Inside, the default group is there, as in a script that torchrun has started."""
        # Only now, when all ranks have ended the last test: a group that one rank leaves fails in all the others.
        if self._kept:
            self._guard.leave_groups()
        else:
            self.leave()
        self._tests += 1
        os.environ.update(_told(self._port, self._tests))
        if self._open is None:
            self._open = place.world("pytest", order.crew.size)
            self._open.__enter__()
        yield
        self._kept = bool(self._guard.alive)

    def leave(self) -> None:
        """Leaves the group. Ranks that still wait in it for this one then fail instead of hanging."""
        left, self._open = self._open, None
        if left is not None:
            left.__exit__(None, None, None)


def _told(port: int, attempt: int) -> dict[str, str]:
    """What torchrun tells its processes beside their ranks. The store is ours: `init_process_group()` finds it."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "shardproof",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # The prefix of the store's keys, so that no test reads another's.
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
