"""Work inside a hook that leaves no trace in the user's own run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No graph, no autocast, and none of the modes that see or keep every operation.

    Selective activation checkpointing, to name one, numbers the operations of a forward pass and expects them again in
    the recomputation: a copy made in between would be taken for the model's own. Under autocast a sketch would be a
    product in bfloat16.
    """
    with torch.no_grad(), torch._C._DisableAutocast():
        # Hardly ever is there a mode, and this is entered for every record.
        if not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack():
            yield
            return
        with _no_modes():
            yield


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch._C.DisableTorchFunction())
        yield


def recomputing() -> bool:
    """Whether backward is running, where activation checkpointing runs forward again: that is no new call."""
    return torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """Whether this is a pass under `torch.func`: what it hands around are no tensors with values of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None
