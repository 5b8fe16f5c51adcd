"""Plain names for the modules of a laid-out model, whatever wraps them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

ROOT = "(root)"
"""Name of the model itself where a name has to be shown."""


def within(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around, by its type: a model may own an attribute called `module`. None for what is none."""
    kind = type(module)
    found: object = None
    if isinstance(module, DistributedDataParallel | DataParallel | FullyShardedDataParallel):
        found = module.module
    elif isinstance(module, ActivationWrapper):
        found = module._checkpoint_wrapped_module
    elif kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        # Looked up by name: importing torch._dynamo costs 0.3 s and nothing here needs it otherwise.
        found = module._orig_mod
    elif kind.__name__ == "_FabricModule" and kind.__module__.startswith("lightning"):
        found = module._forward_module
    return found if isinstance(found, nn.Module) else None


def inside(module: nn.Module) -> nn.Module:
    """The user's own module under any wrappers."""
    while (inner := within(module)) is not None:
        module = inner
    return module


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, unwrapped module) of every module, parents first; the root's name is empty.

    A module that stands in two places is yielded once, under its first name.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = inside(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, join(name, child_name))

    yield from walk(model, "")


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` at the root."""
    return f"{prefix}.{name}" if prefix else name


def canonical_buffers(model: nn.Module) -> Iterator[tuple[str, object]]:
    """(canonical name, buffer) of every buffer, those that are not saved included."""
    for prefix, module in canonical_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield join(prefix, name), buffer
