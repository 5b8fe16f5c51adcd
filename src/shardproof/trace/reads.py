"""Which samples a rank read, known by their content."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from shardproof.trace.leaves import leaves

DIGEST_BYTES = 12
"""Two different samples share a digest with a chance of 1e-11 among a hundred million."""


def digests(batch: Any) -> tuple[str, ...]:
    """A digest of the content of every sample of a batch, or one for all of it where its tensors share no first dim.

    Shapes and dtypes count, so that a padded sample is not the unpadded one.
    """
    tensors = [leaf for _, leaf in leaves(batch)]
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in tensors}
    if len(sizes) != 1 or -1 in sizes:
        return (_digest(tensors),)
    return tuple(_digest([tensor[i] for tensor in tensors]) for i in range(sizes.pop()))


def _digest(sample: list[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for tensor in sample:
        value = tensor.detach().cpu().contiguous()
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        # Bytes, not numbers: bfloat16 has no NumPy type, and NaN must equal itself.
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
