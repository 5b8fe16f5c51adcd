"""What every process of a launch would say alike, said by one of them."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

from shardproof.errors import UsageError
from shardproof.ranks.launch import Launch

_CONNECT = timedelta(seconds=5)
"""The launcher's own store listens before it starts any process."""


def first_to_say(text: str) -> bool:
    """Whether no other process of this launch has asked for the same text: the others need not say it again.

    True outside a launch, and where the launcher has no store of its own or it cannot be reached. Loads torch.
    """
    try:
        launch = Launch.of(os.environ)
    except UsageError:
        return True
    if launch is None or not launch.agent_store:
        return True
    from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415  (the room must be importable without torch)
    from torch.distributed import DistError  # noqa: PLC0415  (likewise)

    key = f"shardproof/{launch.attempt}/said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}"
    try:
        store = TCPStore(launch.host, launch.port, is_master=False, timeout=_CONNECT, wait_for_workers=False)
        return store.add(key, 1) == 1
    except (DistError, RuntimeError):
        return True
