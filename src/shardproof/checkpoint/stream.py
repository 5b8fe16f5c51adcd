"""Writes the safetensors format one tensor at a time, so that no second copy of a file's content is ever held.

The format (https://github.com/huggingface/safetensors): the length of the header in 8 bytes, a JSON header that says
where each tensor lies, then the tensors, row-major and little-endian, without gaps. It is read by `safetensors` itself.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardproof.errors import CheckpointError
from shardproof.trace.dtypes import SAFETENSORS

REAL: dict[torch.dtype, torch.dtype] = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""Complex tensors are stored as pairs of reals along a new last dim."""

NAMES: dict[torch.dtype, str] = {dtype: str(dtype).removeprefix("torch.") for dtype in (*SAFETENSORS, *REAL)}
"""What an index calls each dtype: as torch does."""

BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}

HEADER_LIMIT = 100_000_000
"""Longest header that safetensors reads."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file that is to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    tensor: Callable[[], Tensor]
    """Called once, when the turn comes to write it; on any device."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and the shape that a tensor has in a file."""
    return (SAFETENSORS[REAL[dtype]], (*shape, 2)) if dtype in REAL else (SAFETENSORS[dtype], shape)


def write(path: Path, entries: Sequence[Entry]) -> int:
    """Write a new safetensors file, down to the disk, and return its size in bytes.

    Raises `CheckpointError` for a dtype that the format lacks, and `OSError` from the file system.
    """
    # Wide dtypes first: every tensor is then aligned to its own width.
    entries = sorted(entries, key=lambda entry: (-_width(entry), entry.key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        name, shape = stored(entry.dtype, entry.shape)
        header[entry.key] = {"dtype": name, "shape": shape, "data_offsets": [at, at + entry.size_bytes]}
        at += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(f"{path}: {len(entries)} tensors need a header of {len(text)} bytes; the limit is 100 MB")
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            file.write(_content(entry))
        to_disk(file.fileno())
    return 8 + len(text) + at


def _width(entry: Entry) -> int:
    if entry.dtype not in NAMES:
        raise CheckpointError(
            f"{entry.key} is of {entry.dtype}, which safetensors files cannot hold; "
            f"keep it in one of {', '.join(NAMES.values())}"
        )
    return REAL.get(entry.dtype, entry.dtype).itemsize


def _content(entry: Entry) -> memoryview:
    tensor = entry.tensor().detach().resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.dtype in REAL:
        tensor = torch.view_as_real(tensor)
    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content


def to_disk(file: int) -> None:
    """Wait until what was written under this file descriptor is on the disk."""
    os.fsync(file)


def folder_to_disk(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        to_disk(descriptor)
    finally:
        os.close(descriptor)
