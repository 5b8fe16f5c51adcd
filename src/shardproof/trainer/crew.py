"""Who does a trainer's work: this process, as one of the ranks, or ranks that are forked from it."""

from __future__ import annotations

import gc
import pickle
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shardproof.checkpoint import folder
from shardproof.checkpoint.together import own_group
from shardproof.errors import CheckpointError, RankLost, UsageError
from shardproof.ranks import Place, Ranks, noise, start
from shardproof.ranks.failure import lost_peer
from shardproof.ranks.here import Here
from shardproof.ranks.last_words import LastWords
from shardproof.ranks.scratch import home_of_sockets, scratch_folder
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.training import Training
from shardproof.trainer.loop import Loop
from shardproof.trainer.screen import Bar, Screen, Shown, screen_on
from shardproof.trainer.signals import Termination


class Crew(ABC):
    """Runs methods of a `Loop` on all ranks."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> Any:
        """What the method returns on rank 0, or on this rank where it is one."""

    @abstractmethod
    def call_for_tensors(self, method: str, *args: Any) -> Any:
        """The same for a method that returns tensors."""

    @property
    @abstractmethod
    def loop(self) -> Loop:
        """This process's own."""

    @abstractmethod
    def close(self, *, in_peace: bool = True) -> None:
        """End what was started; without waiting for anybody where something has failed."""


class InProcess(Crew):
    """This process is a rank."""

    def __init__(
        self,
        experiment: Experiment,
        parallelism: Parallelism,
        training: Training,
        timeout_s: float,
        *,
        quiet: bool = False,
    ) -> None:
        self._about = experiment, parallelism, training
        self._timeout_s, self._quiet = timeout_s, quiet
        self._here: Here | None = None
        self._loop: Loop | None = None

    @property
    def loop(self) -> Loop:
        """Made when it is first asked for."""
        if self._loop is None:
            with self._watching("the start"):
                self._loop = self._started()
        return self._loop

    def _started(self) -> Loop:
        experiment, parallelism, training = self._about
        self._here = self._here or Here(training.device, timeout_s=self._timeout_s)
        place = self._here.place
        shows = training.progress_bar and not self._quiet and place.rank == 0
        screen = screen_on(Console(stderr=True, quiet=self._quiet), progress_bar=shows)
        self._screen = screen
        loop = Loop(experiment, parallelism, training, place, lambda event: _draw(screen, event))
        # Whoever waits for a slow writer of checkpoints waits longer than for a step.
        self._here.limit_groups(but=own_group())
        return loop

    def call(self, method: str, *args: Any) -> Any:
        """Runs it here; the other ranks run their own. Raises `RankLost` where one of them is gone."""
        try:
            # Asked to end while it still starts, it starts, and ends before the first step.
            with Termination() if method == "fit" else nullcontext():
                loop = self.loop
                try:
                    with self._watching(method):
                        return getattr(loop, method)(*args)
                finally:
                    self._screen.close()
        except RankLost:
            # Its launcher has lost the peer as well, and is about to end this process too.
            LastWords().begin()
            raise

    @contextmanager
    def _watching(self, during: str) -> Iterator[None]:
        """Nobody else watches over the ranks of a launch: what a collective raises for a lost peer is told as such."""
        try:
            with warnings.catch_warnings():
                noise.silence()
                yield
        except Exception as error:
            if self._here is None or self._here.place.size == 1 or not lost_peer(error):
                raise
            rank, (_, _, training) = self._here.place.rank, self._about
            step = f"{during}, after step {self._loop.progress.step}" if self._loop is not None else during
            raise RankLost(rank, _how(error), during=step, way_on=_way_on(training)) from error

    def call_for_tensors(self, method: str, *args: Any) -> Any:
        """Likewise: nothing has to travel."""
        return self.call(method, *args)

    def close(self, *, in_peace: bool = True) -> None:
        """Leave the process group, where it was joined for this."""
        here, self._loop, self._here = self._here, None, None
        if here is not None:
            # The loop goes before its process group: a DDP that is the last to hold one may wait for itself.
            gc.collect()
            here.close(in_peace=in_peace)


class Forked(Crew):
    """Ranks of our own, started at the first call."""

    def __init__(
        self,
        experiment: Experiment,
        parallelism: Parallelism,
        training: Training,
        timeout_s: float,
        *,
        quiet: bool = False,
    ) -> None:
        self._work = _Work(experiment, parallelism, training)
        self._size, self._timeout_s, self._device = parallelism.world_size, timeout_s, training.device
        self._shows, self._quiet = training.progress_bar and not quiet, quiet
        self._ranks: Ranks | None = None
        self._scratch = ExitStack()

    @property
    def loop(self) -> Loop:
        """There is none here."""
        raise UsageError(
            "the ranks are processes of their own, and the model is theirs; use state_dict() or predict(), or make "
            "this process a rank: Trainer(..., fork=False), or a launch by torchrun"
        )

    def call(self, method: str, *args: Any) -> Any:
        """Runs it on all ranks; output and progress are shown meanwhile."""
        if self._ranks is None:
            with home_of_sockets(self._scratch.enter_context(scratch_folder())):
                self._ranks = start(self._size, self._work, timeout_s=self._timeout_s, device=self._device)
        try:
            message = pickle.dumps(args)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{method}() has to send its arguments to the ranks, which are other processes: {error}; "
                "give data as eval_data to the Trainer, which ranks inherit, or functions that have a name in a module"
            ) from error
        screen = screen_on(Console(stderr=True, quiet=self._quiet), progress_bar=self._shows)
        self._ranks.on_output = screen.message
        self._ranks.on_event = lambda _rank, event: _draw(screen, event)
        try:
            result = self._ranks.call("work", method, message, during=method, live=True)[0]
        finally:
            screen.close()
        if isinstance(result, _Refused):
            raise result.error
        return result

    def call_for_tensors(self, method: str, *args: Any) -> Any:
        """Tensors come back in a file: in a pipe they would be shared memory, which ends with its rank."""
        with scratch_folder() as folder:
            path = folder / "result.pt"
            self.call("to_file", path, method, *args)
            return torch.load(path, weights_only=True)

    def close(self, *, in_peace: bool = True) -> None:
        """End the ranks."""
        del in_peace
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()
        self._scratch.close()


class _Work:
    """What a forked rank holds."""

    def __init__(self, experiment: Experiment, parallelism: Parallelism, training: Training) -> None:
        self._about = experiment, parallelism, training
        self._loop: Loop | None = None
        self._world = ExitStack()
        self._joined = False

    def work(self, place: Place, method: str, message: bytes) -> Any:
        # As in `InProcess.call`.
        with Termination() if method == "fit" else nullcontext():
            try:
                return self._work(place, method, message)
            except CheckpointError as error:
                # It is raised on all ranks alike, so they go on together: a wrong path costs nothing that was trained.
                return _Refused(error)

    def _work(self, place: Place, method: str, message: bytes) -> Any:
        if self._loop is None:
            experiment, parallelism, training = self._about
            if not self._joined:
                # Left only with the process.
                self._world.enter_context(place.world("train", parallelism.world_size))
                self._joined = True
            self._loop = Loop(experiment, parallelism, training, place, place.tell)
        args = pickle.loads(message)
        if method == "to_file":
            path, method, *args = args
            result = getattr(self._loop, method)(*args)
            if place.rank == 0:
                torch.save(result, path)
            return None
        result = getattr(self._loop, method)(*args)
        return result if place.rank == 0 else None


@dataclass(frozen=True, slots=True)
class _Refused:
    error: CheckpointError


def _way_on(training: Training) -> str:
    """What to do after a loss."""
    if training.save_folder is None:
        return "nothing was saved, as the training has no save_folder; start it again on all hosts, with --save-folder"
    newest = folder.newest(Path(training.save_folder))
    if newest is None:
        return f"{training.save_folder} holds no complete checkpoint yet; start again on all hosts"
    return (
        f"the last complete checkpoint is {newest}; go on from it by starting all hosts again with --resume "
        '(load_path="auto"), on as many ranks as you like'
    )


def _how(error: BaseException) -> str:
    """Gloo's first sentence, without the place in its own sources: `Connection closed by peer [10.0.0.2]:18110`."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(". ")[0]


def _draw(screen: Screen, event: object) -> None:
    if isinstance(event, Shown):
        screen.update(event)
    elif isinstance(event, str):
        # A line of a log belongs on stdout; above a bar that is being drawn on the same terminal, only it can print.
        if isinstance(screen, Bar) and sys.stdout.isatty():
            screen.message(event)
        else:
            print(event, flush=True)
