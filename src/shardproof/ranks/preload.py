"""What ranks import, imported once by the parent: a fork copies loaded modules for nothing."""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "torch",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch.utils.data",
    # Every optimizer loads it at its first use, 0.3 s in each rank, for its decorator that keeps compilers out.
    "torch._dynamo",
    "torch.distributed.tensor.debug",  # to clear caches between two worlds
    "torch.profiler._cupti_monitor",  # by every optimizer step; torch before 2.13 has no such file
)
"""What a training step of any strategy loads. A test runs one of each and finds nothing left to load."""


def preload() -> None:
    """Loads `MODULES` into this process: about 1 s. The first work of a command that is going to start ranks."""
    collecting = gc.isenabled()
    # Modules make much that lives on and little garbage: looking for garbage takes a quarter of the whole import.
    gc.disable()
    try:
        for name in MODULES:
            # What another version of torch does not have its ranks do not load either.
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
    finally:
        if collecting:
            gc.enable()
