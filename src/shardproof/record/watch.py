"""Record a training loop from the outside: `sp.record`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardproof.errors import UsageError
from shardproof.parallel.held import held_parameters
from shardproof.parallel.names import canonical_buffers, canonical_modules, inside
from shardproof.record.calls import Calls
from shardproof.record.disturbed import disturb_
from shardproof.record.facts import layout, outermost
from shardproof.record.observer import Observer, state_left
from shardproof.record.out import Out, own_rank
from shardproof.record.places import wrappers_of
from shardproof.record.rounds import Round
from shardproof.record.stepping import stepping
from shardproof.record.swaps import listen, unlisten
from shardproof.record.wanted import read_depths, read_names, read_steps
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import canonical_name, parse
from shardproof.trace.untraced import untraced

_watched: WeakSet[nn.Module] = WeakSet()
"""Models that are being recorded, without their wrappers."""


def record(  # noqa: PLR0913 (the one line that a user adds to a loop)
    directory: str | Path,
    model: nn.Module | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    steps: Iterable[int] | None = range(3),
    what: str | Mapping[str, str] = "full",
    names: str | Iterable[str] = ("*",),
    mesh: DeviceMesh | None = None,
    parallelism: str | Parallelism | None = None,
    disturb: int | None = None,
    overwrite: bool = False,
) -> Watch:
    """Record any training loop: `with sp.record("runs/a", model, optimizer): ...`, on every rank alike.

    `directory`: where the trace is written while the loop runs, a file or two a rank.
    `model`, `optimizer`: what the loop trains, wrapped or not; several optimizers as a list. What does not exist yet
    is given to `attach` later. Without an optimizer, the one that steps this model's parameters is found by itself.
    `steps`: optimizer steps to record, counted from 0 when the `with` is entered; None is all of them. A step that
    takes several optimizers ends when each of them has stepped, or when one steps a second time.
    `what`: "full" values, a "sketch" of each tensor, or "stats"; or a mapping from stages to these.
    `names`: wildcard patterns over canonical names of modules, parameters and buffers; "*" is all of them.
    `mesh`: a DeviceMesh with named axes, where the layout cannot be read from wrappers and DTensors.
    `parallelism`: the layout that is meant, as "fsdp" or "tp=2,dp_shard=2": it is held against what was found.
    `disturb`: a seed; the parameters are moved by one unit in the last place before the first recorded step, which
    tells how much of a difference is rounding. It is all that ever changes what the loop computes.
    `overwrite`: whether an older trace in `directory` may go.

    Passes under `no_grad`, `inference_mode` or `model.eval()` are evaluation, and are not recorded. Outside of the
    recorded steps only the steps are counted. A run that is killed leaves a recording that is valid up to there.

    Raises `UsageError` for arguments that cannot be meant, `PatternError` when the model is first seen for `names` that
    match nothing of it; and when the first record is written `UsageError` for a directory that holds a recording
    already (`overwrite`), `TraceError` for one that cannot be written.

    `sp.diff` compares two recordings, `shardproof show` prints one; docs/recording.md is a guide.
    """
    return Watch(
        Path(directory),
        model,
        optimizer,
        steps=steps,
        what=what,
        names=names,
        mesh=mesh,
        declared=_declared(parallelism),
        disturb=disturb,
        overwrite=overwrite,
    )


class Watch:
    """What `sp.record` returns: a context manager, to which models and optimizers may still be attached."""

    def __init__(  # noqa: PLR0913 (as `record`)
        self,
        directory: Path,
        model: nn.Module | None,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        *,
        steps: Iterable[int] | None,
        what: str | Mapping[str, str],
        names: str | Iterable[str],
        mesh: DeviceMesh | None,
        declared: str,
        disturb: int | None,
        overwrite: bool,
    ) -> None:
        self.directory = directory
        self.step = 0
        """The optimizer step that comes next, or that is under way."""
        self._wanted = read_steps(steps)
        self._names = read_names(names)
        depths = read_depths(what)
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise UsageError(f"mesh={mesh!r}: give a torch DeviceMesh whose axes have names")
        if disturb is not None and (isinstance(disturb, bool) or not isinstance(disturb, int)):
            raise UsageError(f"disturb={disturb!r}: give a whole number, the seed of the disturbance")
        self._mesh, self._declared, self._disturb = mesh, declared, disturb
        about = {
            "torch": torch.__version__,
            "steps": self._wanted.text,
            "what": depths,
            "names": list(self._names.patterns),
            "disturb": disturb,
        }
        self._out = Out(directory, about, depths, self._names, overwrite=overwrite)
        self._model: nn.Module | None = None
        self._round = Round()
        self._found = optimizer is None
        """Whether optimizers are found by whose parameters they step."""
        self._ours: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._step_hooks: list[Any] = []
        self._calls: Calls | None = None
        self._observer: Observer | None = None
        self._entered = self._closed = self._recorded = False
        self._layout_due = True
        self._peers: list[int] = []
        self.attach(model, optimizer)

    # What is watched.

    def attach(self, model: nn.Module | None = None, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Watch what was built after `record` was called: the model, a wrapper around it, one more optimizer.

        Raises `UsageError` after the last recorded step, and for a second model.
        """
        if self._closed:
            raise UsageError(
                f"attach: the last step to record is over (the loop is at step {self.step}); attach before it, "
                "or give more steps"
            )
        if model is not None:
            self._attach_model(model)
        for one in stepping(optimizer):
            if self._found and self._round.optimizers:
                raise UsageError(
                    f"attach: steps were counted by {type(self._round.optimizers[0]).__name__}, which was found by "
                    "itself; give the optimizers to record, or attach them before the first step"
                )
            if self._round.add(one):
                self._layout_due = True
                if self._found:
                    self._found = False
                    self._unhook_steps()
                if self._entered:
                    self._hook_steps(one)
                if self._observer is not None:
                    self._observer.knows(one)

    def _attach_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: {type(model).__name__} is no nn.Module; give the module that the loop trains")
        if self._model is not None and inside(model) is not inside(self._model) and self._recorded:
            raise UsageError(
                f"attach: {type(inside(self._model)).__name__} is recorded already, and {type(model).__name__} is "
                "another model; put both into one nn.ModuleDict and record that"
            )
        if self._entered:
            self._leave_model()
            self._model, before = model, self._observer
            self._enter_model()
            self._unhook_model()
            if before is None or not before.begun:
                self._disarm()
                self._arm()
            else:
                # A wrapper that comes in the middle of a step does not begin it anew.
                self._hook_model(before)
        self._model = model
        self._ours.clear()
        self._layout_due = True

    def __enter__(self) -> Watch:
        if self._entered:
            raise UsageError("record: this recording was entered before; call sp.record(...) anew for another")
        self._enter_model()
        self._entered = True
        if self._found:
            self._step_hooks += [register_optimizer_step_pre_hook(untraced(self._before_step))]
            self._step_hooks += [register_optimizer_step_post_hook(untraced(self._after_step))]
        for optimizer in self._round.optimizers:
            self._hook_steps(optimizer)
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closed:
            return
        unfinished = self._observer is not None and self._observer.begun
        unseen = "" if kind is not None or self._recorded else self._nothing_seen()
        try:
            if unfinished:
                self._out.event("unfinished", step=self.step)
            if kind is not None and self._out.opened:
                self._out.event("aborted", step=self.step, exception=kind.__name__, message=str(error))
        finally:
            self._close()
        if unseen:
            warnings.warn(unseen, stacklevel=2)

    def _nothing_seen(self) -> str:
        start = f"record: nothing was recorded in {self.directory}; "
        if self._model is None:
            return start + "no model was given: pass it to sp.record(directory, model), or rec.attach(model=model)"
        if self.step:
            return start + f"the loop took {self.step} steps, and none of them is among those to record"
        return start + (
            "the model was not called in training, and no optimizer stepped it, inside the `with`: attach the model "
            "that the loop calls and the optimizer that it steps"
        )

    # The course of the loop.

    def _enter_model(self) -> None:
        if self._model is None:
            return
        own = inside(self._model)
        if own in _watched:
            raise UsageError(
                f"record: this {type(own).__name__} is being recorded already; leave the outer `with` before, "
                "or record it once with what=... and names=... for both"
            )
        _watched.add(own)

    def _leave_model(self) -> None:
        if self._model is not None:
            _watched.discard(inside(self._model))

    def _arm(self) -> None:
        """Hook the model, where the step that comes next is to be recorded."""
        if self._model is None or self.step not in self._wanted:
            return
        before = self._observer
        self._observer = Observer(
            self._out,
            self.step,
            self._model,
            first=not self._recorded,
            opens=self._opens,
            peers=lambda: self._peers,
        )
        for optimizer in self._round.optimizers:
            self._observer.knows(optimizer)
        listen(self._observer)
        if before is not None:
            unlisten(before)
        if self._calls is None:
            self._hook_model(self._observer)
        else:
            self._calls.tell(self._observer)

    def _disarm(self) -> None:
        """Leave nothing behind on the model."""
        if self._observer is not None:
            self._observer.stop()
            unlisten(self._observer)
        self._observer = None
        self._unhook_model()

    def _hook_model(self, observer: Observer) -> None:
        if self._model is not None:
            self._calls = Calls((*wrappers_of(self._model), inside(self._model)), observer)
            self._calls.install()

    def _unhook_model(self) -> None:
        if self._calls is not None:
            self._calls.remove()
        self._calls = None

    def _opens(self, model: nn.Module) -> nn.Module:
        """A recorded step of `model` begins. Returns it with whatever is around it by now."""
        if self._layout_due:
            model = self._model = outermost(model)
        if not self._recorded:
            self._check_names(model)
            if self._disturb is not None:
                disturb_(held_parameters(model), self._disturb)
                self._out.event("disturbed", seed=self._disturb)
        self._tell_layout(model)
        self._recorded = True
        return model

    def _tell_layout(self, model: nn.Module) -> None:
        """Write what is known of the layout, where that has changed."""
        if not self._layout_due:
            return
        self._layout_due = False
        facts = layout(model, self._round.optimizers, self._mesh, self._declared)
        axes = facts["axes"]
        self._peers = axes.get("tp", []) if isinstance(axes, dict) else []
        self._out.event("layout", **facts)
        self._warn_of_strangers(model)
        if self._calls is not None and self._calls.compiled:
            self._out.event("compiled", modules=list(self._calls.compiled))

    def _check_names(self, model: nn.Module) -> None:
        modules = [name for name, _ in canonical_modules(model) if name]
        parameters = [held.name for held in held_parameters(model)]
        self._names.check(["(root)", *modules, *parameters, *(name for name, _ in canonical_buffers(model))])

    def _warn_of_strangers(self, model: nn.Module) -> None:
        own = {id(held.leaf) for held in held_parameters(model)}
        for optimizer in self._round.optimizers:
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                warnings.warn(
                    f"record: {type(optimizer).__name__} does not hold a single parameter of the model, so that its "
                    "steps change nothing; build it after the model is wrapped or sharded, from its parameters",
                    stacklevel=2,
                )

    def _hook_steps(self, optimizer: Optimizer) -> None:
        self._step_hooks.append(optimizer.register_step_pre_hook(untraced(self._before_step)))
        self._step_hooks.append(optimizer.register_step_post_hook(untraced(self._after_step)))

    def _unhook_steps(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks.clear()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._found and not self._counts(optimizer):
            return
        if self._round.overdue(optimizer):
            self._finish()
        if self._observer is not None:
            if self._observer.begun and self._model is not None:
                self._tell_layout(self._model)
            # A hook on all optimizers gets the optimizer itself among the arguments of its step.
            closure = kwargs.get("closure") or next((value for value in args if value is not optimizer), None)
            self._observer.optimizer_begins(optimizer, closure=closure is not None)

    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self._closed or (self._found and not self._counts(optimizer)):
            return
        if self._round.stepped(optimizer):
            self._finish()

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that nobody gave steps this model."""
        if self._closed or self._model is None:
            return False
        if optimizer not in self._ours:
            own = {id(held.leaf) for held in held_parameters(self._model)}
            ours = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self._ours[optimizer] = ours
            new = ours and self._round.add(optimizer)
            self._layout_due = self._layout_due or new
            if new and self.step:
                warnings.warn(
                    f"record: {type(optimizer).__name__} steps this model too, and was not known when step 0 ended; "
                    "give all optimizers: sp.record(directory, model, [first, second])",
                    stacklevel=2,
                )
        return self._ours[optimizer]

    def _finish(self) -> None:
        """The step is over."""
        if self._observer is not None:
            self._observer.end()
        elif self._recorded and self._model is not None and self.step + 1 in self._wanted:
            state_left(self._out, self.step, self._model, held_parameters(self._model), self._round.optimizers)
        self.step += 1
        self._round.begin()
        if self._wanted.last is not None and self.step > self._wanted.last:
            self._close()
        elif self.step in self._wanted:
            self._arm()
        else:
            self._disarm()

    def _close(self) -> None:
        self._closed = True
        self._disarm()
        self._unhook_steps()
        self._leave_model()
        # Who keeps the recording keeps neither: a DDP that outlives its process group may not let the process end.
        self._model, self._round = None, Round()
        self._ours.clear()
        self._out.close()


def _declared(parallelism: str | Parallelism | None) -> str:
    if parallelism is None:
        return ""
    if isinstance(parallelism, str) and "=" not in parallelism:
        return canonical_name(parallelism)
    return parse(parallelism, own_rank()[1]).strategy
