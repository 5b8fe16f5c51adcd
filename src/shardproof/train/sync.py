"""Gradient reduction only where it is due: in the last micro-batch's backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def gradient_sync(model: nn.Module, due: bool) -> Iterator[None]:
    """Inside, the modules that reduce gradients by themselves (DDP, FSDP) do so only if `due`.

    Any other module keeps its own habits: a user's `parallelize` owes averaged gradients after the last backward.
    """
    with contextlib.ExitStack() as stack:
        for module in _reducers(model):
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(due)
            elif not due:
                stack.enter_context(module.no_sync())
        yield


def _reducers(module: nn.Module) -> Iterator[DistributedDataParallel | FullyShardedDataParallel | FSDPModule]:
    """The outermost modules that reduce gradients; each of them speaks for those inside it."""
    if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _reducers(child)
