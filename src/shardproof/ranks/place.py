"""Where a rank's process stands, and the worlds (default process groups) that it joins."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from shardproof.errors import UsageError
from shardproof.ranks.caches import forget_meshes
from shardproof.ranks.journal import Call, Journal, Tally

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

FOREVER = timedelta(days=30)
"""Time limit of collectives. The supervisor deals with hangs: it knows every rank's stack, a timeout knows none."""


class Rendezvous:
    """How one process finds the others: a store that all of them reach, opened at first use."""

    def __init__(self, connect: Callable[[], Store], *, local_size: int) -> None:
        self.local_size = local_size
        """Ranks on this machine, which share its devices."""
        self._connect = connect
        self._store: Store | None = None
        self._worlds: Counter[tuple[str, int]] = Counter()

    def store(self, name: str, size: int) -> tuple[str, Store]:
        """A store of its own for each world, so that no key of an earlier one is ever read; its name comes first."""
        from torch._C._distributed_c10d import PrefixStore  # noqa: PLC0415  (a Place is made before torch is loaded)

        if self._store is None:
            self._store = self._connect()
        # Counted by name and size: the ranks of a smaller world have been in more worlds than the others.
        self._worlds[name, size] += 1
        key = f"world/{name}/{size}/{self._worlds[name, size]}"
        return key, PrefixStore(key, self._store)


@dataclass(frozen=True)
class Place:
    """Where a rank's process stands; handed to every method that runs on it."""

    rank: int
    size: int
    """All ranks, also those that are not part of the call."""
    local_rank: int
    """The rank among those of its machine."""
    device_type: str
    """"cpu" or "cuda"."""
    _rendezvous: Rendezvous | None = field(default=None, repr=False, compare=False)
    _tell: Callable[[object], None] | None = field(default=None, repr=False, compare=False)
    _journal: Journal | None = field(default=None, repr=False, compare=False)

    def tallies(self) -> dict[str, Tally]:
        """What was called on each process group in this call, as far as anybody counts."""
        return {} if self._journal is None else self._journal.tallies()

    def calls(self) -> list[Call]:
        """The last collectives of this process, as far as anybody notes them."""
        return [] if self._journal is None else self._journal.calls()

    def tell(self, event: object) -> None:
        """Sends `event` to the caller while a call is running; it arrives as `Ranks.on_event(rank, event)`.

        Any thread of the rank may tell, a signal handler may not. Events are pickled: plain data, never tensors. They
        arrive in order, all of them before the call's answer. It does nothing where there is no caller to hear it: on
        torchrun's ranks above 0, in a process that is no rank, and between two calls.
        """
        if self._tell is not None:
            self._tell(event)

    def device(self) -> torch.device:
        """The device this rank computes on. Ranks share devices where there are more ranks than devices."""
        import torch  # noqa: PLC0415  (the room must be importable without torch)

        if self.device_type == "cpu":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if count == 0:
            raise UsageError("device='cuda', but torch sees no CUDA device here; use device='cpu'")
        return torch.device("cuda", self.local_rank % count)

    def use_device(self) -> None:
        """Makes the device of this rank torch's current one in the calling thread, where there is any such thing."""
        import torch  # noqa: PLC0415  (the room must be importable without torch)

        if self.device_type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(self.device())

    @contextmanager
    def world(self, name: str, size: int) -> Iterator[None]:
        """Joins a new default process group of ranks 0 to `size - 1`, and always leaves it again.

        A world of size 1 works on any rank alone, and there its rank is 0. Worlds may follow each other in one
        process, under the same name too, but not nest. Raises `UsageError` on a rank outside the world.
        """
        import torch.distributed as dist  # noqa: PLC0415  (the room must be importable without torch)
        from torch._C._distributed_c10d import HashStore  # noqa: PLC0415

        if size == 1:
            key, store = f"alone/{name}", HashStore()  # type: tuple[str, Store]  # private: nobody else is needed
        elif not self.rank < size <= self.size or self._rendezvous is None:
            raise UsageError(f"rank {self.rank} of {self.size} cannot join the world {name!r} of {size} ranks")
        else:
            key, store = self._rendezvous.store(name, size)
        if self._journal is not None:
            self._journal.enter(key)
        rank = 0 if size == 1 else self.rank
        with self._announced(rank, size):
            dist.init_process_group(self.backend(), store=store, rank=rank, world_size=size, timeout=FOREVER)
            all_joined(store, size)
            try:
                yield
            except BaseException:
                leave(in_peace=False)
                raise
            else:
                leave(in_peace=True)
            finally:
                forget_meshes()
                # Wrapped models lie in reference cycles and hold the buffers of the world that has just ended.
                gc.collect()

    @contextmanager
    def _announced(self, rank: int, size: int) -> Iterator[None]:
        """Sets what torchrun sets, for user code that reads its rank from the environment."""
        local_size = min(size, self._rendezvous.local_size) if self._rendezvous else 1
        local_rank = 0 if size == 1 else self.local_rank
        values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        before = {name: os.environ.get(name) for name in values}
        os.environ.update({name: str(value) for name, value in values.items()})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def backend(self) -> str:
        """What `init_process_group` is to be given: always something that carries tensors on the CPU as well."""
        if self.device_type == "cpu":
            return "gloo"
        import torch  # noqa: PLC0415  (the room must be importable without torch)

        local_size = self._rendezvous.local_size if self._rendezvous else 1
        # NCCL refuses two ranks on one device. Tensors on the CPU go through gloo either way.
        return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= local_size else "gloo"


def all_joined(store: Store, size: int) -> None:
    """Returns once all ranks of a new process group have joined it: run it with the store of the group.

    A rank that calls no collective may leave again while others still connect to it. Gloo tells them, and only now
    and then, that the connection was closed by a peer.
    """
    if store.add("joined", 1) == size:
        store.set("all joined", "")
    store.wait(["all joined"], FOREVER)


def leave(*, in_peace: bool) -> None:
    """Leaves the world; where something failed in it, without waiting for the others, which may be stuck."""
    import torch.distributed as dist  # noqa: PLC0415  (the room must be importable without torch)
    from torch.distributed import distributed_c10d  # noqa: PLC0415

    if not dist.is_initialized():
        return  # user code has left it already
    if not in_peace and "nccl" in dist.get_backend():
        # Destroying an NCCL group waits for its kernels, which wait for the peers, which wait for us.
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
