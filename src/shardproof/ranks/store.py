"""The store in which the ranks of one machine find each other."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from shardproof.ranks.place import FOREVER

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_HOST = "127.0.0.1"


def host_store() -> tuple[Store, int]:
    """A store that this process holds, and its port."""
    from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415  (the room must be importable without torch)

    # A socket of ours, as the store's own would listen on every network. Port 0 is any free one: never "in use".
    listening = socket.socket()
    listening.bind((_HOST, 0))
    listening.listen(socket.SOMAXCONN)
    port = listening.getsockname()[1]
    store = TCPStore(
        _HOST, port, is_master=True, timeout=FOREVER, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    return store, port


def join_store(port: int) -> Store:
    """A connection to the store that another process of this machine holds."""
    from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415  (the room must be importable without torch)

    return TCPStore(_HOST, port, is_master=False, timeout=FOREVER, wait_for_workers=False)
