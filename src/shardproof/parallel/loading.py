"""The loader of a training run: the same samples in the same steps under every layout, and after every resumption."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from shardproof.errors import ExperimentError, UsageError
from shardproof.parallel.data import (
    Cut,
    GlobalBatches,
    Microbatch,
    is_map_style,
    is_stream,
    refuse_loader,
    refuse_uneven,
    resolved,
)
from shardproof.parallel.own_batches import OwnBatches
from shardproof.parallel.reading_ahead import in_turn
from shardproof.parallel.samples import Samples
from shardproof.parallel.source import Numbered, Source
from shardproof.parallel.streams import Stream
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism

_STATE = ("epoch", "step", "samples", "batch_size", "about", "snapshot")
"""What the state of a loader has. `step` and `samples` were read in the epoch; `about` is that of the source."""


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """What a rank needs of the data for one optimizer step."""

    microbatches: list[Microbatch]
    """This rank's."""

    samples: int
    """Of the global batch."""

    epoch: int
    """From 0."""

    last: bool
    """Whether the epoch ends with this step."""

    state: dict[str, Any]
    """What `Loader.load_state_dict` takes to go on right after this step: plain data that JSON can hold."""


class Loader:
    """This rank's part of every step, epoch after epoch, without end.

    Three kinds of data: a map-style data set (`GlobalBatches` has its order), a stream (`Stream`) and the user's own
    `Experiment.batches` (`OwnBatches`). The first two do not depend on how many ranks, micro-batches or workers read
    them. Reading leaves the global random generators in another state: seed them before a step draws from them.
    """

    steps_per_epoch: int | None
    """None for a user's own batches, and for a stream of unknown length."""

    def __init__(  # noqa: PLR0913  (each of them is a choice that the trainer makes)
        self,
        experiment: Experiment,
        *,
        data_rank: int,
        data_ranks: int,
        seed: int,
        shuffle: bool,
        workers: int = 0,
        mesh: DeviceMesh | None = None,
        parallelism: Parallelism | None = None,
        microbatches: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """`microbatches` and `batch_size` replace the experiment's. `shuffle` is for map-style data sets.

        `workers` processes read ahead, forked when iteration starts; what `Experiment.batches` yields is read by the
        process itself. Raises `ExperimentError` for data that cannot be read, `StrategyError` for a batch that cannot
        be cut into equal parts.
        """
        experiment = replace(
            experiment,
            seed=seed,
            microbatches=experiment.microbatches if microbatches is None else microbatches,
            batch_size=experiment.batch_size if batch_size is None else batch_size,
        )
        self._size = experiment.batch_size
        self._source = _source(experiment, data_rank, data_ranks, shuffle, mesh, parallelism)
        self._workers = workers if self._source.reads_ahead else 0
        self._start = _Place(0, 0, None)
        self._running: Generator[LoadedStep, None, None] | None = None
        self.steps_per_epoch = self._source.steps_per_epoch

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that `state` came with. To be called before iterating.

        Ranks, micro-batches and workers may be others. Raises `UsageError` where the batch size is, or where the run
        stopped inside an epoch and its seed, order or kind of data is.
        """
        if missing := [name for name in _STATE if name not in state]:
            raise UsageError(
                f"the state of the loader lacks {', '.join(missing)}; give one that a LoadedStep came with"
            )
        if state["batch_size"] != self._size:
            raise UsageError(
                f"the run that is resumed had batch_size {state['batch_size']}, this one has {self._size}; "
                "its place in the data is counted in batches: give the same batch_size"
            )
        if state["step"]:
            for name, now in self._source.about.items():
                before = state["about"].get(name)
                if before != now:
                    raise UsageError(
                        f"the run that is resumed stopped inside epoch {state['epoch']} with {name} = {before!r}, and "
                        f"this one has {now!r}: samples would be read twice or never; give the same, or resume from "
                        "the end of an epoch"
                    )
        self._start = _Place(state["epoch"], state["step"], state["snapshot"])

    def __iter__(self) -> Iterator[LoadedStep]:
        """From the place that was loaded, else from the start. Ends an iteration that was begun before."""
        self.close()
        self._running = in_turn(self._steps, self._workers)
        return self._running

    def close(self) -> None:
        """End the worker processes, and with them the iteration."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _steps(self, worker: int, workers: int) -> Iterator[LoadedStep]:
        """Every `workers`-th step from number `worker` on, counted from where the run started or went on."""
        number = 0
        epoch, done, snapshot = self._start.epoch, self._start.done, self._start.snapshot
        while True:
            for planned in self._source.epoch(epoch, done, snapshot):
                done += 1
                if number % workers == worker:
                    after = _Place(epoch + 1, 0, None) if planned.last else _Place(epoch, done, planned.snapshot)
                    yield LoadedStep(planned.read(), planned.samples, epoch, planned.last, self._state(after))
                number += 1
            epoch, done, snapshot = epoch + 1, 0, None

    def _state(self, place: _Place) -> dict[str, Any]:
        samples = place.done * self._size
        values = (place.epoch, place.done, samples, self._size, dict(self._source.about), place.snapshot)
        return dict(zip(_STATE, values, strict=True))


@dataclass(frozen=True, slots=True)
class _Place:
    epoch: int
    done: int
    """Steps of the epoch that were read."""
    snapshot: Mapping[str, Any] | None


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for all ranks out of the states of all ranks after the same step.

    Only `Experiment.batches` needs it: the place in a loader of one's own is known to the rank that reads it. A rank
    that does not find its own state reads its batches again from the start of the epoch.
    """
    state = dict(states[0])
    snapshots = [each["snapshot"] for each in states]
    if all(snapshot is not None and "by_rank" in snapshot for snapshot in snapshots):
        by_rank = {rank: own for snapshot in snapshots for rank, own in snapshot["by_rank"].items()}
        state["snapshot"] = {**snapshots[0], "by_rank": by_rank}
    return state


def eval_batches(
    data: Any, *, batch_size: int, data_rank: int, data_ranks: int, workers: int = 0
) -> Iterator[Microbatch]:
    """This rank's part of every global batch of `batch_size`, in one pass over a data set or a stream, in order.

    The last batch may be short; a part without a sample has weight 0 and is there so that every rank takes part in as
    many forward passes. Every sample is in one part of weight above 0. Samples that draw random numbers draw the same
    in every pass. Raises `ExperimentError` for data that is neither, or empty.
    """
    cut = Cut(data_ranks, 1)
    made = resolved(data)
    refuse_loader(made)
    if is_stream(made):
        return in_turn(
            partial(_stream_parts, Stream(made, data, size=batch_size, cut=cut, data_rank=data_rank, seed=0)), workers
        )
    if not is_map_style(made) or not len(made):
        raise ExperimentError(
            f"the data to evaluate on is a {type(made).__name__} without a sample; "
            "give a data set (len() and [i]) or an iterable of samples, or a function that returns one"
        )
    return in_turn(partial(_numbered_parts, Samples(made, 0), batch_size, cut, data_rank), workers)


def _stream_parts(stream: Stream, worker: int, workers: int) -> Iterator[Microbatch]:
    for number, planned in enumerate(stream.epoch(0, 0, None)):
        if number % workers == worker:
            yield from planned.read()


def _numbered_parts(
    samples: Samples, size: int, cut: Cut, data_rank: int, worker: int, workers: int
) -> Iterator[Microbatch]:
    length = len(samples.data)
    for start in range(worker * size, length, workers * size):
        own, weight = cut.part(range(start, min(start + size, length)), data_rank)
        yield Microbatch(samples.batch(0, own), weight)


def _source(
    experiment: Experiment,
    data_rank: int,
    data_ranks: int,
    shuffle: bool,
    mesh: DeviceMesh | None,
    parallelism: Parallelism | None,
) -> Source:
    if experiment.batches is not None:
        return OwnBatches(experiment, mesh, parallelism, data_rank)
    data = resolved(experiment.data)
    refuse_loader(data)
    if not is_stream(data):
        batches = GlobalBatches(
            replace(experiment, data=data), data_ranks=data_ranks, microbatches=experiment.microbatches, shuffle=shuffle
        )
        return Numbered(batches, data_rank)
    refuse_uneven(experiment.batch_size, data_ranks, experiment.microbatches)
    return Stream(
        data,
        experiment.data,
        size=experiment.batch_size,
        cut=Cut(data_ranks, experiment.microbatches),
        data_rank=data_rank,
        seed=experiment.seed,
        drop_last=experiment.train_step is not None,
    )
