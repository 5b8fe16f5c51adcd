"""Where hooks may be put: every module that runs as Python, and the outside of every compiled region."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardproof.parallel.names import ROOT, inside, join, within


@dataclass(frozen=True, slots=True)
class Place:
    """One module under its canonical name."""

    name: str
    """Canonical; `ROOT` for the model itself."""

    module: nn.Module
    """What is hooked: the user's own module, or whatever is compiled around it."""

    wrappers: tuple[nn.Module, ...]
    """What is around the user's own module, outermost first."""

    compiled: bool
    """Whether what lies inside runs compiled, so that no hook may be put there."""

    fragile: bool
    """Whether it computes otherwise in evaluation where there is a hook on it or in it."""


def compiled_by_wrapper(module: nn.Module) -> bool:
    """Whether this is what `torch.compile(module)` returns."""
    # Looked up by name: importing torch._dynamo costs 0.3 s and nothing here needs it otherwise.
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch.")


def compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def wrappers_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The wrappers around the user's own module, outermost first; empty for a bare one."""
    found: list[nn.Module] = []
    while (inner := within(module)) is not None:
        found.append(module)
        module = inner
    return tuple(found)


def places(model: nn.Module) -> Iterator[Place]:
    """Every place outside of compiled regions, parents first, a shared module once under its first name."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str, fragile: bool) -> Iterator[Place]:
        wrappers, own = wrappers_of(module), inside(module)
        if id(own) in seen:
            return
        seen.add(id(own))
        around = [wrapper for wrapper in wrappers if compiled_by_wrapper(wrapper) or compiled_in_place(wrapper)]
        # In evaluation it leaves its fast path for modules that carry hooks.
        fragile = fragile or isinstance(own, nn.TransformerEncoderLayer)
        if around or compiled_in_place(own):
            yield Place(name or ROOT, around[0] if around else own, wrappers, True, fragile)
            return
        yield Place(name or ROOT, own, wrappers, False, fragile)
        for child_name, child in own.named_children():
            yield from walk(child, join(name, child_name), fragile)

    return walk(model, "", False)
