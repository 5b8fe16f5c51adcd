"""A safetensors file that grows: room for its header is kept free in front, and filled in as tensors are added.

safetensors wants the header first and the data behind it without gaps, so that a file can normally be written only
when all tensors are known. Here the header ends in blanks, which the format allows, and new entries go into them.
Gaps that alignment leaves are named in the header as tensors of their own, `padding.<offset>`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shardproof.trace.folder.dtypes import SAFETENSORS
from shardproof.trace.folder.line import ALIGNMENT

LENGTH_BYTES = 8
"""Of the number in front that says how long the header is."""


_QUOTED = json.JSONEncoder(ensure_ascii=False).encode


class GrowingFile:
    """A new safetensors file. Opens with plain `safetensors` whenever `fill` has run and nothing was added since."""

    def __init__(self, path: Path, header_bytes: int, metadata: Mapping[str, str]) -> None:
        """Raises `OSError`, also where `path` exists."""
        self.path = path
        self._stop = header_bytes
        self._pending: list[str] = []
        self._pending_bytes = 0
        self.end = header_bytes
        """Bytes that hold data, from the start of the file."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            begin = json.dumps({"__metadata__": dict(metadata)}).encode()
            room = header_bytes - LENGTH_BYTES
            write(self._fd, struct.pack("<Q", room) + begin.ljust(room), 0)
        except OSError:
            os.close(self._fd)
            raise
        self._tail = LENGTH_BYTES + len(begin) - 1
        """Where the brace that closes the header stands."""

    def has_room(self, name: str) -> bool:
        """Whether the header can take one more tensor of this name."""
        # The entry itself, the one of a gap before it, and numbers of any length.
        return self._tail + self._pending_bytes + 2 * len(name.encode()) + 1024 < self._stop

    def append(self, name: str, dtype: torch.dtype, shape: Sequence[int], content: memoryview) -> int:
        """Write a tensor's bytes behind the others; returns where they start. Raises `OSError`, and keeps the rest."""
        at = self.end + -self.end % ALIGNMENT
        try:
            if at > self.end and not content.nbytes:
                # Else the file would be shorter than its header says.
                os.ftruncate(self._fd, at)
            write(self._fd, content, at)
        except OSError:
            # What is there of it is of no use, and on a full disk the index needs the room.
            os.ftruncate(self._fd, self.end)
            raise
        if at > self.end:
            self._entry(f"padding.{self.end - self._stop}", torch.uint8, [at - self.end], self.end, at)
        self.end = at + content.nbytes
        self._entry(name, dtype, shape, at, self.end)
        return at

    def fill(self) -> None:
        """Name in the header what has been added since the last time."""
        if self._pending:
            text = "".join(self._pending).encode() + b"}"
            write(self._fd, text, self._tail)
            self._tail += len(text) - 1
            self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Fill in the header and close the file."""
        try:
            self.fill()
        finally:
            os.close(self._fd)

    def _entry(self, name: str, dtype: torch.dtype, shape: Sequence[int], start: int, stop: int) -> None:
        # By hand, as nothing in it needs quoting but the name: this is called for every tensor of a recorded step.
        sizes, place = ",".join(map(str, shape)), f"{start - self._stop},{stop - self._stop}"
        entry = f'{{"dtype":"{SAFETENSORS[dtype]}","shape":[{sizes}],"data_offsets":[{place}]}}'
        text = f",{_QUOTED(name)}:{entry}"
        self._pending.append(text)
        self._pending_bytes += len(text.encode())


def write(descriptor: int, content: bytes | memoryview, at: int) -> None:
    """All of `content`, however little of it the system takes at a time."""
    left = memoryview(content)
    while left.nbytes:
        written = os.pwrite(descriptor, left, at)
        left, at = left[written:], at + written
