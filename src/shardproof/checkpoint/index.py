"""The index of a checkpoint: its tensors, their files, and the data beside them. JSON, checked on reading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardproof.checkpoint.stream import BY_NAME, NAMES, to_disk
from shardproof.errors import CheckpointError
from shardproof.trace.folder.line import Invalid, loads, shown
from shardproof.trace.folder.within import size_within

FILE_NAME = "index.json"
FORMAT = "shardproof-checkpoint"
VERSION = 1
"""Raised whenever an older shardproof could no longer read what is written."""

LARGEST_INDEX = 2**30
"""Bytes. A model of 70 billion parameters on a thousand ranks takes a fifth of it."""

DEEPEST = 200
"""Levels of lists and objects."""

MOST_DIMS = 64
"""Dims of a tensor, as in torch."""

LARGEST = 2**53
"""Elements of a tensor; sizes up to here are the same in every JSON reader."""

MOST_PAIRS = 10**6
"""Pairs of chunks of a tensor that are held against each other, and a hundred more for each chunk: FSDP over any number
of ranks with tensor parallelism over a hundred needs no more."""

DATA_FILE = re.compile(r"rank-\d{5,9}\.safetensors", re.ASCII)
"""The only names that an index may give to its files, so that none leads out of the folder."""

Ints = tuple[int, ...]


def data_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where it is stored."""

    offset: Ints
    shape: Ints
    file: str
    key: str
    """Its name in that file."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole tensor, as its chunks tile it."""

    shape: Ints
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All that a checkpoint says of itself."""

    tensors: Mapping[str, Saved]
    """By `model/NAME`, `buffer/NAME` and `optimizer/NAME/ENTRY`."""

    files: Mapping[str, int]
    """Size in bytes of every file beside the index."""

    ties: Sequence[Sequence[str]] = ()
    """Groups of parameter names that stand for one tensor, which is saved under one of them."""

    optimizer: Mapping[str, Any] | None = None
    """What the optimizer holds beside tensors, as JSON; None where no optimizer was saved."""

    extra: Any = None
    """The caller's own data, as JSON."""

    torch: str = field(default_factory=lambda: str(torch.__version__))

    def write(self, folder: Path) -> None:
        """Write it into `folder`, down to the disk. Raises `OSError` from the file system."""
        tensors = {
            name: {
                "shape": saved.shape,
                "dtype": NAMES[saved.dtype],
                "chunks": [{"offset": c.offset, "shape": c.shape, "file": c.file, "key": c.key} for c in saved.chunks],
            }
            for name, saved in self.tensors.items()
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "torch": self.torch,
            "files": dict(self.files),
            "ties": self.ties,
            "optimizer": self.optimizer,
            "extra": self.extra,
            "tensors": tensors,
        }
        with (folder / FILE_NAME).open("x") as file:
            json.dump(content, file, separators=(",", ":"), allow_nan=False)
            file.flush()
            size = file.tell()
            to_disk(file.fileno())
        if size > LARGEST_INDEX:
            raise CheckpointError(f"{folder}: an index of {size} bytes would not be read; {LARGEST_INDEX} at most")


def read(folder: Path) -> Index:
    """The index of the checkpoint in `folder`, checked against the sizes of its files.

    Nothing is allocated by what an index says before that is known to fit the files. Raises `CheckpointError`.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give the folder of a checkpoint, as runs/step-00000500")
    path = folder / FILE_NAME
    if not folder.is_dir() or not path.is_file():
        what = "has no index.json: it is no checkpoint, or one that was never finished"
        raise CheckpointError(f"{folder} {what}; give the folder of a whole one, as runs/step-00000500")
    try:
        content = _content(path)
    except (OSError, Invalid) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); load an earlier checkpoint") from error
    index = _parsed(content, path)
    for name, size in index.files.items():
        check_file(folder / name, size)
    return index


def _content(path: Path) -> dict[str, Any]:
    """What the file holds, with nothing in it that two readers of JSON could take differently."""
    size = size_within(path.parent, path)
    if size > LARGEST_INDEX:
        raise Invalid(f"it has {size} bytes; {LARGEST_INDEX} at most")
    with path.open("rb") as file:
        content = loads(file.read(size))
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return content
    raise Invalid(f"it is nested more than {DEEPEST} deep")


def check_file(path: Path, size: int) -> None:
    """Raise `CheckpointError` unless a file really lies in the checkpoint and has the size that its index says."""
    try:
        found = size_within(path.parent, path)
    except Invalid as error:
        raise CheckpointError(
            f"{path} is part of the checkpoint and cannot be opened ({error}); "
            "copy the whole folder to where all ranks see it, or load an earlier checkpoint"
        ) from error
    if found != size:
        raise CheckpointError(
            f"{path} has {found} bytes, and the index says {size}: it is damaged or was not copied to the end; "
            "copy it again, or load an earlier checkpoint"
        )


def _parsed(content: Any, path: Path) -> Index:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the index of a shardproof checkpoint; load what sp.Trainer saved")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, and this shardproof reads up to {VERSION}; install a newer one"
        )
    try:
        index = Index(
            tensors={str(name): _saved(saved) for name, saved in content["tensors"].items()},
            files={_file(name): _size(size) for name, size in content["files"].items()},
            ties=tuple(tuple(str(name) for name in group) for group in content["ties"]),
            optimizer=_object_or_none(content["optimizer"]),
            extra=content["extra"],
            torch=str(content["torch"]),
        )
        _fits(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged or was made by hand: {type(error).__name__}: {str(error)[:300]}; "
            "load an earlier checkpoint"
        ) from error
    return index


def _saved(data: Any) -> Saved:
    chunks = tuple(
        Chunk(_ints(chunk["offset"]), _ints(chunk["shape"]), _file(chunk["file"]), str(chunk["key"]))
        for chunk in data["chunks"]
    )
    if not isinstance(data["dtype"], str) or data["dtype"] not in BY_NAME:
        raise ValueError(f"there is no dtype {shown(data['dtype'])}")
    return Saved(_ints(data["shape"]), BY_NAME[data["dtype"]], chunks)


def _object_or_none(value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"the optimizer is {type(value).__name__}")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _size(value: Any) -> int:
    if not _whole(value) or value > LARGEST:
        raise ValueError(f"{shown(value)} is no size")
    return int(value)


def _ints(values: Any) -> Ints:
    if not isinstance(values, list) or len(values) > MOST_DIMS:
        raise ValueError(f"{shown(values)} is no list of sizes")
    sizes = tuple(map(_size, values))
    # An empty dim hides how large the others are, and torch multiplies the rest.
    if math.prod(size for size in sizes if size) > LARGEST:
        raise ValueError(f"{shown(values)}: no tensor is that large")
    return sizes


def _file(name: Any) -> str:
    if not isinstance(name, str) or not DATA_FILE.fullmatch(name):
        raise ValueError(f"{shown(name)} is no file of a checkpoint; they are named as {data_file(0)}")
    return name


def _fits(index: Index) -> None:
    """Raise `ValueError` unless chunks tile their tensors and fit into the files that they are said to lie in."""
    used = dict.fromkeys(index.files, 0)
    for name, saved in index.tensors.items():
        for chunk in saved.chunks:
            if len(chunk.offset) != len(saved.shape) or len(chunk.shape) != len(saved.shape):
                raise ValueError(f"{name} has {len(saved.shape)} dims, and a chunk of it {len(chunk.shape)}")
            if any(o + n > s for o, n, s in zip(chunk.offset, chunk.shape, saved.shape, strict=True)):
                raise ValueError(f"{name}: the chunk {chunk.shape} at {chunk.offset} leaves the shape {saved.shape}")
            used[chunk.file] += math.prod(chunk.shape) * saved.dtype.itemsize
        held = sum(math.prod(chunk.shape) for chunk in saved.chunks)
        if held != math.prod(saved.shape) or _overlap(saved):
            raise ValueError(f"{name}: the chunks do not tile the shape {saved.shape}")
    for file, size in used.items():
        if size > index.files[file]:
            raise ValueError(f"{file} is to hold {size} bytes of tensors in {index.files[file]} bytes")


def _overlap(saved: Saved) -> bool:
    """Whether two chunks share an element: sorted along the dim that tells most of them apart, neighbours are few."""
    # Chunks without elements overlap nothing, and any number of them may lie in one place.
    chunks = [chunk for chunk in saved.chunks if math.prod(chunk.shape)]
    if len(chunks) < 2:
        return False
    if not saved.shape:
        return True
    dim = max(range(len(saved.shape)), key=lambda d: len({chunk.offset[d] for chunk in chunks}))
    active: list[Chunk] = []
    pairs = 0
    for chunk in sorted(chunks, key=lambda c: c.offset[dim]):
        pairs += len(active)
        if pairs > MOST_PAIRS + 100 * len(chunks):
            raise ValueError(f"{len(chunks)} chunks are more than a tensor of {len(saved.shape)} dims is cut into")
        active = [other for other in active if other.offset[dim] + other.shape[dim] > chunk.offset[dim]]
        for other in active:
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(chunk.offset, chunk.shape, other.offset, other.shape, strict=True)
            ):
                return True
        active.append(chunk)
    return False
