"""Carry a file from one rank to rank 0, where ranks do not see each other's disks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

CHUNK_BYTES = 16 * 2**20
"""Bytes in one message: large enough to be quick, small beside a model."""


def send_file(path: Path) -> None:
    """Send `path` to rank 0 of the default process group, which must call `receive_file`."""
    size = path.stat().st_size
    dist.send(torch.tensor([size]), dst=0)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            dist.send(torch.from_numpy(np.frombuffer(bytearray(chunk), dtype=np.uint8)), dst=0)


def receive_file(path: Path, source: int) -> None:
    """Write what rank `source` sends to `path`."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, src=source)
    left = int(size)
    with path.open("wb") as file:
        while left:
            chunk = torch.empty(min(left, CHUNK_BYTES), dtype=torch.uint8)
            dist.recv(chunk, src=source)
            file.write(chunk.numpy().tobytes())
            left -= chunk.numel()
