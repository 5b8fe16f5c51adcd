"""One recorded run of an experiment on this rank: build, lay out, train a few steps, write the trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from shardproof.errors import ExperimentError
from shardproof.parallel import initial, mesh
from shardproof.parallel.collectives import CountCollectives
from shardproof.parallel.data import GlobalBatches, Microbatch, cast, dataset_of
from shardproof.parallel.held import Held, held_parameters, ties
from shardproof.parallel.piece import Piece
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.leaves import leaves
from shardproof.trace.reads import digests
from shardproof.trace.recorder import Recorder
from shardproof.train.arrange import arrange
from shardproof.train.disturb import Disturbance
from shardproof.train.faults.fault import Fault
from shardproof.train.faults.planting import Planting
from shardproof.train.norm import EPSILON
from shardproof.train.step import Step, one_step

UNCLIPPED = 1e30
"""A `max_grad_norm` that no gradient reaches, to see a user's gradients as they are before their own clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a check share."""

    device: torch.device
    dtype: torch.dtype
    steps: int
    shuffle: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What sets one run of an experiment apart from the plain one."""

    unclipped: bool = False
    """A user's own step is told not to clip, and only the first step is run."""

    draw: int | None = None
    """Number of the random one-ulp disturbance of parameters and inputs, or None."""

    exact_clipping: bool = False
    """The norm is divided by as it is, without torch's 1e-6."""

    replays: str | None = None
    """The run whose batches are read again, where a user's own loader made them."""

    inputs: bool = False
    """What enters each module is recorded as well."""

    widened: bool = False
    """Initial values are made in the run's dtype, and the arithmetic is done in float64."""

    fault: Fault | None = None
    """Planted on purpose, or None."""

    steps: int | None = None
    """As many steps only, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a rank tells about its run beside the trace: plain data, small enough for a pipe."""

    reads: tuple[tuple[tuple[str, ...], ...], ...]
    """Digest of every sample: [step][micro-batch][sample]. Empty for a filler part."""

    weights: tuple[tuple[float, ...], ...]
    """Share of each micro-batch in its step's mean: [step][micro-batch]."""

    pieces: dict[str, Piece]
    """Canonical parameter name -> where this rank's part lay when the first step was over."""

    ties: tuple[tuple[str, ...], ...]
    """Groups of names that share one storage."""

    collectives: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)
    """(collective, ranks) -> how often it ran in the first step."""

    strangers: tuple[str, ...] = ()
    """What the optimizer holds that is not the model's."""

    left_behind: tuple[str, ...] = ()
    """Trainable parameters that the optimizer does not hold: rightly so, where it was built over a subset."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Canonical name of a parameter or buffer -> its shape before the model was laid out."""

    counted: bool = True
    """Whether `collectives` could be counted: a compiled model is not looked into."""

    train_s: float = 0.0
    """Wall clock of the steps alone."""

    planted: int = 0
    """How often a planted fault was at work."""


class TracedRun:
    """An experiment laid out under `parallelism` in the default process group, ready to train and be recorded."""

    def __init__(
        self, experiment: Experiment, parallelism: Parallelism, rank: int, settings: Settings, variant: Variant
    ) -> None:
        self.experiment, self.parallelism, self.rank = experiment, parallelism, rank
        self.settings, self.variant = settings, variant
        self.steps = 1 if variant.unclipped else variant.steps or settings.steps
        self.mesh, data_group = mesh.build(parallelism, settings.device.type)
        self.data_rank = parallelism.coordinates(rank)["dp"]
        self.disturbance = None if variant.draw is None else Disturbance(variant.draw)
        self.recorder = Recorder(
            settings.device,
            clipped_by_user=experiment.train_step is not None
            and experiment.max_grad_norm is not None
            and not variant.unclipped,
            inputs=variant.inputs,
        )
        self.planting = (
            None if variant.fault is None else Planting(variant.fault, rank, parallelism, observer=self.recorder)
        )
        with initial.default_dtype(settings.dtype):
            model = initial.build(experiment, settings.dtype, settings.device)
        if self.disturbance is not None:
            self.disturbance.model_(model)
        if variant.widened:
            initial.cast_model(model, torch.float64)
        self.dtype = torch.float64 if variant.widened else settings.dtype
        with initial.default_dtype(self.dtype):
            if self.planting is not None:
                self.planting.look(model)
            arranged = arrange(model, experiment, self.mesh, parallelism)
        self.shapes, self.buffers = arranged.shapes, arranged.buffers
        self.root, self.optimizer = arranged.root, arranged.optimizer
        self.parameters = arranged.parameters
        now = partial(held_parameters, self.root, self.shapes)
        if self.planting is not None:
            # Before the recorder, which is to see it.
            self.planting.attach(self.root, self.parameters, self.optimizer)
        self.recorder.attach(self.root, self.parameters, self.optimizer, now)
        self.template = Step(
            model=arranged.model,
            optimizer=self.optimizer,
            microbatches=[],
            loss=self.recorder.loss(experiment.loss if self.planting is None else self.planting.loss(experiment.loss)),
            mesh=self.mesh,
            parallelism=parallelism,
            clip_epsilon=0.0 if variant.exact_clipping else EPSILON,
            max_grad_norm=UNCLIPPED if variant.unclipped else experiment.max_grad_norm,
            index=0,
            data_group=data_group,
            loss_scale=1.0 if self.disturbance is None else self.disturbance.loss_scale,
        )

    def read(self) -> list[list[Microbatch]]:
        """This rank's micro-batches of every step, from the user's `batches` where there are any.

        They are all read before the first step, so that a loader's own random draws and the steps' do not mix.
        Raises `ExperimentError` where they end early.
        """
        experiment, per_step = self.experiment, self.experiment.microbatches
        needed = self.steps * per_step
        seed_everything(experiment.seed)
        with initial.default_dtype(self.dtype):
            if experiment.batches is None:
                batches = GlobalBatches(
                    experiment,
                    data_ranks=self.parallelism.dp,
                    microbatches=per_step,
                    shuffle=self.settings.shuffle,
                )
                parts = list(islice(batches.of_rank(self.data_rank), needed))
            else:
                given: Iterable[Any] = experiment.batches(dataset_of(experiment), self.mesh, self.parallelism)
                if not isinstance(given, Iterable):
                    raise ExperimentError(
                        f"Experiment.batches returned {type(given).__name__}; "
                        "it must return an iterable of this rank's batches, or yield them"
                    )
                # Copied: a loader may fill the same buffer again.
                parts = [Microbatch(_copied(batch), 1 / per_step) for batch in islice(given, needed)]
        if len(parts) < needed:
            raise ExperimentError(
                f"Experiment.batches ended after {len(parts)} micro-batches on rank {self.rank} under "
                f"{self.parallelism.strategy}; {self.steps} steps x {per_step} micro-batches need {needed}"
            )
        return [parts[step * per_step : (step + 1) * per_step] for step in range(self.steps)]

    def train(self, batches: Sequence[Sequence[Microbatch]]) -> Summary:
        """Run every step on these micro-batches, [step][micro-batch], and tell what it looked like."""
        counted = CountCollectives()
        pieces: dict[str, Piece] = {}
        reads, weights = [], []
        started = time.perf_counter()
        with initial.default_dtype(self.dtype):
            for index, parts in enumerate(batches):
                own = [Microbatch(self._prepared(part.batch), part.weight) for part in parts]
                reads.append(tuple(digests(part.batch) if part.weight else () for part in own))
                weights.append(tuple(part.weight for part in own))
                # TP peers draw alike, and data rank 0 draws like the reference.
                seed_everything(self.experiment.seed, index + 1, self.data_rank)
                if self.planting is not None:
                    self.planting.begin(index)
                self.recorder.begin(index, [(part.batch, part.weight) for part in own])
                step = replace(
                    self.template, index=index, microbatches=[part.batch for part in own], weights=weights[-1]
                )
                with counted if index == 0 and _countable(self.root) else contextlib.nullcontext():
                    logged = one_step(self.experiment, step, self.parameters, self.planting or self.recorder)
                now = list(held_parameters(self.root, self.shapes))
                self.recorder.end(self.root, now, self.optimizer, logged)
                pieces = pieces or {held.name: held.piece for held in now}
        return Summary(
            reads=tuple(reads),
            weights=tuple(weights),
            pieces=pieces,
            ties=ties(self.root),
            collectives=dict(counted.counts),
            strangers=_strangers(self.optimizer, self.parameters),
            left_behind=_left_behind(self.optimizer, self.parameters),
            shapes=self.shapes | self.buffers,
            counted=_countable(self.root),
            train_s=time.perf_counter() - started,
            planted=0 if self.planting is None else self.planting.planted,
        )

    def save(self, path: Path) -> None:
        """Write this rank's trace to `path`."""
        self.recorder.save(path)

    def _prepared(self, batch: Any) -> Any:
        if next(leaves(batch), None) is None:
            raise ExperimentError(
                f"no tensor was found in a batch of type {type(batch).__name__}; make it a tensor, tuple or dict of "
                "tensors, or register its type with torch.utils._pytree.register_pytree_node"
            )
        batch = cast(batch, self.settings.dtype, self.settings.device)
        if self.disturbance is not None:
            batch = self.disturbance.batch(batch)
        return cast(batch, self.dtype, self.settings.device)


def _strangers(optimizer: Optimizer, parameters: list[Held]) -> tuple[str, ...]:
    own = {id(held.leaf) for held in parameters}
    return tuple(
        f"param group {number}: a parameter of shape {tuple(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) not in own
    )


def _left_behind(optimizer: Optimizer, parameters: list[Held]) -> tuple[str, ...]:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return tuple(held.name for held in parameters if held.leaf.requires_grad and id(held.leaf) not in stepped)


def _copied(batch: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, batch)


def _countable(model: nn.Module) -> bool:
    """A dispatch mode would make torch.compile compile again, so compiled models are not looked into."""
    return not any(type(module).__name__ == "OptimizedModule" for module in model.modules())
