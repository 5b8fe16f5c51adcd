"""Save a checkpoint, at once or in the background."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.optim import Optimizer

from shardproof.checkpoint import optimizer as optimizers
from shardproof.checkpoint.placed import Declared, placed
from shardproof.checkpoint.plain import encode
from shardproof.checkpoint.planning import WritePlanner
from shardproof.checkpoint.portion import Portion
from shardproof.checkpoint.state import model_portions
from shardproof.checkpoint.together import listed, own_group, rank_of, said, together
from shardproof.checkpoint.writer import Beside, FolderWriter
from shardproof.errors import CheckpointError
from shardproof.parallel.held import Held, ties


def save(
    path: str | os.PathLike[str],
    root: nn.Module,
    parameters: Iterable[Held],
    optimizer: Optimizer | None,
    extra: Mapping[str, Any] | None = None,
    *,
    declared: Declared | None = None,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint to the folder `path`; all ranks call it. When it returns, the checkpoint is on the disk.

    It is written under a hidden name and renamed when it is whole: whenever a process is killed, `path` is what it
    was before or the new checkpoint. `parameters` are the model's as this rank holds them (`parallel.held`), and
    `declared` says where those lie that were split by hand. `extra` is plain data of the caller, the same on every
    rank. `keep`: how many `step-` checkpoints stay in the folder around `path`, this one included. `group`: the ranks
    that save, all of them where it is None.

    Raises `CheckpointError` on every rank where any of them fails; nothing of the attempt stays then.
    """
    finish_pending()
    group = own_group() if group is None else group
    portions, beside = together(lambda: _collected(root, list(parameters), optimizer, extra, declared, group), group)
    _write(Path(path), portions, beside, keep, group)


def save_async(
    path: str | os.PathLike[str],
    root: nn.Module,
    parameters: Iterable[Held],
    optimizer: Optimizer | None,
    extra: Mapping[str, Any] | None = None,
    *,
    declared: Declared | None = None,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Pending:
    """Like `save`, but returns when the state has been copied to CPU memory; the files are written meanwhile.

    One save is under way at a time: this one waits for the one before it, and raises its error if nobody has seen it.
    `group` must be of gloo's, and nobody else's.
    """
    finish_pending()
    group = own_group() if group is None else group
    portions, beside = together(
        lambda: _copied(*_collected(root, list(parameters), optimizer, extra, declared, group)), group
    )
    pending = Pending(Path(path), portions, beside, keep, group)
    _pending.append(pending)
    pending.start()
    return pending


@dataclass(eq=False)
class Pending:
    """A checkpoint that is being written in the background."""

    path: Path
    portions: dict[str, Portion]
    beside: Beside
    keep: int | None
    group: dist.ProcessGroup | None
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to write."""
        if self.group is None:
            # To keep torch from warning that there is one process, warnings are switched; no thread may do that.
            self._run()
            return
        self.thread = threading.Thread(target=self._run, name=f"checkpoint {self.path.name}")
        self.thread.start()

    def _run(self) -> None:
        try:
            _write(self.path, self.portions, self.beside, self.keep, self.group)
        # It is raised where somebody waits.
        except BaseException as error:  # noqa: BLE001
            self.error = error
        self.portions = {}

    @property
    def done(self) -> bool:
        """Whether the files are written, or failed to be."""
        return self.thread is None or not self.thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is on the disk. Raises `CheckpointError`, on every rank, if it never will be."""
        if self.thread is not None:
            self.thread.join()
        if self in _pending:
            _pending.remove(self)
        if self.error is not None:
            raise self.error


_pending: list[Pending] = []
"""The save that is under way in the background, if any."""


def finish_pending() -> None:
    """Wait for the save in the background, if there is one. Raises its `CheckpointError`."""
    while _pending:
        _pending[0].wait()


def _collected(
    root: nn.Module,
    parameters: list[Held],
    optimizer: Optimizer | None,
    extra: Mapping[str, Any] | None,
    declared: Declared | None,
    group: dist.ProcessGroup | None,
) -> tuple[dict[str, Portion], Beside]:
    places = placed(parameters, declared)
    state = optimizers.collect(optimizer, places)
    portions = model_portions(root, places, rank=rank_of(group)) | state.portions
    beside = Beside(
        ties=ties(root),
        optimizer=state.about,
        entries=state.entries,
        extra=encode(dict(extra or {}), "extra"),
    )
    return portions, beside


def _copied(portions: dict[str, Portion], beside: Beside) -> tuple[dict[str, Portion], Beside]:
    """The same portions in memory that training does not touch, of those that this rank may have to write."""
    copies = {}
    for name, portion in portions.items():
        if portion.writes:
            local = portion.local
            copies[name] = replace(portion, local=torch.empty_like(local, device="cpu").copy_(local))
    return copies, beside


def _write(
    path: Path, portions: dict[str, Portion], beside: Beside, keep: int | None, group: dist.ProcessGroup | None
) -> None:
    writer = FolderWriter(path.absolute(), beside, keep=keep)
    try:
        with alone(group):
            torch_save(
                portions, storage_writer=writer, planner=WritePlanner(), process_group=group, no_dist=group is None
            )
    except CheckpointException as failed:
        writer.give_up()
        raise told(failed) from failed


@contextlib.contextmanager
def alone(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Without a process group, torch warns that there is only one process; that is known, and meant."""
    if group is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def told(failed: CheckpointException) -> BaseException:
    """Torch's collected failures as one error of ours; an interruption stays what it is."""
    causes = {rank: cause for rank, (cause, _) in failed.failures.items()}
    for cause in causes.values():
        if not isinstance(cause, Exception):
            return cause
    return CheckpointError(listed({rank: said(cause) for rank, cause in causes.items()}))
