"""How torch's distributed checkpoint reads our folders: the boxes that are asked for, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardproof.checkpoint import stream
from shardproof.checkpoint.index import Chunk, Index, check_file
from shardproof.checkpoint.stream import REAL
from shardproof.errors import CheckpointError

READ_ERRORS = (OSError, SafetensorError, RuntimeError, ValueError, TypeError, IndexError)
"""What reading a damaged file may raise."""


class FolderReader(StorageReader):
    """Reads the boxes that a plan asks for, and no more, from a folder whose index has been read and checked."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self.chunks = {(name, chunk.offset): chunk for name, saved in index.tensors.items() for chunk in saved.chunks}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader reads the checkpoint that it was made for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, in torch's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=saved.dtype),
                    size=torch.Size(saved.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in saved.chunks],
                )
                for name, saved in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Look into every file that is needed: what is wrong with one is known before anything is overwritten."""
        for file, items in self._by_file(plan).items():
            with Boxes(self.path / file, self.index.files[file]) as boxes:
                for item in items:
                    boxes.check(self._chunk(item), self.index.tensors[item.storage_index.fqn].dtype)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is needed, file by file."""
        for file, items in self._by_file(plan).items():
            with Boxes(self.path / file, self.index.files[file]) as boxes:
                for item in items:
                    found = boxes.read(
                        self._chunk(item),
                        self.index.tensors[item.storage_index.fqn].dtype,
                        tuple(item.storage_offsets),
                        tuple(item.lengths),
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(found)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._chunk(item).file, []).append(item)
        return by_file

    def _chunk(self, item: ReadItem) -> Chunk:
        return self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return bool(os.fspath(checkpoint_id))


class Boxes:
    """One file of a checkpoint, opened to read boxes of its chunks. A context manager.

    Raises `CheckpointError` for whatever is wrong with the file.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        check_file(path, size)
        self._file: Any = self._try(lambda: safe_open(path, framework="pt"))

    def __enter__(self) -> Boxes:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def read(self, chunk: Chunk, dtype: torch.dtype, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `offset` in a chunk; a tensor in memory of its own."""
        found: Tensor = self._try(lambda: sliced(self._file, chunk.key, dtype, offset, shape))
        return found

    def check(self, chunk: Chunk, dtype: torch.dtype) -> None:
        """Raise unless the file holds the chunk that the index says it does."""
        self._try(lambda: self._check(chunk, dtype))

    def _check(self, chunk: Chunk, dtype: torch.dtype) -> None:
        piece = self._file.get_slice(chunk.key)
        want = stream.stored(dtype, chunk.shape)
        got = (piece.get_dtype(), tuple(piece.get_shape()))
        if got != want:
            raise CheckpointError(f"{chunk.key} is {got[0]} {got[1]}, and the index says {want[0]} {want[1]}")

    def _try(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (*READ_ERRORS, CheckpointError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; load an earlier checkpoint") from error


def sliced(file: Any, key: str, dtype: torch.dtype, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A box of the tensor `key` of an open safetensors file; pairs of reals become complex again."""
    if offset:
        index = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        found: Tensor = file.get_slice(key)[index]
    else:
        # A tensor of no dims has no slices.
        found = file.get_tensor(key)
    return torch.view_as_complex(found.contiguous()) if dtype in REAL else found
