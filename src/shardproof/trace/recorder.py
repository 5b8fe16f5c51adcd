"""Watch one rank train, and keep what it showed. Nothing here changes what is computed or calls a collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from shardproof.parallel import piece
from shardproof.parallel.held import Held
from shardproof.parallel.names import ROOT, canonical_modules
from shardproof.parallel.piece import Piece
from shardproof.parallel.seeding import generators
from shardproof.spec.loss import LossSum
from shardproof.trace.file import save
from shardproof.trace.leaves import leaves
from shardproof.trace.record import Record
from shardproof.trace.states import CAUSES, State, as_kept, buffers, optimizer_state, weights
from shardproof.trace.untraced import untraced


class Recorder:
    """Everything that one rank shows of its steps, in the order in which it happens.

    `train.step.Observer` is the part of it that the step itself speaks to.
    """

    def __init__(self, device: torch.device, *, clipped_by_user: bool = False, inputs: bool = False) -> None:
        """`clipped_by_user`: the optimizer sees gradients that the user's own step has clipped.

        `inputs`: what enters each module is recorded as well, and the gradient that leaves it there.
        """
        self.device = device
        self._inputs = inputs
        self._clipped_by_user = clipped_by_user
        self.entries: list[tuple[Record, Tensor | None]] = []
        self._step = -1
        self._calls: Counter[tuple[str, str]] = Counter()
        self._microbatch = 0
        self._open = False
        self._seen: set[str] = set()
        self._generator = 0
        self._parameters: list[Held] = []
        self._left: dict[tuple[str, str], tuple[Tensor, Piece | None]] = {}
        """(name, part) of weights, optimizer state and buffers -> what the last step left, and where it lies."""
        self._resumed = True
        self._state: Callable[[], Iterable[State]] = tuple

    # What is watched.

    def attach(
        self,
        model: nn.Module,
        parameters: list[Held],
        optimizer: Optimizer,
        now: Callable[[], Iterable[Held]] | None = None,
    ) -> None:
        """Hook every module's output and the optimizer's step; record the state before the first step.

        `now` finds the model's parameters again, where somebody may have put others in their place.
        """
        self._parameters = parameters
        self._state = lambda: self._state_of(model, parameters if now is None else now(), optimizer)
        model.register_forward_pre_hook(untraced(lambda _module, _args: self._resume()), prepend=True)
        for name, module in canonical_modules(model):
            module.register_forward_hook(untraced(partial(self._output, name or ROOT)))
            if self._inputs:
                # Before the hooks of a layout, which may turn the input into something else.
                hook = untraced(partial(self._input, name or ROOT))
                module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        optimizer.register_step_pre_hook(lambda _optimizer, args, kwargs: self._before_optimizer(args, kwargs))
        for _, name, part, tensor, where in sorted(
            self._state_of(model, parameters, optimizer), key=lambda s: CAUSES[s[0]]
        ):
            self._add("initial-state", name, tensor, part=part, where=where)

    def loss(self, loss: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        """The experiment's loss, with what it returns recorded."""

        def recorded(model: nn.Module, batch: Any) -> Any:
            self._resume()
            value = loss(model, batch)
            call, self._microbatch = self._microbatch, self._microbatch + 1
            draws = self._draws()
            if isinstance(value, LossSum):
                count = torch.as_tensor(value.count, dtype=torch.float64).detach()
                self._add("loss", ROOT, value.total, part="total", call=call, draws=draws)
                self._add("loss", ROOT, count, part="count", call=call, draws=draws)
            elif isinstance(value, Tensor):
                self._add("loss", ROOT, value, part="local", call=call, draws=draws)
            return value

        return recorded

    # The course of a step.

    def begin(self, step: int, microbatches: Iterable[tuple[Any, float]]) -> None:
        """A step starts with these micro-batches and their weights."""
        self._step = step
        self._calls.clear()
        self._microbatch = 0
        self._seen.clear()
        self._generator = self._fingerprint()
        for call, (batch, weight) in enumerate(microbatches):
            for path, leaf in leaves(batch):
                self._add("batch", "batch", leaf, part=path, call=call, weight=weight)
        self._open = True
        self._resumed = False

    def _resume(self) -> None:
        """Before the first forward pass of a step: whatever is not as the step before left it was loaded or changed."""
        if self._resumed or not self._open:
            return
        self._resumed = True
        lost = dict(self._left)
        for _, name, part, tensor, where in self._state() if self._left else ():
            known = lost.pop((name, part), None)
            if known is not None and not torch.equal(as_kept(tensor), known[0]):
                # Of the step before: that is where it belongs in the order of causes.
                self._add("checkpoint", name, tensor, part=part, where=where, step=self._step - 1)
        for (name, part), (_, where) in lost.items():
            self._add("checkpoint", name, None, part=part, where=where, step=self._step - 1)

    def gradients(self) -> None:
        """Gradients are complete and not yet clipped."""
        self._gradients("gradient")

    def norm(self, norm: Tensor) -> None:
        """The global gradient norm before clipping."""
        self._seen.add("norm")
        self._add("grad-norm", ROOT, norm, part="norm", where=piece.whole(()))

    def end(self, model: nn.Module, parameters: Iterable[Held], optimizer: Optimizer, logged: Any) -> None:
        """The step is over and would log this loss; `parameters` are the model's own as they are now."""
        # A user's step that never called optimizer.step() still has gradients to show.
        self._see_gradients()
        self._open = False
        value = logged if isinstance(logged, Tensor) else torch.as_tensor(float(logged), dtype=torch.float64)
        self._add("loss", ROOT, value, part="logged")
        self._left = {}
        for stage, name, part, tensor, where in self._state_of(model, parameters, optimizer):
            kept = self._add(stage, name, tensor, part=part, where=where)
            if kept is not None:
                self._left[name, part] = (kept, where)

    def save(self, path: Path) -> None:
        """Write everything recorded so far to `path`."""
        save(path, self.entries)

    # One record.

    def _before_optimizer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure computes the gradients inside optimizer.step(closure); they are seen at the end of the step.
        closure = kwargs.get("closure") or next((value for value in args if not isinstance(value, Optimizer)), None)
        if self._open and closure is None:
            self._see_gradients()

    def _see_gradients(self) -> None:
        if self._clipped_by_user or "norm" in self._seen:
            self._gradients("grad-norm")
        else:
            self._gradients("gradient")

    def _gradients(self, stage: str) -> None:
        if stage in self._seen:
            return
        self._seen.add(stage)
        part = "clipped" if stage == "grad-norm" else ""
        # Backward runs from the last layer to the first, so that is the order in which a wrong one spreads.
        for held in reversed(self._parameters):
            if held.leaf.requires_grad:
                grad = held.leaf.grad
                where = held.piece if grad is None else held.piece_of(grad)
                self._add(stage, held.name, None if grad is None else held.local(grad), part=part, where=where)

    def _output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Activation checkpointing runs forward again inside backward: that is no new call.
        if not self._open or torch._C._current_graph_task_id() != -1:
            return
        call = self._calls[name, "forward"]
        self._calls[name, "forward"] += 1
        draws = self._draws()
        for path, leaf in leaves(output):
            self._add("forward", name, leaf, part=path, call=call, draws=draws)
            # A module may return its own parameter: a hook on that would outlive the step.
            if leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(partial(self._output_gradient, name, path, call))  # type: ignore[no-untyped-call]

    def _input(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._open or torch._C._current_graph_task_id() != -1:
            return None
        call = self._calls[name, "input"]
        self._calls[name, "input"] += 1
        for path, leaf in leaves((args, kwargs)):
            self._add("input", name, leaf, part=path, call=call)
        if sum(1 for _ in leaves((args, kwargs))) != 1:
            return None

        def watched(leaf: Tensor) -> Tensor:
            if not leaf.requires_grad:
                return leaf
            # A name of its own, so that only what this module sends back arrives there.
            own = leaf.view_as(leaf)
            own.register_hook(partial(self._input_gradient, name, call))  # type: ignore[no-untyped-call]
            return own

        return tree_map_only(Tensor, watched, (args, kwargs))

    def _input_gradient(self, name: str, call: int, grad: Tensor) -> None:
        if self._open:
            self._add("input-gradient", name, grad, call=call)

    def _output_gradient(self, name: str, path: str, call: int, grad: Tensor) -> None:
        if self._open:
            self._add("backward", name, grad, part=path, call=call)

    def _state_of(self, model: nn.Module, parameters: Iterable[Held], optimizer: Optimizer) -> Iterator[State]:
        """What a step leaves behind, in the order of causes: optimizer state, weights, buffers."""
        yield from optimizer_state(self._parameters, optimizer)
        yield from weights(parameters)
        yield from buffers(model)

    def _add(  # noqa: PLR0913 (the fields of a record)
        self,
        stage: str,
        name: str,
        tensor: Tensor | None,
        *,
        part: str = "",
        call: int = 0,
        where: Piece | None = None,
        draws: int = 0,
        weight: float = 1.0,
        step: int | None = None,
    ) -> Tensor | None:
        if isinstance(tensor, DTensor) and where is None:
            where = piece.of_tensor(tensor)
        if where is not None and tensor is not None and tensor.is_complex():
            where = where.as_real()
        record = Record(
            step=self._step if step is None else step,
            stage=stage,
            name=name,
            part=part,
            call=call,
            piece=where,
            missing=tensor is None,
            draws=draws,
            weight=weight,
        )
        kept = None if tensor is None else _kept(tensor)
        self.entries.append((record, kept))
        return kept

    def _draws(self) -> int:
        """Fingerprint of the generators if they have been drawn from since the step began, else 0."""
        now = self._fingerprint()
        return 0 if now == self._generator else now

    def _fingerprint(self) -> int:
        return generators(self.device) or 1


def _kept(tensor: Tensor) -> Tensor:
    """A copy of what this rank holds, in the one form that is written and compared: dense, complex as pairs of reals.

    safetensors knows neither sparse tensors nor complex numbers, and a distance is a real number.
    """
    return as_kept(tensor).clone()
