"""The default process group of this very process, for a library that runs inside somebody else's program."""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from shardproof.errors import RankLost, UsageError
from shardproof.ranks.explained import never_came
from shardproof.ranks.interface import choose_interface
from shardproof.ranks.launch import Launch
from shardproof.ranks.place import Place, Rendezvous, leave
from shardproof.ranks.wire import Wire

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_meetings = itertools.count()
"""Every process of the launch runs the same program, so the n-th meeting of one is the n-th of the others."""
START_S = 300.0
"""How long the processes of a launch may take to join, at least: one loads its modules much later than another."""


class Here:
    """This process as a rank: of the group that it is in, else of its launcher's, else of a world of its own.

    Use it in a `with` statement, or call `close`. A group that was there before is used and left as it is. Under
    torchrun (see `Launch`) all processes of the launch join; where one of them is lost, collectives of the others
    raise within `timeout_s` seconds, as nobody else watches over them: see `failure.lost_peer`, and `limit_groups`.

    Raises `UsageError` for a device that is not there or that the group does not serve, `RankLost` where processes of
    the launch do not come within `START_S`, or `timeout_s` if that is longer.
    """

    place: Place
    """Where this process stands. It is in a world already: `Place.world` joins no other."""

    def __init__(self, device: str, *, timeout_s: float) -> None:
        import torch.distributed as dist  # noqa: PLC0415  (the room must be importable without torch)

        if device not in {"cpu", "cuda"}:
            raise UsageError(f"device={device!r}: ranks run on 'cpu' or 'cuda'")
        if timeout_s <= 0:
            raise UsageError(f"timeout={timeout_s:g}: the time limit of a collective is a number of seconds above 0")
        self._joined = not dist.is_initialized()
        self._timeout = timedelta(seconds=timeout_s)
        self._theirs = set() if self._joined else _groups()
        if not self._joined:
            self.place = _place_in_group(device)
        elif (launch := Launch.of(os.environ)) is not None:
            self.place = _join(launch, device, max(self._timeout, timedelta(seconds=START_S)))
        else:
            self.place = _alone(device)
        self.limit_groups()

    def limit_groups(self, *, but: ProcessGroup | None = None) -> None:
        """Gives the time limit to all process groups made since this object was. Call it when device meshes are made.

        A new group does not inherit the limit of the default one: torch gives it 10 minutes (NCCL) or 30. `but` is a
        group that keeps its own.
        """
        from torch.distributed.distributed_c10d import _set_pg_timeout  # noqa: PLC0415  (as above)

        for group in _groups() - self._theirs - {but}:
            _set_pg_timeout(self._timeout, group)

    def close(self, *, in_peace: bool = True) -> None:
        """Leaves the group that was joined here. Does nothing the second time.

        `in_peace` is False where something has failed: it then waits for no peer.
        """
        if self._joined:
            self._joined = False
            leave(in_peace=in_peace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(in_peace=error is None)


def _groups() -> set[ProcessGroup]:
    """All process groups that this process is in."""
    from torch.distributed import distributed_c10d  # noqa: PLC0415  (as above)

    return set(distributed_c10d._world.pg_map)


def _place_in_group(device: str) -> Place:
    import torch.distributed as dist  # noqa: PLC0415  (as above)

    served = [of_group.type for of_group in dist.group.WORLD._device_types] if dist.group.WORLD else []
    if device not in served:
        raise UsageError(
            f"device={device!r}, but the default process group of this process (backend {dist.get_backend()!r}) serves "
            f"{', '.join(served) or 'no device'}; initialize it with backend 'cpu:gloo,cuda:nccl', or leave that to me"
        )
    place = Place(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())),
        device_type=device,
    )
    place.use_device()
    return place


def _join(launch: Launch, device: str, timeout: timedelta) -> Place:
    import torch  # noqa: PLC0415  (as above)
    import torch.distributed as dist  # noqa: PLC0415

    choose_interface(launch, os.environ)
    _meet(launch, timeout)
    if device == "cpu" and launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # each rank would take all cores
    place = Place(
        rank=launch.rank,
        size=launch.world_size,
        local_rank=launch.local_rank,
        device_type=device,
        _rendezvous=Rendezvous(_in_one_already, local_size=launch.local_world_size),
    )
    place.use_device()
    dist.init_process_group(place.backend(), init_method="env://", timeout=timeout)
    return place


def _meet(launch: Launch, timeout: timedelta) -> None:
    """Returns once all processes of the launch are here: `init_process_group` would not say who is missing."""
    from torch.distributed import DistNetworkError  # noqa: PLC0415  (as above)

    deadline, pause_s = time.monotonic() + timeout.total_seconds(), _SHORTEST_PAUSE_S
    missing: list[int] = []
    try:
        wire = Wire(launch, f"shardproof/{launch.attempt}/here/{next(_meetings)}", connect=timeout)
        wire.send(str(launch.rank), b"")
        if wire.count("come") == launch.world_size:
            wire.send("all", b"")
        while wire.look("all") is None:
            if time.monotonic() > deadline:
                missing = [rank for rank in range(launch.world_size) if wire.look(str(rank)) is None]
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    except DistNetworkError:
        if launch.agent_store:
            raise
        missing = [0]  # who has to hold the store
    if missing:
        how = never_came(missing, f" within {timeout.total_seconds():g} s")
        raise RankLost(launch.rank, how, during="the start")


def _in_one_already() -> NoReturn:
    raise UsageError("this process is in its launcher's process group already, and joins no other world")


def _alone(device: str) -> Place:
    import torch.distributed as dist  # noqa: PLC0415  (as above)
    from torch._C._distributed_c10d import HashStore  # noqa: PLC0415

    place = Place(rank=0, size=1, local_rank=0, device_type=device)
    place.use_device()
    dist.init_process_group(place.backend(), store=HashStore(), rank=0, world_size=1)
    return place
