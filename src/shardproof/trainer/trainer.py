"""`sp.Trainer`: the same training under every strategy, in this process or on ranks of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch.distributed as dist
from torch import Tensor

from shardproof.errors import StrategyError, UsageError
from shardproof.ranks.launch import RANKS, Launch
from shardproof.spec.duration import Duration, parse_duration
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import parse
from shardproof.spec.training import Changes, Training, changed
from shardproof.trainer.crew import Crew, Forked, InProcess
from shardproof.trainer.fit import Fit
from shardproof.trainer.loop import Loop


class Trainer:
    """Trains an experiment under one parallelism, by the very step that `check` proves.

    Where the process is one of a launch (torchrun), or has a default process group already, it is one of the ranks:
    make the trainer on all of them and call its methods alike. Anywhere else, as in a notebook, the trainer starts
    ranks of its own at the first call and keeps them warm until `close`, the end of a `with` statement, or the end of
    the process; they are forked, so that lambdas and closures work, and what callbacks change stays on the ranks.
    """

    def __init__(
        self,
        experiment: Experiment,
        parallelism: str | Parallelism = "single",
        training: Training | None = None,
        *,
        ranks: int | None = None,
        fork: bool | None = None,
        timeout_s: float = 600.0,
        quiet: bool = False,
        **changes: Unpack[Changes],
    ) -> None:
        """Take the fields of `training` (by default those of `Training()`), replaced by keyword arguments.

        `parallelism` is the name of a strategy, degrees (`tp=2,dp_shard=2`) or a Parallelism. `ranks` is for named
        strategies; left out, it is the size of the launch, or 4. `fork` decides where it runs, if it must be decided:
        False makes this process a rank even outside a launch, which asks for a world of one. `timeout_s` is how long
        all ranks may be silent before they count as hung. `quiet` shows neither a progress bar nor what forked ranks
        print.

        Raises `UsageError` and `StrategyError` at once for whatever can be told without building the model.
        """
        if not isinstance(experiment, Experiment):
            raise UsageError(f"Trainer takes an sp.Experiment, and was given a {type(experiment).__name__}")
        self.experiment = experiment
        self.training = changed(Training() if training is None else training, changes)
        world = _world_size()
        in_process = world is not None if fork is None else not fork
        self.parallelism = parse(parallelism, ranks if ranks is not None else (world or RANKS))
        self._refuse(world, in_process=in_process)
        self._crew: Crew = (
            InProcess(experiment, self.parallelism, self.training, timeout_s, quiet=quiet)
            if in_process
            else Forked(experiment, self.parallelism, self.training, timeout_s, quiet=quiet)
        )

    def _need_data(self, data: Any) -> None:
        # Told before ranks are asked, as ranks that have failed are ended, and with them what was trained.
        if data is None and self.training.eval_data is None:
            raise UsageError(
                "there is nothing to evaluate on; give evaluate() or predict() the data, or the Trainer eval_data=..."
            )

    def _refuse(self, world: int | None, *, in_process: bool) -> None:
        experiment, parallelism = self.experiment, self.parallelism
        if parallelism.tp > 1 and not experiment.tp_plan and experiment.parallelize is None:
            raise StrategyError(
                f"{parallelism.strategy}: tensor parallelism needs Experiment.tp_plan, as "
                '{"fc1": "colwise", "fc2": "rowwise"}, or Experiment.parallelize'
            )
        size = 1 if world is None else world
        if in_process and parallelism.world_size != size:
            there = "this process is a world of its own" if world is None else f"this launch has {size} ranks"
            raise StrategyError(
                f"{parallelism} takes {parallelism.world_size} ranks, and {there}; "
                f"start {parallelism.world_size} (torchrun --nproc-per-node {parallelism.world_size}), "
                "or choose a parallelism that fits"
            )

    def fit(self, max_duration: str | Duration | None = None) -> Fit:
        """Train until `max_duration` (the training's unless given here), counted from the first step of all.

        Evaluates, saves and logs on the way. Called again, it goes on where it stopped. Raises `RankFailed` where user
        code fails on a rank (in this process: what it raised), `RankHung` where nobody makes progress,
        `CheckpointError` where a checkpoint cannot be written or read, `InvariantError` where `check_every` finds
        replicas that differ.
        """
        if max_duration is not None:
            max_duration = parse_duration(max_duration)
        fit: Fit = self._crew.call("fit", max_duration)
        return fit

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """`loss` and the metrics on `data`, or on the training's `eval_data`: every sample counts once.

        Forked ranks are sent `data`, which must then be picklable. Raises `UsageError` where there is neither.
        """
        self._need_data(data)
        results: dict[str, float] = self._crew.call("evaluate", data)
        return results

    def predict(self, data: Any = None, forward: Callable[..., Any] | None = None) -> Any:
        """Outputs for every sample of `data` (or `eval_data`), in order, on the CPU; under a launch, on rank 0 alone.

        `forward` is (model, batch) -> output; by default `model(batch[0])` of a tuple, `model(batch)` of a tensor. Both
        arguments are sent to ranks that were forked, and must then be picklable.
        """
        self._need_data(data)
        return self._crew.call_for_tensors("predict", data, forward)

    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint to the folder `path`, or under its usual name in `save_folder`; it is there on return."""
        if path is None and self.training.save_folder is None:
            raise UsageError("save() needs a path, as the Trainer has no save_folder")
        saved: Path = self._crew.call("save", None if path is None else Path(path).absolute())
        return saved

    def load(self, path: str | Path, *, weights_only: bool = False) -> None:
        """Go on from a checkpoint of any layout, the newest one of a folder, or with the weights of a `.safetensors`.

        With `weights_only` a checkpoint gives its weights and buffers alone, and training starts anew from them.
        Raises `CheckpointError` where it is missing, damaged or of another model.
        """
        self._crew.call("load", Path(path).absolute(), weights_only)

    def export(self, path: str | Path) -> Path:
        """Write the whole weights under their plain names to one safetensors file."""
        exported: Path = self._crew.call("export", Path(path).absolute())
        return exported

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole weights and buffers by plain name, on the CPU; under a launch, on rank 0, and None elsewhere."""
        state: dict[str, Tensor] | None = self._crew.call_for_tensors("state_dict")
        return state

    @property
    def loop(self) -> Loop:
        """This rank's part: model, optimizer, mesh, progress. Raises `UsageError` where ranks are other processes."""
        return self._crew.loop

    def close(self) -> None:
        """End the ranks, or leave the process group that was joined. Does nothing the second time."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crew.close(in_peace=error is None)


def _world_size() -> int | None:
    """Ranks of the world that this process is part of, or None where it is part of none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    launch = Launch.of(os.environ)
    return None if launch is None else launch.world_size
