"""Whether this process can be forked into ranks that work."""

from __future__ import annotations

import os
from pathlib import Path

from shardproof.errors import UsageError

_WAY_OUT = "start the ranks before that (call check, or fit of the Trainer, before), or use the command line"


def refuse_unsafe_fork(device: str) -> None:
    """Raises `UsageError` where forked ranks would hang or crash, with the way out."""
    why = unsafe_fork(device)
    if why is not None:
        raise UsageError(why)


def unsafe_fork(device: str) -> str | None:
    """Why forked ranks would hang or crash, with the way out; None where they would not."""
    if not hasattr(os, "fork"):
        return "this platform has no fork, which starts the ranks; use Linux or macOS, or torchrun"
    import torch  # noqa: PLC0415  (the room must be importable without torch)

    if device == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return f"CUDA is in use in this process already, and ranks forked from it cannot use it; {_WAY_OUT}"
    if any(name.startswith("pt_autograd_") for name in _threads()):
        return (
            "this process has run a backward pass, whose autograd threads do not survive the fork into ranks; "
            + _WAY_OUT
        )
    return None


def _threads() -> list[str]:
    """Names of this process's native threads; none where the system does not list them (macOS)."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:
            continue  # the thread has ended since it was listed
    return names
