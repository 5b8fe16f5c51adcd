"""Disk space of a file whose beginning nobody needs any more."""

from __future__ import annotations

import ctypes
import sys

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of Linux's fallocate."""


def give_back(descriptor: int, until: int) -> None:
    """Frees the blocks of bytes 0 to `until`, which read as zeros from then on. Everything else stays as it is.

    A file that another process writes to cannot be cut: its writing position would stay where it is. On Linux only;
    elsewhere, and on a file system without holes, it does nothing.
    """
    if sys.platform == "linux":
        fallocate = ctypes.CDLL(None).fallocate64
        fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(0), ctypes.c_int64(until))
