"""How torch's distributed checkpoint writes our folders: safetensors files and a JSON index, nothing pickled."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardproof.checkpoint import folder, stream
from shardproof.checkpoint.index import Chunk, Index, Saved, data_file
from shardproof.checkpoint.stream import Entry
from shardproof.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What a checkpoint holds beside tensors. The same on every rank, but for `entries`."""

    ties: tuple[tuple[str, ...], ...] = ()

    optimizer: Mapping[str, Any] | None = None
    """Kind and param groups, as JSON."""

    entries: Mapping[str, Mapping[str, Any]] | None = None
    """{parameter: {entry: JSON}}: optimizer state that is no tensor, of the parameters that this rank holds some of."""

    extra: Any = None


@dataclass(frozen=True, slots=True)
class _Order:
    """What the coordinator tells a rank with its plan."""

    folder: Path
    rank: int


class FolderWriter(StorageWriter):
    """Writes a checkpoint folder: one file per rank that has something to write, the index last."""

    def __init__(self, path: Path, beside: Beside, *, keep: int | None = None) -> None:
        """`keep`: how many checkpoints stay in the folder around `path` once this one stands; None for all."""
        self.path = path
        self.beside = beside
        self.keep = keep
        self.entries: dict[str, dict[str, Any]] = {}
        self.hidden: Path | None = None
        """Where it is written before it gets its name. The coordinator knows."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint, to the path that it was made for."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is made once the plan is known to be good."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Hand the coordinator what only this rank knows."""
        return replace(plan, storage_data=self.beside.entries or {})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder to write into; ranks know it from their plans."""
        for plan in plans:
            for name, entries in plan.storage_data.items():
                self.entries.setdefault(name, {}).update(entries)
        hidden = folder.writing_name(self.path)
        folder.refuse_strangers(self.path)
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            hidden.mkdir()
        self.hidden = hidden
        return [replace(plan, storage_data=_Order(hidden, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        order: _Order = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        file = data_file(order.rank)
        with _told(self.path):
            if plan.items:
                stream.write(order.folder / file, [_entry(item, planner) for item in plan.items])
        done.set_result(
            [WriteResult(index=item.index, size_in_bytes=_bytes(item), storage_data=file) for item in plan.items]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, give the folder its name, and let go of older checkpoints."""
        hidden = self.hidden
        if hidden is None:
            raise CheckpointError(f"{self.path}: there is no folder to finish; the plan was not made on this rank")
        files = {(result.index.fqn, result.index.offset): result.storage_data for rank in results for result in rank}
        with _told(self.path):
            sizes = {name: _size(hidden / name) for name in sorted(set(files.values()))}
            optimizer = self.beside.optimizer
            Index(
                tensors={
                    name: _saved(name, saved, files)
                    for name, saved in metadata.state_dict_metadata.items()
                    if isinstance(saved, TensorStorageMetadata)
                },
                files=sizes,
                ties=self.beside.ties,
                optimizer=None if optimizer is None else {**optimizer, "state": self.entries},
                extra=self.beside.extra,
            ).write(hidden)
            folder.put(hidden, self.path)
        if self.keep is not None:
            folder.prune(self.path.parent, self.keep, standing=self.path)

    def give_up(self) -> None:
        """Remove what was written of a checkpoint that failed. On the coordinator, when all ranks have stopped."""
        if self.hidden is not None:
            shutil.rmtree(self.hidden, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta | None:
        """Where it goes."""
        return StorageMeta(checkpoint_id=self.path)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that names the checkpoint and what to look after."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error}; free space or choose another folder. "
            "Earlier checkpoints are as they were"
        ) from error


def _entry(item: WriteItem, planner: SavePlanner) -> Entry:
    shape, dtype = _box(item)
    return Entry(_key(item.index, shape, _whole(item)), dtype, shape, partial(_resolved, planner, item))


def _resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    found = planner.resolve_data(item)
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{item.index.fqn} is no tensor; hand plain data over as `extra`")
    return found


def _box(item: WriteItem) -> tuple[tuple[int, ...], torch.dtype]:
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn} is no tensor; hand plain data over as `extra`")
    return tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype


def _whole(item: WriteItem) -> tuple[int, ...]:
    return () if item.tensor_data is None else tuple(item.tensor_data.size)


def _bytes(item: WriteItem) -> int:
    shape, dtype = _box(item)
    return torch.Size(shape).numel() * dtype.itemsize


def _key(index: MetadataIndex, shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """A tensor that is written in one go keeps its name, so that other tools find it in the file."""
    return index.fqn if shape == whole else f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{path.name} was written by its rank, and the first rank does not see it ({error}); "
            "save to a folder that all machines share"
        ) from error


def _saved(name: str, saved: TensorStorageMetadata, files: Mapping[tuple[str, Any], str]) -> Saved:
    whole = tuple(saved.size)
    return Saved(
        whole,
        saved.properties.dtype,
        tuple(
            Chunk(
                tuple(chunk.offsets),
                tuple(chunk.sizes),
                files[name, chunk.offsets],
                _key(MetadataIndex(name, chunk.offsets), tuple(chunk.sizes), whole),
            )
            for chunk in saved.chunks
        ),
    )
