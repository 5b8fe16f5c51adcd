"""Data files mapped into memory, and given back to the system as more and more of them has been read."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

TOUCHED_BYTES = 256 * 2**20
"""Bytes that may be read before all pages are given back."""


class Pages:
    """The mapped files of a recording.

    Tensors are views of the files, no copies. The maps are private: who writes into such a tensor changes neither the
    file nor, for long, the tensor, whose pages may be read anew at any time. torch maps the files, as its maps keep no
    file open; Python's own do, and a thousand ranks have more files than a process may have open.
    """

    def __init__(self, touched_bytes: int = TOUCHED_BYTES) -> None:
        self._limit = touched_bytes
        self._touched = 0
        self._maps: dict[Path, Tensor] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)

    def read(self, path: Path, at: int, size: int) -> Tensor:
        """All bytes of `path`, uint8, of which `size` from byte `at` on are read. Raises `OSError` where the file has
        not got them."""
        self.touch(size)
        whole = self._maps.get(path)
        if whole is None or at + size > whole.numel():
            whole = self._maps[path] = _mapped(path, at + size)
        return whole

    def touch(self, size: int) -> None:
        """Note that so many bytes are read next."""
        if self._touched + size > self._limit:
            self.give_back()
        self._touched += size

    def give_back(self) -> None:
        """Let the system have all pages; a tensor that is still held reads them again when it is used."""
        for whole in self._maps.values():
            self._libc.madvise(
                ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(whole.numel()), ctypes.c_int(mmap.MADV_DONTNEED)
            )
        self._touched = 0


def _mapped(path: Path, least: int) -> Tensor:
    size = path.stat().st_size
    if size < least:
        raise OSError(f"{path} has {size} bytes, and had {least} when its index was read")
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be mapped: {error}") from None
    return torch.empty(0, dtype=torch.uint8).set_(cast("torch.UntypedStorage", storage))
