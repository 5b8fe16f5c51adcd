"""One recorded step, seen from the hooks: what is written when."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import SUPPORTED_NODES

from shardproof.parallel import piece
from shardproof.parallel.held import Held, held_parameters, plain
from shardproof.parallel.names import ROOT
from shardproof.parallel.seeding import generator_states
from shardproof.record.hints import hinted
from shardproof.record.out import Out
from shardproof.record.quiet import quietly
from shardproof.trace.leaves import leaves
from shardproof.trace.reads import digests
from shardproof.trace.states import CAUSES, State, buffers, optimizer_state, weights


class Observer:
    """Follows one optimizer step from its first forward pass to the state that it leaves."""

    def __init__(
        self,
        out: Out,
        step: int,
        model: nn.Module,
        *,
        first: bool,
        opens: Callable[[nn.Module], nn.Module],
        peers: Callable[[], Sequence[int]],
    ) -> None:
        """`first`: nothing was recorded before it, so that the state that it starts from is written as well.

        `opens` is called when the step begins, before anything is written of it, and returns the model as it is by
        then; `peers` tells the ranks of the tensor-parallel group, for parameters that say that they are split over it.
        """
        self.step = step
        self.begun = False
        self.evaluations = 0
        self._out, self._model, self._first, self._opens = out, model, first, opens
        self._peers = peers
        self._parameters: list[Held] = []
        self._optimizers: list[Optimizer] = []
        self._hooks: list[Any] = []
        self._scale: float | None = None
        self._device = torch.device("cpu")
        self._forget()

    def _forget(self) -> None:
        """As at the beginning of the step."""
        self._calls: Counter[str] = Counter()
        self._entries: Counter[int] = Counter()
        self._microbatch = -1
        self._went_back = True
        self._backwards = 0
        self._losses: Counter[int] = Counter()
        self._samples: tuple[str, ...] = ()
        self._ungraded: dict[str, list[int]] = defaultdict(list)
        self._shown: set[int] = set()
        self._clipped: set[int] = set()
        self._norms = 0
        self._generator: tuple[int, ...] = ()
        self._steps_seen = 0

    # The course of a step.

    def begin(self) -> None:
        """The first sign of training: from here on everything belongs to this step."""
        if self.begun:
            return
        self.begun = True
        with quietly():
            self._model = self._opens(self._model)
            self._parameters = self._held()
            self._device = next((held.leaf.device for held in self._parameters), self._device)
            self._generator = generator_states(self._device)
        if self._first:
            states = [*weights(self._parameters), *buffers(self._model)]
            for optimizer in self._optimizers:
                states += optimizer_state(self._parameters, optimizer)
            self._initial(sorted(states, key=lambda state: CAUSES[state[0]]))

    def knows(self, optimizer: Optimizer) -> None:
        """This is one of the optimizers that make the step."""
        if any(optimizer is known for known in self._optimizers):
            return
        self._optimizers.append(optimizer)
        if self.begun and self._first:
            self._initial(optimizer_state(self._parameters, optimizer))

    def optimizer_begins(self, optimizer: Optimizer, *, closure: bool) -> None:
        """`closure`: the gradients are computed inside `optimizer.step(closure)`, and are seen at the step's end."""
        self.knows(optimizer)
        self.begin()
        self._steps_seen += 1
        if not closure:
            self._gradients(None if len(self._optimizers) == 1 else _leaves_of(optimizer))

    def end(self) -> None:
        """The step is over."""
        self.begin()
        self._gradients(None)
        state_left(self._out, self.step, self._model, self._parameters, self._optimizers)
        self.stop()
        facts = {} if self._scale is None else {"loss_scale": self._scale}
        self._out.event(
            "step",
            step=self.step,
            microbatches=self._microbatch + 1,
            backwards=self._backwards,
            evaluations=self.evaluations,
            **facts,
        )
        self._out.flush()

    def stop(self) -> None:
        """Take the hooks away that would keep, or be kept by, the graph of a step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # What modules show (`calls.Seen`).

    def enters(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A training call of the model, or of a part of it that the loop calls by itself."""
        self.begin()
        if self._went_back:
            self._went_back = False
            self._microbatch += 1
            self._ungraded.clear()
        entry = self._entries[self._microbatch]
        self._entries[self._microbatch] += 1
        # What the loop drew to get here, for its data, is not what the model draws.
        self._generator = generator_states(self._device)
        with quietly():
            opened = (tuple(map(_opened, args)), {key: _opened(value) for key, value in kwargs.items()})
            given = [(path, leaf) for path, leaf in leaves(opened) if not leaf.is_meta]
            self._samples = digests([plain(leaf).cpu() for _, leaf in given]) if given else ()
        # Of a part that is called by itself its name, of a second call before backward its number.
        prefix = ("" if name == ROOT else f"{name}:") + (f"+{entry}" if entry else "")
        for path, leaf in given:
            self._add("batch", "batch", leaf, part=prefix + path, call=self._microbatch, samples=self._samples)

    def evaluates(self) -> None:
        """A pass that is not training is counted, so that a trace says that there was one."""
        self.evaluations += 1

    def leaves(self, name: str, output: Any) -> None:
        """The output of a module, and soon the gradient that reaches it."""
        call = self._calls[name]
        self._calls[name] += 1
        found = list(leaves(_opened(output)))
        if not (self._out.wants("forward", name) or self._out.wants("backward", name)):
            return
        draws = self._draws()
        for path, leaf in found:
            self._add("forward", name, leaf, part=path, call=call, draws=draws, samples=self._samples)
        if torch.is_grad_enabled():
            self._watch_gradients(name, found, call, self._samples)
        elif found:
            # Reentrant checkpointing: the graph comes into being in the recomputation.
            self._ungraded[name].append(call)

    def recomputes(self, name: str, output: Any) -> None:
        """The same call once more: nothing new, but where it had no graph before, that is here."""
        waiting = self._ungraded.get(name, [])
        # Of several calls nothing tells which one this is.
        if len(waiting) == 1 and torch.is_grad_enabled():
            self._watch_gradients(name, list(leaves(_opened(output))), waiting.pop(), self._samples)

    def _watch_gradients(
        self, name: str, found: Iterable[tuple[str, Tensor]], call: int, samples: Sequence[str]
    ) -> None:
        if not self._out.wants("backward", name):
            return
        for path, leaf in found:
            # A module may return its own parameter: a hook on that would outlive the step.
            if leaf.requires_grad and not leaf.is_leaf:
                hook = partial(self._output_gradient, name, path, call, samples)
                self._hooks.append(leaf.register_hook(hook))  # type: ignore[no-untyped-call]

    def _output_gradient(self, name: str, path: str, call: int, samples: Sequence[str], grad: Tensor) -> None:
        self._add("backward", name, grad, part=path, call=call, samples=samples)

    # What the loop calls (`swaps.Listener`).

    def backward_begins(self, tensors: Iterable[Tensor]) -> None:
        """The tensors on which backward is called: the loss, or what stands for it."""
        self.begin()
        at = max(self._microbatch, 0)
        for tensor in tensors:
            number = self._losses[at]
            self._losses[at] += 1
            part = f"backward[{number}]" if number else "backward"
            self._add("loss", ROOT, tensor, part=part, call=at, draws=self._draws())

    def backward_ends(self) -> None:
        """With the next forward pass a new micro-batch begins."""
        self._went_back = True
        self._backwards += 1

    def clips(self, parameters: Iterable[Tensor] | None, norm: Tensor | None) -> None:
        """Gradients are complete, and not clipped yet."""
        own = {id(held.leaf) for held in self._parameters}
        chosen = own if parameters is None else own & {id(parameter) for parameter in parameters}
        if not self.begun or not chosen:
            return
        self._gradients(chosen)
        self._clipped |= chosen
        if norm is not None:
            self._norm(norm)

    def clipped(self, norm: Tensor) -> None:
        """FSDP's own clipping tells the norm afterwards."""
        if self.begun and not self._norms:
            self._norm(norm)

    def scaled(self, scale: float) -> None:
        """The loss was multiplied before backward."""
        self._scale = scale

    def steps_seen(self) -> int:
        """How many optimizers have stepped."""
        return self._steps_seen

    def scaler_returned(self, optimizer: Optimizer, seen: int) -> None:
        """Where a gradient was not finite, the scaler has not let the optimizer step: the step is tried again."""
        own = any(optimizer is known for known in self._optimizers) or not self._optimizers
        if self.begun and own and seen == self._steps_seen:
            self._out.event("skipped", step=self.step, loss_scale=self._scale)
            self.stop()
            self._forget()
            self._generator = generator_states(self._device)

    # One record.

    def _norm(self, norm: Tensor) -> None:
        part = f"norm[{self._norms}]" if self._norms else "norm"
        self._norms += 1
        where = None if isinstance(norm, DTensor) else piece.whole(())
        self._add("grad-norm", ROOT, norm, part=part, where=where)

    def _gradients(self, chosen: set[int] | None) -> None:
        """Of these leaves, or of all: the gradient, or what clipping has left of it."""
        if not self._parameters:
            self._parameters = self._held()
        # Backward runs from the last layer to the first, so that is the order in which a wrong one spreads.
        for stage, part in (("gradient", ""), ("grad-norm", "clipped")):
            shown: set[int] = set()
            for held in reversed(self._parameters):
                key = id(held.leaf)
                due = key in self._clipped if part else key not in self._shown
                if not held.leaf.requires_grad or not due or (chosen is not None and key not in chosen):
                    continue
                shown.add(key)
                grad = held.leaf.grad
                where = held.piece if grad is None else held.piece_of(grad)
                with quietly():
                    local = None if grad is None else held.local(grad.to_dense() if grad.is_sparse else grad)
                self._add(stage, held.name, local, part=part, where=where)
            self._shown |= shown
            if part:
                self._clipped -= shown

    def _initial(self, states: Iterable[State]) -> None:
        for _, name, part, tensor, where in states:
            self._out.add(self.step - 1, "initial-state", name, tensor, part=part, where=where)

    def _held(self) -> list[Held]:
        # A lazy parameter has no shape before the first forward pass.
        lazy = any(is_lazy(parameter) for parameter in self._model.parameters())
        return [] if lazy else hinted(held_parameters(self._model), self._peers())

    def _add(self, stage: str, name: str, tensor: Tensor | None, **rest: Any) -> None:
        self._out.add(self.step, stage, name, tensor, **rest)

    def _draws(self) -> int:
        """Fingerprint of the generators that have been drawn from since the model was called; 0 where none has.

        Those that the model leaves alone say nothing: Python seeds its own anew in every process.
        """
        now = generator_states(self._device)
        drawn = tuple(
            (n, own) for n, (own, before) in enumerate(zip(now, self._generator, strict=False)) if own != before
        )
        return hash(drawn) or 1 if drawn else 0


def state_left(
    out: Out, step: int, model: nn.Module, parameters: Iterable[Held], optimizers: Iterable[Optimizer]
) -> None:
    """Write what a step leaves behind, in the order of causes: optimizer state, weights, buffers."""
    parameters = list(parameters)
    states: list[State] = []
    with quietly():
        for optimizer in optimizers:
            states += optimizer_state(parameters, optimizer)
        states += weights(parameters)
        states += buffers(model)
    for stage, name, part, tensor, where in states:
        out.add(step, stage, name, tensor, part=part, where=where)


def _leaves_of(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _opened(value: Any) -> Any:
    """What is inside of a mapping or a dataclass of a library, where torch's pytree does not know its class."""
    if isinstance(value, Mapping) and type(value) not in SUPPORTED_NODES:
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type) and type(value) not in SUPPORTED_NODES:
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value
