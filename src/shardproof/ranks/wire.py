"""Messages between the processes of a torchrun launch, through the launch's own store."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import TYPE_CHECKING

from shardproof.errors import UsageError
from shardproof.ranks.launch import Launch
from shardproof.ranks.place import FOREVER

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

_CONNECT = timedelta(minutes=5)
"""How long the processes of a launch may take to start, one machine after the other."""


class Wire:
    """A connection of its own to the store: calls on one connection wait for each other, so each thread needs one.

    The bytes are pickles, as among the ranks of one training run anywhere in torch: whoever can write to the
    launch's store can run code in its processes.
    """

    def __init__(self, launch: Launch, prefix: str, *, connect: timedelta = _CONNECT) -> None:
        self._store = store(launch, prefix, connect=connect)

    def send(self, key: str, message: bytes) -> None:
        """Writes a message for whoever reads `key`."""
        self._store.set(key, message)  # type: ignore[arg-type]  # bytes are taken as they are; the stub knows str only

    def receive(self, key: str) -> bytes | None:
        """Takes the message under `key` away, or None where there is none yet."""
        message = self.look(key)
        if message is not None:
            self._store.delete_key(key)
        return message

    def look(self, key: str) -> bytes | None:
        """The message under `key`, which stays, or None where there is none yet."""
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def count(self, key: str) -> int:
        """One more than the last time that any process has asked, from 1 on."""
        return self._store.add(key, 1)


def store(launch: Launch, prefix: str, *, connect: timedelta = _CONNECT) -> Store:
    """The launch's store under `prefix`. Raises `UsageError` where rank 0 has to hold it and its port is in use.

    Raises torch's `DistNetworkError` where nobody holds it within `connect`.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # noqa: PLC0415  (the room must be importable without torch)

    if launch.rank == 0 and not launch.agent_store:
        _host(launch)
    client = TCPStore(launch.host, launch.port, is_master=False, timeout=connect, wait_for_workers=False)
    client.set_timeout(FOREVER)
    return PrefixStore(prefix, client)


@functools.cache  # once a process, and for as long as it lives: the ranks of the next `start` come here as well
def _host(launch: Launch) -> TCPStore:
    from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415  (the room must be importable without torch)
    from torch.distributed import DistNetworkError  # noqa: PLC0415  (likewise)

    try:
        return TCPStore(
            launch.host, launch.port, is_master=True, timeout=_CONNECT, wait_for_workers=False, multi_tenant=True
        )
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UsageError(
            f"MASTER_PORT={launch.port} is in use on this machine, so that rank 0 cannot listen there; end the other "
            "program, as a run that was left behind, or give all processes another port"
        ) from error
