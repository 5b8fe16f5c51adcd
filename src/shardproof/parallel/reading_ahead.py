"""Steps that are prepared by worker processes."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shardproof.errors import ExperimentError
from shardproof.ranks.serve import outlive_nobody

T = TypeVar("T")

Dealt: TypeAlias = Callable[[int, int], Iterator[T]]
"""(worker, workers) -> what this worker prepares: every `workers`-th item, from number `worker` on."""

STEPS_AHEAD = 2
"""Items that each worker prepares before they are asked for."""


def in_turn(dealt: Dealt[T], workers: int) -> Generator[T, None, None]:
    """All items, in order. With workers they are prepared by as many forked processes, which end with the iterator.

    An exception in a worker is raised here, where its turn has come, with the worker's traceback as its cause.
    Workers also end with the thread that asked for the first item, which Linux takes for their parent.
    """
    if workers == 0:
        yield from dealt(0, 1)
        return
    loader: DataLoader[Any] = DataLoader(
        _Shares(dealt),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=STEPS_AHEAD,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",
        worker_init_fn=partial(_settle, os.getpid()),
        # The loader draws a seed, which should not be from the caller's generator.
        generator=torch.Generator(),
    )
    with warnings.catch_warnings():
        # Newer Pythons warn of threads that hold locks during the fork; the workers use none of torch's.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        running: Any = iter(loader)
    try:
        for item in running:
            if isinstance(item, _Failed):
                raise item.error from _InWorker(item.report)
            yield item
    finally:
        # torch ends them when the iterator is collected, which a reference in some traceback may put off.
        running._shutdown_workers()


class _Shares(IterableDataset[Any]):
    def __init__(self, dealt: Dealt[Any]) -> None:
        self.dealt = dealt

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            raise RuntimeError("only a worker process has a share")
        try:
            yield from self.dealt(info.id, info.num_workers)
        except Exception as error:  # noqa: BLE001  (it is raised again in the rank's process)
            yield _Failed(_portable(error), "".join(traceback.format_exception(error)))


@dataclass(frozen=True, slots=True)
class _Failed:
    """An exception on its way to the rank's process. torch would make a new one of the same type, if it can."""

    error: Exception
    report: str


class _InWorker(Exception):
    """The traceback of an exception that was raised in a worker process."""

    def __str__(self) -> str:
        return f"in a worker process:\n{self.args[0]}"


def _portable(error: Exception) -> Exception:
    try:
        again: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (a user's class may raise anything on its way through pickle)
        again = ExperimentError(f"{type(error).__name__} while data was read: {error}")
        for note in getattr(error, "__notes__", ()):
            again.add_note(note)
    return again


def _as_it_is(item: T) -> T:
    return item


def _settle(parent: int, worker: int) -> None:
    del worker
    outlive_nobody(parent)
