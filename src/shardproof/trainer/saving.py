"""What a run saves beside its tensors, when, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from shardproof.checkpoint import folder, load, save
from shardproof.checkpoint.export import write_whole
from shardproof.checkpoint.placed import Declared
from shardproof.checkpoint.together import from_first, own_group, rank_of, together
from shardproof.checkpoint.whole import whole_state
from shardproof.errors import CheckpointError, UsageError
from shardproof.parallel.loading import joined
from shardproof.trainer.fit import Evaluation
from shardproof.trainer.progress import Progress

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop


class Saving:
    """The checkpoints of a `Loop`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pending: save.Pending | None = None
        self.last: Path | None = None
        """The checkpoint of `save_folder` that was saved or loaded last, or what was saved elsewhere since."""
        placements = loop.experiment.placements
        self._declared = None if placements is None else Declared(placements, loop.mesh)

    def prepare(self) -> str | None:
        """Look at `save_folder` before training starts, and return what the user should know of it, on rank 0.

        Raises `CheckpointError` where it cannot take checkpoints.
        """
        saved = self._loop.training.save_folder
        if saved is None:
            return None
        group, place, step = own_group(), Path(saved), self._loop.progress.step
        together(lambda: folder.make(place) if rank_of(group) == 0 else None, group)
        newest = folder.newest(place) if rank_of(group) == 0 else None
        if newest is None or folder.step_of(newest) <= step:
            return None
        return (
            f"{newest} is further than this run, which starts at step {step}: to go on from it, use "
            "load_path='auto' (--resume); to start anew, choose another save_folder, or a later --resume will take it"
        )

    @property
    def is_saved(self) -> bool:
        """Whether the run as it is stands in `save_folder` already."""
        return self.last is not None and self.last == self._path(None)

    def save_on_the_way(self) -> Path:
        """Write a checkpoint under its usual name, in the background where the training says so."""
        if not self._loop.training.save_async:
            return self.save(None)
        self.wait()
        loop, path = self._loop, self._path(None)
        self._pending = save.save_async(
            path,
            loop.root,
            loop.parameters,
            loop.optimizer,
            self._extra(),
            declared=self._declared,
            keep=loop.training.keep,
        )
        self.last = path
        return path

    def save(self, path: str | Path | None) -> Path:
        """Write a checkpoint, and wait until it is there."""
        self.wait()
        loop = self._loop
        keep = loop.training.keep if path is None else None
        path = self._path(path)
        save.save(path, loop.root, loop.parameters, loop.optimizer, self._extra(), declared=self._declared, keep=keep)
        self.last = path
        return path

    def wait(self) -> None:
        """Until a checkpoint that is being written is there. Raises `CheckpointError` where it could not be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except CheckpointError:
            self.last = None
            raise

    def resume(self, path: str | Path) -> None:
        """Start from what `Training.load_path` says."""
        saved = self._loop.training.save_folder
        if path == "auto" and saved is not None:
            group = own_group()
            # One rank tidies up after a save that was killed, before all look.
            together(lambda: folder.clean(Path(saved)) if rank_of(group) == 0 else None, group)
            newest = from_first(lambda: folder.newest(Path(saved)), group)
            if newest is not None:
                self.load(newest)
            return
        self.load(path, weights_only=self._loop.training.load_weights_only)

    def load(self, path: str | Path, *, weights_only: bool = False) -> None:
        """Weights, optimizer, scheduler, scaler, callbacks, and the place in the data; or weights alone."""
        self.wait()
        loop, given = self._loop, Path(path)
        if given.suffix == ".safetensors":
            load.load_weights(given, loop.root, loop.parameters, declared=self._declared)
            self.last = loop.evaluation = None
            return
        # One rank looks, so that all of them see the same checkpoint, also where another one is just being written.
        path, extra = from_first(lambda: _opened(given), own_group())
        if weights_only:
            load.load(path, loop.root, loop.parameters, None, declared=self._declared)
            return
        # What of this run would not go on is said before anything is overwritten.
        with _checked(path):
            self._refuse(extra, path)
            progress = _progress(extra["progress"])
        load.load(path, loop.root, loop.parameters, loop.optimizer, declared=self._declared)
        loop.progress = progress
        with _checked(path):
            saved = self._restore(extra)
        # Outside: their errors are theirs.
        for callback in loop.training.callbacks:
            own = next((entry for entry in saved if entry[0] == type(callback).__name__), None)
            if own is not None:
                saved.remove(own)
                callback.load_state_dict(own[1])
        usual = None if loop.training.save_folder is None else self._path(None)
        self.last = usual if usual is not None and usual.absolute() == path else None

    def export(self, path: str | Path) -> Path:
        """The whole weights in one safetensors file."""
        path = Path(path)
        state = self.whole_state()

        together(lambda: write_whole(state, path) if state is not None else None, own_group())
        return path

    def whole_state(self) -> dict[str, Tensor] | None:
        """The whole weights on rank 0."""
        self.wait()
        return whole_state(self._loop.parameters, self._loop.root, declared=self._declared)

    def _path(self, path: str | Path | None) -> Path:
        if path is not None:
            return Path(path)
        saved = self._loop.training.save_folder
        if saved is None:
            raise UsageError("save() needs a path, as the Trainer has no save_folder")
        return Path(saved) / folder.step_name(self._loop.progress.step)

    def _extra(self) -> dict[str, Any]:
        loop = self._loop
        return {
            "progress": loop.progress.state_dict(),
            "loader": self._loader_state(),
            "scheduler": None if loop.scheduler is None else loop.scheduler.state_dict(),
            "scaler": None if loop.scaler is None else loop.scaler.state_dict(),
            "evaluation": None if loop.evaluation is None else asdict(loop.evaluation),
            "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in loop.training.callbacks],
            "run": {
                "strategy": loop.parallelism.strategy,
                "ranks": loop.parallelism.world_size,
                "precision": loop.training.precision,
                "batch_size": loop.experiment.batch_size,
                "seed": loop.experiment.seed,
                "scheduler": _kind(loop.scheduler),
            },
        }

    def _loader_state(self) -> dict[str, Any] | None:
        """The place in the data; in a loader of the user's own, every rank has one of its own."""
        loop = self._loop
        if loop.loader_state is None or loop.experiment.batches is None:
            return loop.loader_state
        states: list[Any] = [None] * loop.parallelism.world_size
        dist.all_gather_object(states, loop.loader_state)
        return joined(states)

    def _refuse(self, extra: Mapping[str, Any], path: Path) -> None:
        loop = self._loop
        if _NEEDED - extra.keys():
            raise CheckpointError(f"{path} holds no training run: another program wrote it; {_WEIGHTS_ALONE}")
        for name, ours in (("seed", loop.experiment.seed), ("batch_size", loop.experiment.batch_size)):
            theirs = extra["run"][name]
            if theirs != ours:
                raise CheckpointError(
                    f"{path} is of a run with {name} {theirs}, and this one has {ours}, which would read other samples "
                    f"from here on; give {name} {theirs}, or {_WEIGHTS_ALONE}"
                )
        there, here = extra["run"].get("scheduler"), _kind(loop.scheduler)
        if there != here:
            raise CheckpointError(
                f"{path} is of a run with {there or 'no scheduler'}, and this one has {here or 'none'}: the learning "
                f"rate would change under way; give the same scheduler=..., or {_WEIGHTS_ALONE}"
            )

    def _restore(self, extra: Mapping[str, Any]) -> list[list[Any]]:
        """Everything but the callbacks, whose names and states it returns."""
        loop = self._loop
        loop.loader_state = extra["loader"]
        evaluation = extra.get("evaluation")
        loop.evaluation = None if evaluation is None else Evaluation(**evaluation)
        if loop.scheduler is not None:
            loop.scheduler.load_state_dict(state_of(loop.scheduler, extra["scheduler"]))
        if loop.scaler is not None and extra["scaler"] is not None:
            loop.scaler.load_state_dict(extra["scaler"])
        return [[str(name), state] for name, state in extra["callbacks"]]


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Inside, data of another shape than a run saves are a `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged or was made by hand: {type(error).__name__}: {str(error)[:300]}; "
            f"load an earlier checkpoint, or {_WEIGHTS_ALONE}"
        ) from error


def _progress(saved: Mapping[str, Any]) -> Progress:
    found = Progress(**saved)
    for name, value in found.state_dict().items():
        kinds = (int, float) if name == "elapsed_s" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 2**53:
            raise ValueError(f"progress: {name} is {ascii(value)[:80]}")
    return found


def state_of(scheduler: LRScheduler, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's schedulers take for their attributes as it is: none of it may take the place of their code.

    Raises `ValueError`.
    """
    if taken := sorted(set(saved) & (set(dir(scheduler)) - set(scheduler.state_dict()))):
        raise ValueError(f"the scheduler's state holds {', '.join(taken)}, which is no state")
    return dict(saved)


_NEEDED = {"progress", "loader", "scheduler", "scaler", "callbacks", "run"}
"""What a checkpoint holds that a run saved."""

_WEIGHTS_ALONE = "load its weights alone (shardproof export CHECKPOINT weights.safetensors, then load that)"


def _opened(path: Path) -> tuple[Path, dict[str, Any]]:
    found = folder.resolve(path).absolute()
    return found, load.read_extra(found)


def _kind(scheduler: LRScheduler | None) -> str | None:
    return None if scheduler is None else type(scheduler).__name__
