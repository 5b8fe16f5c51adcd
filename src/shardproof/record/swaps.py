"""Functions of torch that are seen through while a recorded step is running: backward, clipping, gradient scaling.

One stand-in for each, put in place when the first listener comes and taken away with the last one, so that two
recordings in one process do not put back each other's. A stand-in calls what it stands for with what it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from shardproof.record.quiet import recomputing


class Listener(Protocol):
    """Who is told what the training loop calls."""

    def backward_begins(self, tensors: Iterable[Tensor]) -> None: ...

    def backward_ends(self) -> None: ...

    def clips(self, parameters: Iterable[Tensor] | None, norm: Tensor | None) -> None:
        """Gradients are about to be clipped; None stands for all parameters, and for a norm not known yet."""

    def clipped(self, norm: Tensor) -> None:
        """They have been, with this norm before."""

    def scaled(self, scale: float) -> None: ...

    def steps_seen(self) -> int: ...

    def scaler_returned(self, optimizer: Optimizer, seen: int) -> None:
        """`GradScaler.step` is back; `seen` is what `steps_seen` was before."""


_listeners: list[Listener] = []
_before: list[tuple[Any, str, Any, Any]] = []
"""Owner, attribute, what was there, what stands in for it."""


def listen(listener: Listener) -> None:
    """Tell `listener` from now on."""
    if not _listeners:
        for owner, attribute, made in _STAND_INS:
            before = getattr(owner, attribute)
            stand_in = functools.wraps(before)(made(before))
            setattr(owner, attribute, stand_in)
            _before.append((owner, attribute, before, stand_in))
    if listener not in _listeners:
        _listeners.append(listener)


def unlisten(listener: Listener) -> None:
    """Tell it no more; with the last listener everything is put back."""
    if listener in _listeners:
        _listeners.remove(listener)
    if _listeners:
        return
    while _before:
        owner, attribute, before, stand_in = _before.pop()
        # What somebody put over it since is theirs to take away; ours then only passes on.
        if getattr(owner, attribute) is stand_in:
            setattr(owner, attribute, before)


Function = Callable[..., Any]


def _silent() -> bool:
    return torch.compiler.is_compiling() or recomputing()


def _backward(before: Function) -> Function:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if _silent():
            return before(tensors, *args, **kwargs)
        for listener in tuple(_listeners):
            listener.backward_begins((tensors,) if isinstance(tensors, Tensor) else tuple(tensors))
        result = before(tensors, *args, **kwargs)
        for listener in tuple(_listeners):
            listener.backward_ends()
        return result

    return backward


def _clip_with_norm(before: Function) -> Function:
    """`clip_grad_norm_` calls this for the clipping itself, however the user came by `clip_grad_norm_`."""

    def clip(parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any) -> Any:
        if not _silent():
            own = (parameters,) if isinstance(parameters, Tensor) else (parameters := list(parameters))
            for listener in tuple(_listeners):
                listener.clips(own, total_norm)
        return before(parameters, max_norm, total_norm, *args, **kwargs)

    return clip


def _clip_value(before: Function) -> Function:
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if not _silent():
            own = (parameters,) if isinstance(parameters, Tensor) else (parameters := list(parameters))
            for listener in tuple(_listeners):
                listener.clips(own, None)
        return before(parameters, *args, **kwargs)

    return clip


def _clip_flat(before: Function) -> Function:
    def clip(self: FullyShardedDataParallel, *args: Any, **kwargs: Any) -> Any:
        for listener in tuple(_listeners):
            listener.clips(None, None)
        norm = before(self, *args, **kwargs)
        for listener in tuple(_listeners):
            listener.clipped(norm)
        return norm

    return clip


def _scale(before: Function) -> Function:
    def scale(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, *args, **kwargs)
        if self.is_enabled():
            for listener in tuple(_listeners):
                listener.scaled(self.get_scale())
        return result

    return scale


def _scaler_step(before: Function) -> Function:
    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        seen = [(listener, listener.steps_seen()) for listener in tuple(_listeners)]
        result = before(self, optimizer, *args, **kwargs)
        for listener, number in seen:
            listener.scaler_returned(optimizer, number)
        return result

    return step


_STAND_INS: tuple[tuple[Any, str, Callable[[Function], Function]], ...] = (
    # Tensor.backward looks it up there.
    (torch.autograd, "backward", _backward),
    (clip_grad, "_clip_grads_with_norm_", _clip_with_norm),
    (torch.nn.utils, "clip_grads_with_norm_", _clip_with_norm),
    (clip_grad, "clip_grad_value_", _clip_value),
    (torch.nn.utils, "clip_grad_value_", _clip_value),
    (FullyShardedDataParallel, "clip_grad_norm_", _clip_flat),
    (torch.amp.GradScaler, "scale", _scale),
    (torch.amp.GradScaler, "step", _scaler_step),
)
