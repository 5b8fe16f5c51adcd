"""Hooks on the modules of a model: which of them is called, in which order, and whether that is training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from shardproof.parallel.names import ROOT
from shardproof.record.places import Place, compiled_in_place, places
from shardproof.record.quiet import recomputing, transformed


class Seen(Protocol):
    """Who is told of calls that are training."""

    def enters(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the outermost module: the model, or a part of it that the loop calls by itself."""

    def evaluates(self) -> None:
        """The model is called for evaluation."""

    def leaves(self, name: str, output: Any) -> None:
        """A module returned."""

    def recomputes(self, name: str, output: Any) -> None:
        """A module returned once more, inside of backward."""


class Calls:
    """The hooks on one model. They return nothing, so that no output is replaced, and keep nothing of what they see."""

    def __init__(self, chain: Iterable[nn.Module], seen: Seen) -> None:
        """`chain`: the outermost wrapper of the model, and all that is inside it down to the user's own module."""
        self._chain = tuple(chain)
        self._seen = seen
        self._handles: dict[int, list[Any]] = {}
        self._in_place: list[tuple[nn.Module, Any]] = []
        self._fragile: list[Place] = []
        self._stack: list[tuple[int, bool]] = []
        """(id of the module, whether it trains) of the calls that are under way."""
        self.compiled: tuple[str, ...] = ()
        """Modules inside of which nothing is seen, as they run compiled."""

    def install(self) -> None:
        """Hook whatever is not hooked yet. Fragile modules are hooked while a training call is under way."""
        found = list(places(self._chain[0]))
        self.compiled = tuple(place.name for place in found if place.compiled)
        hidden = any(place.compiled and place.name == ROOT for place in found)
        for module in self._chain:
            # Inside of a compiled wrapper nothing may be hooked, whoever calls it.
            if hidden and module is not found[0].module and any(module is m for m in self._inner(found[0])):
                continue
            if module is not found[0].module:
                self._watch(ROOT, module, shows=False)
        for place in found:
            if place.fragile and place.name != ROOT:
                self._fragile.append(place)
            else:
                self._watch(place.name, place.module, shows=True)

    def tell(self, seen: Seen) -> None:
        """From now on it is somebody else who is told."""
        self._seen = seen
        self._stack.clear()

    def remove(self) -> None:
        """Take every hook away."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        for module, call in self._in_place:
            module._compiled_call_impl = call
        self._handles.clear()
        self._in_place.clear()
        self._fragile.clear()
        self._stack.clear()

    def _inner(self, root: Place) -> tuple[nn.Module, ...]:
        after = [i for i, module in enumerate(self._chain) if module is root.module]
        return self._chain[after[0] + 1 :] if after else ()

    def _watch(self, name: str, module: nn.Module, *, shows: bool) -> None:
        """`shows`: what it returns is an output of its own, and not only passed on by a wrapper."""
        if id(module) in self._handles:
            return
        if compiled_in_place(module):
            self._watch_compiled(name, module, shows=shows)
            return
        before, after = partial(_before, self, name), partial(_after, self, name, shows)
        self._handles[id(module)] = [
            # First, as hooks of a layout may turn the input into something else.
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            # Called after an exception too, so that a call that failed does not stay under way.
            module.register_forward_hook(after, always_call=True),
        ]

    def _watch_compiled(self, name: str, module: nn.Module, *, shows: bool) -> None:
        compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]

        def call(*args: Any, **kwargs: Any) -> Any:
            _before(self, name, module, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                _after(self, name, shows, module, args, output)
            return output

        self._handles[id(module)] = []
        self._in_place.append((module, compiled))
        module._compiled_call_impl = call

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a module's forward."""
        if self._stack:
            self._stack.append((id(module), self._stack[0][1]))
            return
        # Evaluation under dropout's training mode is told by no_grad, a frozen part of a model by what calls it.
        trains = torch.is_grad_enabled() and module.training
        self._stack.append((id(module), trains))
        if trains:
            for place in self._fragile:
                self._watch(place.name, place.module, shows=True)
            self._seen.enters(name, args, kwargs)
        elif name == ROOT:
            self._seen.evaluates()

    def left(self, name: str, module: nn.Module, output: Any, *, shows: bool) -> None:
        """After a module's forward."""
        ids = [own for own, _ in self._stack]
        if id(module) not in ids:
            return
        at = len(ids) - 1 - ids[::-1].index(id(module))
        trains = self._stack[at][1]
        del self._stack[at:]
        if trains and shows:
            self._seen.leaves(name, output)
        if not self._stack:
            for place in self._fragile:
                for handle in self._handles.pop(id(place.module), []):
                    handle.remove()

    def recomputed(self, name: str, output: Any) -> None:
        """After a module's forward inside of backward."""
        self._seen.recomputes(name, output)


def _before(calls: Calls, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Compiled code has this traced away, and is the same as without a hook.
    if torch.compiler.is_compiling():
        return
    if not recomputing() and not transformed():
        calls.entered(name, module, args, kwargs)


def _after(calls: Calls, name: str, shows: bool, module: nn.Module, _args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if transformed():
        return
    if not recomputing():
        calls.left(name, module, output, shows=shows)
    elif shows:
        calls.recomputed(name, output)
