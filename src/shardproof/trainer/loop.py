"""One rank's part in training: the step that `check` proves, again and again, and what happens in between."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardproof.errors import ExperimentError, InvariantError, UsageError
from shardproof.invariants import check_invariants
from shardproof.parallel import initial, mesh
from shardproof.parallel.data import cast
from shardproof.parallel.loading import LoadedStep, Loader
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.seeding import seed_everything
from shardproof.ranks import Place
from shardproof.spec.duration import Duration, parse_duration
from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.training import Training
from shardproof.train.step import Step, one_step
from shardproof.train.sync import unreduced
from shardproof.trainer.building import build
from shardproof.trainer.evaluating import Evaluating
from shardproof.trainer.exchange import Exchange
from shardproof.trainer.fit import Evaluation, Fit
from shardproof.trainer.journal import Journal
from shardproof.trainer.loggers.console import ConsoleLogger
from shardproof.trainer.precision import autocasting, weights_in
from shardproof.trainer.progress import Interval, Progress
from shardproof.trainer.saving import Saving
from shardproof.trainer.signals import Termination
from shardproof.trainer.telling import about, shown, sizes


class Loop:
    """An experiment laid out on this rank, being trained. What callbacks are given.

    All ranks make one alike, in a default process group of `parallelism.world_size` ranks, and call its methods alike.
    """

    def __init__(
        self,
        experiment: Experiment,
        parallelism: Parallelism,
        training: Training,
        place: Place,
        tell: Callable[[object], None] | None = None,
    ) -> None:
        """`tell` takes what rank 0 has to show, a `Shown` now and then; also `None`, as a sign of life."""
        seed = experiment.seed if training.seed is None else training.seed
        self.experiment = replace(experiment, seed=seed)
        self.parallelism, self.training = parallelism, training
        self.rank, self.device = dist.get_rank(), place.device()
        self.mesh, self.data_group = mesh.build(parallelism, self.device.type)
        self.data_rank = parallelism.coordinates(self.rank)["dp"]
        self.dtype = weights_in(training.precision)
        self.progress = Progress()
        self.stop_reason = ""
        """Why training ends; empty while it goes on."""
        self.loss: Tensor | None = None
        """This rank's loss of the last step, detached: of its own part, or global for `LossSum`."""
        self.step_samples = 0
        """Samples of the last global batch."""
        self._say = tell
        self._build()
        self._said_s = time.monotonic()
        self._loss_is_global = False
        self._exchange = Exchange(
            data_ranks=parallelism.dp,
            data_rank=self.data_rank,
            is_first_peer=parallelism.coordinates(self.rank)["tp"] == 0,
            device=self.device,
        )
        self._journal = Journal(training.loggers if self.rank == 0 else ())
        for logger in training.loggers:
            if isinstance(logger, ConsoleLogger) and tell is not None:
                # Whoever draws the progress bar prints above it.
                logger.write = tell
        self.loader_state: dict[str, Any] | None = None
        self.evaluation: Evaluation | None = None
        """The last one of training, before a resumption included."""
        self._saving = Saving(self)
        self._evaluating = Evaluating(self)
        if training.load_path is not None:
            self._saving.resume(training.load_path)

    def _build(self) -> None:
        trained = build(self.experiment, self.parallelism, self.training, self.mesh, self.device)
        arranged, self.scheduler, self.scaler = trained.arranged, trained.scheduler, trained.scaler
        self.model, self.root = arranged.model, arranged.root
        """The very object that the layout returned, and the module whose names are the experiment's."""
        self.optimizer, self.parameters, self.shapes = arranged.optimizer, arranged.parameters, arranged.shapes
        self.loss_of = autocasting(self.experiment.loss, self.training.precision, self.device.type)
        """The experiment's loss, in the run's precision."""
        self.template = Step(
            model=self.model,
            optimizer=self.optimizer,
            microbatches=[],
            loss=self._noted_loss,
            mesh=self.mesh,
            parallelism=self.parallelism,
            max_grad_norm=self.experiment.max_grad_norm,
            index=0,
            data_group=self.data_group,
            scaler=self.scaler,
        )

    # What callbacks may call.

    def log(self, values: Mapping[str, float]) -> None:
        """Values of the current step, for the loggers. Does nothing above rank 0."""
        self._journal.note(self.progress.step, values)

    def stop(self, reason: str) -> None:
        """End training after this step. All ranks must call it alike."""
        self.stop_reason = self.stop_reason or reason

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """The loss and the metrics on `data`, or on the training's `eval_data`; the same on every rank.

        Raises `UsageError` where there is neither.
        """
        return self._evaluating.evaluate(data)

    def predict(self, data: Any = None, forward: Callable[..., Any] | None = None) -> Any:
        """Outputs for every sample of `data` (or `eval_data`), in order, on the CPU of rank 0; None on other ranks.

        `forward` is (model, batch) -> output; by default `model(batch[0])` of a tuple, `model(batch)` of a tensor.
        """
        return self._evaluating.predict(data, forward)

    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint to `path`, or under its usual name into `save_folder`, and wait until it is there."""
        return self._saving.save(path)

    def load(self, path: str | Path, weights_only: bool = False) -> None:
        """Go on from a checkpoint, the newest one of a folder, or with the weights of a `.safetensors` file."""
        self._saving.load(path, weights_only=weights_only)

    def export(self, path: str | Path) -> Path:
        """Write the whole weights, as one device would hold them, to one safetensors file."""
        return self._saving.export(path)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole weights and buffers by canonical name, on the CPU of rank 0; None on other ranks."""
        return self._saving.whole_state()

    def sharded_state_dict(self) -> dict[str, Tensor]:
        """What this rank holds of the weights and buffers, by canonical name: DTensors where there are any.

        Under FSDP1 a parameter is the stretch of it that this rank holds, flat.
        """
        state = {held.name: held.leaf.detach() for held in self.parameters}
        buffers = {name: buffer for name, buffer in canonical_buffers(self.root) if isinstance(buffer, Tensor)}
        return state | buffers

    # Training.

    def fit(self, max_duration: str | Duration | None = None) -> Fit:
        """Train until `max_duration` (the training's, unless another is given), a signal, or a callback says so."""
        if max_duration is not None:
            self.training = replace(self.training, max_duration=max_duration)
        first = self.progress.step
        self.stop_reason = ""
        self._losses: list[float] = []
        self._evaluations: list[Evaluation] = []
        note = self._saving.prepare()
        if note is not None:
            self._say_to_caller(note)
        for callback in self.training.callbacks:
            callback.fit_start(self)
        self._watchers = [callback for callback in self.training.callbacks if callback.watches_gradients]
        if self._watchers and self.experiment.train_step is not None:
            raise UsageError(
                f"{type(self._watchers[0]).__name__} watches the gradients of shardproof's own step, and the "
                "experiment brings its own train_step; log from there instead"
            )
        done = False
        try:
            self._journal.open(about(self))
            with initial.default_dtype(self.dtype), Termination() as termination:
                self._train(termination)
            self._saving.wait()
            for callback in self.training.callbacks:
                callback.fit_end(self)
            done = True
        finally:
            self._journal.close(failed=not done)
        if not self._evaluations and self.evaluation is not None and self.evaluation.step == self.progress.step:
            # There was nothing left to train: this is what the run had ended with.
            self._evaluations.append(self.evaluation)
        return Fit(
            step=self.progress.step,
            epoch=self.progress.epoch,
            samples=self.progress.samples,
            elapsed_s=self.progress.elapsed_s,
            stop_reason=self.stop_reason,
            first_step=first,
            losses=tuple(self._losses),
            evaluations=tuple(self._evaluations),
            checkpoint=self._saving.last,
            sizes=sizes(self),
        )

    def _train(self, termination: Termination) -> None:
        training = self.training
        until = self._until = parse_duration(training.max_duration)
        self._clock_start = time.monotonic() - self.progress.elapsed_s
        self._exchange.start(self.progress.elapsed_s)
        eval_due = Interval(parse_duration(training.eval_interval), self.progress)
        save_due = Interval(parse_duration(training.save_interval), self.progress)
        loader = Loader(
            self.experiment,
            data_rank=self.data_rank,
            data_ranks=self.parallelism.dp,
            seed=self.experiment.seed,
            shuffle=training.shuffle,
            workers=training.workers,
            mesh=self.mesh,
            parallelism=self.parallelism,
        )
        self._steps_per_epoch = loader.steps_per_epoch
        if self.loader_state is not None:
            loader.load_state_dict(self.loader_state)
        first = self.progress.step
        try:
            # Who is asked to end before the first step does not wait for it: it may take minutes to compile.
            self._exchange_losses(termination)
            steps, epoch_starts = iter(loader), True
            while not self.stop_reason and not self.progress.reached(until):
                loaded = next(steps)
                if epoch_starts:
                    self._tell("epoch_start")
                epoch_starts = loaded.last
                self._one(loaded)
                if self._exchange.due or loaded.last or self.progress.reached(until):
                    self._exchange_losses(termination)
                if loaded.last:
                    self._tell("epoch_end")
                if eval_due.due(self.progress) and training.eval_data is not None:
                    self._catch_up(termination)
                    self._evaluate_now()
                    # Whoever is asked to end during an evaluation takes no further step.
                    self._exchange_losses(termination)
                if save_due.due(self.progress) and training.save_folder is not None:
                    # Whoever goes on from here must not lack the losses of the steps before.
                    self._catch_up(termination)
                    self._save_now()
            self._catch_up(termination)
        finally:
            loader.close()
        self.stop_reason = self.stop_reason or "max_duration"
        # Who is told to end has no time for more than a checkpoint.
        evaluated = self.evaluation is not None and self.evaluation.step == self.progress.step
        if training.eval_data is not None and not evaluated and self.stop_reason != "SIGTERM":
            self._evaluate_now()
        began = self.progress.step > first or self.stop_reason != "SIGTERM"
        if training.save_folder is not None and not self._saving.is_saved and began:
            self._save_now()
        self._journal.flush()

    def _one(self, loaded: LoadedStep) -> None:
        """One optimizer step."""
        index = self.progress.step
        self._tell("step_start")
        seed_everything(self.experiment.seed, index + 1, self.data_rank)
        step = replace(
            self.template,
            index=index,
            microbatches=[cast(part.batch, self.dtype, self.device) for part in loaded.microbatches],
            weights=tuple(part.weight for part in loaded.microbatches),
        )
        logged = one_step(self.experiment, step, self.parameters, self if self._watchers else None)
        if self.experiment.parallelize is None and unreduced(self.model):
            raise self._without_gradient()
        self.loss = logged if isinstance(logged, Tensor) else torch.tensor(float(logged))
        self._exchange.add(logged, is_global=self._loss_is_global and self.experiment.train_step is None)
        self.step_samples = loaded.samples
        self.progress = self.progress.after(loaded.samples, epoch_ended=loaded.last)
        self.loader_state = loaded.state
        # After an overflow the optimizer did not step, and so does not the scheduler.
        if self.scheduler is not None and not (self.scaler is not None and self.scaler.skipped):
            self.scheduler.step()
        if self.training.check_every is not None and self.progress.step % self.training.check_every == 0:
            self._check(step.microbatches)
        self._tell("step_end")

    def _without_gradient(self) -> ExperimentError:
        names = [held.name for held in self.parameters if held.leaf.requires_grad and held.leaf.grad is None]
        named = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "") or "some parameters"
        return ExperimentError(
            f"step {self.progress.step}: the loss on rank {self.rank} does not depend on {named}, and DDP was not told "
            "that this may be, so that gradients beside them were not reduced; give unused_parameters=True, or freeze "
            "what is never trained (requires_grad=False)"
        )

    def _noted_loss(self, model: torch.nn.Module, batch: Batch) -> Tensor | LossSum:
        loss: Tensor | LossSum = self.loss_of(model, batch)
        self._loss_is_global = isinstance(loss, LossSum)
        return loss

    def gradients(self) -> None:
        """The step says that gradients are complete."""
        for callback in self._watchers:
            callback.gradients(self)

    def norm(self, norm: Tensor) -> None:
        """The step says what the norm is; callbacks that want it ask for it themselves."""

    def _check(self, microbatches: list[Batch]) -> None:
        found = check_invariants(
            self.model, self.optimizer, mesh=self.mesh, batch=microbatches, shapes=self.shapes, data_axes=_DATA_AXES
        )
        # Our own loader never reads a sample twice; a data set may hold the same content twice.
        if self.experiment.batches is None:
            found = [violation for violation in found if not violation.same]
        if not found:
            return
        error = InvariantError(found)
        if self.training.check_action == "stop":
            raise error
        if self.rank == 0:
            warnings.warn(f"after step {self.progress.step}: {error}", stacklevel=2)

    def _catch_up(self, termination: Termination) -> None:
        """Exchange what has not been exchanged yet: loggers get the values of earlier steps first."""
        if self._exchange.waiting:
            self._exchange_losses(termination)

    def _exchange_losses(self, termination: Termination) -> None:
        """Learn every rank's losses, and whether one of them is to stop."""
        told = self._exchange.run(stop=termination.requested, elapsed_s=time.monotonic() - self._clock_start)
        if told.stop:
            self.stop("SIGTERM")
        first = self.progress.step - len(told.losses)
        rate = None
        if told.losses and told.elapsed_s > self.progress.elapsed_s:
            rate = len(told.losses) * self.experiment.batch_size / (told.elapsed_s - self.progress.elapsed_s)
        self.progress = replace(self.progress, elapsed_s=told.elapsed_s)
        self._losses += told.losses
        for at, loss in enumerate(told.losses):
            self._journal.note(first + at + 1, {"train/loss": loss})
        for callback in self.training.callbacks if told.losses else ():
            callback.losses(self, first, told.losses)
        self._journal.flush()
        last = self._losses[-1] if self._losses else None
        self._say_to_caller(shown(self, self._until, self._steps_per_epoch, loss=last, samples_per_s=rate))

    def alive(self) -> None:
        """Say so, from work that may take long; all ranks wait for each other, so that one speaks for them."""
        if time.monotonic() - self._said_s > _SIGN_OF_LIFE_S:
            self._say_to_caller(None)

    def _say_to_caller(self, what: object) -> None:
        self._said_s = time.monotonic()
        if self._say is not None and self.rank == 0:
            self._say(what)

    def _evaluate_now(self) -> None:
        results = self.evaluate()
        self.evaluation = Evaluation(step=self.progress.step, results=results)
        self._evaluations.append(self.evaluation)
        self.log({f"eval/{name}": value for name, value in results.items()})
        for callback in self.training.callbacks:
            callback.eval_end(self, results)
        self._journal.flush()

    def _save_now(self) -> None:
        path = self._saving.save_on_the_way()
        for callback in self.training.callbacks:
            callback.saved(self, path)

    def _tell(self, event: str) -> None:
        for callback in self.training.callbacks:
            getattr(callback, event)(self)


_SIGN_OF_LIFE_S = 2.0
_DATA_AXES = ("dp_replicate", "dp_shard")
