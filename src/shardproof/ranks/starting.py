"""The way in: ranks of our own, or those that torchrun has started already."""

from __future__ import annotations

import os

from shardproof.errors import UsageError
from shardproof.ranks.forked import ForkedRanks
from shardproof.ranks.joined import JoinedRanks
from shardproof.ranks.launch import Launch
from shardproof.ranks.pool import Ranks


def start(size: int, target: object, *, timeout_s: float = 600.0, device: str = "cpu") -> Ranks:
    """`size` ranks that run the methods of `target`; use it in a `with` statement.

    `target` is any object. Forked ranks inherit it, so that its closures and lambdas work and nothing about it is
    pickled. Each method gets a `Place` first, then the arguments of the call. `timeout_s` is the time limit of one
    call, in seconds. `device` is "cpu" or "cuda".

    Under torchrun (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) every process
    of the launch calls this, rank 0 leads, and the others serve inside the `with` statement; see `Ranks.leader`.

    Raises `UsageError` for a bad size or device and where a fork is not safe, `StrategyError` where torchrun has
    started fewer ranks than `size`.
    """
    if size < 1:
        raise UsageError(f"ranks={size}: a run needs at least 1 rank")
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"device={device!r}: ranks run on 'cpu' or 'cuda'")
    if timeout_s <= 0:
        raise UsageError(f"timeout={timeout_s:g}: the time limit of a call is a number of seconds above 0")
    launch = Launch.of(os.environ)
    if launch is not None:
        return JoinedRanks(size, target, launch=launch, timeout_s=timeout_s, device=device)
    return ForkedRanks(size, target, timeout_s=timeout_s, device=device)
