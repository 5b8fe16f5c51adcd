"""Bring one fault to the points of a run at which it is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.parallel.held import Held, held_parameters
from shardproof.parallel.names import canonical_buffers, canonical_modules
from shardproof.spec.parallelism import Parallelism
from shardproof.train.faults.fault import Batches, Fault, Scene
from shardproof.train.step import Observer


class Planting:
    """One fault in one run of one rank. An `Observer` that stands before the recorder, so that it sees the fault."""

    def __init__(self, fault: Fault, rank: int, parallelism: Parallelism, observer: Observer) -> None:
        self._fault, self._observer = fault, observer
        self._scene = Scene(rank=rank, parallelism=parallelism)
        self._done = False

    @property
    def planted(self) -> int:
        """How often the fault was at work on this rank."""
        return self._scene.planted

    def look(self, model: nn.Module) -> None:
        """The model is whole; keep what the fault wants of it."""
        wanted = self._fault.wants
        whole = {held.name: held.leaf.detach().clone() for held in held_parameters(model) if held.name in wanted}
        self._scene = replace(self._scene, whole=whole)

    def attach(self, model: nn.Module, parameters: Iterable[Held], optimizer: Optimizer) -> None:
        """The model is laid out; to be called before the recorder's own hooks are there."""
        scene = self._scene
        scene.parameters = {held.name: held for held in parameters}
        scene.modules = dict(canonical_modules(model))
        scene.buffers = {name: buffer for name, buffer in canonical_buffers(model) if isinstance(buffer, Tensor)}
        scene.optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._before_optimizer())
        optimizer.register_step_post_hook(lambda *_: self._fault.after_optimizer(scene))
        self._fault.initial(scene)

    def batches(self, batches: Batches, others: Callable[[str, int], list[list[Any]] | None]) -> Batches:
        """What this rank reads instead of `batches`."""
        return self._fault.batches(batches, others, self._scene)

    def loss(self, loss: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        """The experiment's loss, with the fault on what it returns."""

        def faulty(model: nn.Module, batch: Any) -> Any:
            value = loss(model, batch)
            self._fault.loss(value, self._scene)
            self._scene.call += 1
            return value

        return faulty

    def begin(self, step: int) -> None:
        """A step starts."""
        self._scene.step, self._scene.call, self._done = step, 0, False

    def gradients(self) -> None:
        """Gradients are complete and not yet clipped; in a user's own step, they are what the optimizer gets."""
        self._see_gradients()
        self._observer.gradients()

    def norm(self, norm: Tensor) -> None:
        """The global gradient norm before clipping."""
        self._observer.norm(norm)

    def _see_gradients(self) -> None:
        if not self._done:
            self._done = True
            self._fault.gradients(self._scene)

    def _before_optimizer(self) -> None:
        self._see_gradients()
        self._fault.before_optimizer(self._scene)
