"""An experiment that breaks on one rank, as the environment says. Each fault ends in a line marked `<- its name`."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

import shardproof as sp

FAULT = os.environ.get("FAULT", "none")
BEGAN = Path(os.environ.get("FAULT_BEGAN", os.devnull))
"""Is written when the fault begins."""
GUILTY = 1
LOCK = threading.Lock()


class NotPortable(Exception):
    """Cannot be pickled: it takes two arguments and holds a lock."""

    def __init__(self, text: str, second: int) -> None:
        super().__init__(text)
        self.second, self.lock = second, threading.Lock()


def killed() -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(1000)  # <- killed


def out_of_memory() -> None:
    bytearray(1 << 50)  # <- out of memory


def torch_out_of_memory() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)  # <- torch out of memory


def raises() -> None:
    raise ValueError("3 is not 4")  # <- raises


def raises_what_does_not_pickle() -> None:
    raise NotPortable("3 is not 4", 2)  # <- raises what does not pickle


def raises_at_length() -> None:
    raise ValueError("3 is not 4" * 1_000_000)  # <- raises at length


def exits_0() -> None:
    sys.exit(0)  # <- exits 0


def exits_1() -> None:
    sys.exit(1)  # <- exits 1


def exits_at_once() -> None:
    os._exit(0)  # <- exits at once


def crashes() -> None:
    ctypes.string_at(0)  # <- crashes


def sleeps() -> None:
    time.sleep(1000)  # <- sleeps


def spins() -> None:
    while True:  # <- spins
        pass


def waits_for_a_lock() -> None:
    LOCK.acquire()
    LOCK.acquire()  # <- waits for a lock


def waits_in_native_code() -> None:
    ctypes.PyDLL(None).pause()  # <- waits in native code


def stopped() -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    time.sleep(1000)  # <- stopped


def floods() -> None:
    for _ in range(100):
        os.write(1, (b"x" * 99 + b"\n") * 10_000)


def floods_one_line() -> None:
    for _ in range(100):
        os.write(1, b"x" * 1_000_000)


def calls_once_more() -> None:
    dist.all_reduce(torch.ones(3))  # <- calls once more


ON_ONE = (
    killed,
    out_of_memory,
    torch_out_of_memory,
    raises,
    raises_what_does_not_pickle,
    raises_at_length,
    exits_0,
    exits_1,
    exits_at_once,
    crashes,
    sleeps,
    spins,
    waits_for_a_lock,
    waits_in_native_code,
    stopped,
    floods,
    floods_one_line,
    calls_once_more,
)


def raises_everywhere(guilty: bool) -> None:
    raise ValueError("3 is not 4")  # <- raises everywhere


def another_collective(guilty: bool) -> None:
    if guilty:
        dist.broadcast(torch.ones(4), 0)  # <- another collective
    else:
        dist.all_reduce(torch.ones(4))


def another_collective_late(guilty: bool) -> None:
    if guilty:
        time.sleep(4)
        dist.broadcast(torch.ones(4), 0)  # <- another collective late
    else:
        dist.all_reduce(torch.ones(4))


def another_shape(guilty: bool) -> None:
    dist.all_reduce(torch.ones(8 if guilty else 4))  # <- another shape


def another_dtype(guilty: bool) -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.float32 if guilty else torch.float64))  # <- another dtype


def another_order(guilty: bool) -> None:
    pair = [torch.ones(4), torch.ones(2, 2)]
    for tensor in reversed(pair) if guilty else pair:
        dist.all_reduce(tensor)  # <- another order


def another_reduction(guilty: bool) -> None:
    dist.all_reduce(torch.ones(4), dist.ReduceOp.MAX if guilty else dist.ReduceOp.SUM)  # <- another reduction


def another_source(guilty: bool) -> None:
    dist.broadcast(torch.ones(4), 1 if guilty else 0)  # <- another source


def another_group(guilty: bool) -> None:
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        dist.all_reduce(torch.ones(4), group=None if guilty else pair)  # <- another group


def waits_while_it_fails(guilty: bool) -> None:
    try:
        if guilty:
            raise ValueError("3 is not 4")
        dist.all_reduce(torch.ones(4))
    finally:
        dist.barrier()  # <- waits while it fails


ON_ALL = (
    raises_everywhere,
    another_collective,
    another_collective_late,
    another_shape,
    another_dtype,
    another_order,
    another_reduction,
    another_source,
    another_group,
    waits_while_it_fails,
)

_one: dict[str, Callable[[], None]] = {fault.__name__.replace("_", " "): fault for fault in ON_ONE}
_all: dict[str, Callable[[bool], None]] = {fault.__name__.replace("_", " "): fault for fault in ON_ALL}
_steps = 0


def begin() -> None:
    BEGAN.write_text(repr(time.time()))


def break_now() -> None:
    """In the second step, so that there is something before it that must not be lost."""
    global _steps
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _steps += 1
    if _steps != 2:
        return
    guilty = dist.get_rank() == GUILTY
    if FAULT in _one and guilty:
        begin()
        _one[FAULT]()
    elif FAULT in _all:
        begin()
        _all[FAULT](guilty)


def guilty(fault: str) -> bool:
    """Whether this rank is to break before the first step, which begins now."""
    found = fault == FAULT and os.environ.get("WORLD_SIZE") == "3" and os.environ["RANK"] == str(GUILTY)
    if found:
        begin()
    return found


if guilty("never joins"):
    time.sleep(1000)


def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: sp.Parallelism) -> nn.Module:
    if guilty("never joins: parallelize"):
        time.sleep(1000)  # <- never joins: parallelize
    return DistributedDataParallel(model) if parallelism.dp > 1 else model


def build() -> nn.Module:
    if guilty("never joins: model"):
        time.sleep(1000)  # <- never joins: model
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


class Samples(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if FAULT == "worker killed" and get_worker_info() is not None:
            begin()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def batches(data: Samples, mesh: object, parallelism: sp.Parallelism) -> Iterator[tuple[Tensor, ...]]:
    if guilty("never joins: batches"):
        time.sleep(1000)  # <- never joins: batches
    workers = 1 if parallelism.world_size > 1 else 0
    while True:
        yield from DataLoader(data, 12 // parallelism.dp, num_workers=workers)  # <- worker killed


def in_a_hook(gradient: Tensor) -> Tensor:
    if FAULT == "raises in a hook" and dist.get_world_size() > 1 and dist.get_rank() == GUILTY:
        begin()
        raise ValueError("3 is not 4")  # <- raises in a hook
    return gradient


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    outputs = model(inputs)
    if outputs.requires_grad:
        outputs.register_hook(in_a_hook)
    break_now()
    return F.cross_entropy(outputs, targets)


experiment = sp.Experiment(
    model=build,
    data=Samples(torch.linspace(-1, 1, 512).reshape(64, 8).sin(), torch.arange(64) % 4),
    loss=loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=12,
    steps=3,
    batches=batches if FAULT in {"worker killed", "never joins: batches"} else None,
    parallelize=parallelize if FAULT == "never joins: parallelize" else None,
)
training = sp.Training(max_duration="3ba", save_interval="1ba")
