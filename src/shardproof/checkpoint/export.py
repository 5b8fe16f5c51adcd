"""Turn a checkpoint into one safetensors file that any other tool can read. Only files are touched; no ranks needed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardproof.checkpoint import folder, stream
from shardproof.checkpoint import index as indices
from shardproof.checkpoint.index import Index, Saved
from shardproof.checkpoint.reader import Boxes
from shardproof.checkpoint.state import BUFFER, MODEL
from shardproof.errors import CheckpointError


def export(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, every_name: bool = True) -> None:
    """Write the parameters and persistent buffers of a checkpoint, whole and under canonical names, to the file `out`.

    The names are those of the plain model's `state_dict()`. A tied parameter is written under each of its names, or
    with `every_name` false under the first alone. Holds one whole tensor at a time in memory. `out` is there when all
    of it is. Raises `CheckpointError`.
    """
    found, target = folder.resolve(checkpoint).absolute(), Path(out).absolute()
    index = indices.read(found)
    entries = [
        stream.Entry(name, saved.dtype, saved.shape, partial(assemble, found, index, saved))
        for key, saved in index.tensors.items()
        if key.startswith((MODEL, BUFFER))
        for name in _names(key, index, every_name)
    ]
    _put(target, entries)


def write_whole(state: Mapping[str, Tensor], out: str | os.PathLike[str]) -> None:
    """Write whole tensors to the file `out`, which is there when all of it is. Raises `CheckpointError`."""
    entries = [
        stream.Entry(name, tensor.dtype, tuple(tensor.shape), tensor.contiguous) for name, tensor in state.items()
    ]
    _put(Path(out).absolute(), entries)


def _put(target: Path, entries: list[stream.Entry]) -> None:
    hidden = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream.write(hidden, entries)
        hidden.replace(target)
        stream.folder_to_disk(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}; free space or choose another place") from error
    finally:
        hidden.unlink(missing_ok=True)


def _names(key: str, index: Index, every_name: bool) -> list[str]:
    if key.startswith(BUFFER):
        return [key.removeprefix(BUFFER)]
    name = key.removeprefix(MODEL)
    tied = next((group for group in index.ties if name in group), ())
    return sorted({name, *tied}) if every_name else [name]


def assemble(path: Path, index: Index, saved: Saved) -> Tensor:
    """A whole tensor of the checkpoint in the folder `path`, on the CPU. Raises `CheckpointError`."""
    whole = torch.empty(saved.shape, dtype=saved.dtype)
    for chunk in saved.chunks:
        with Boxes(path / chunk.file, index.files[chunk.file]) as boxes:
            boxes.check(chunk, saved.dtype)
            part = boxes.read(chunk, saved.dtype, (0,) * len(chunk.shape), chunk.shape)
        box = tuple(slice(start, start + length) for start, length in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = part
    return whole
