"""The global batch of every step, and the part of it that a rank reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from shardproof.errors import ExperimentError, StrategyError
from shardproof.parallel.initial import numbers
from shardproof.parallel.samples import Samples
from shardproof.spec.experiment import Batch, Experiment

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one rank feeds to one forward pass."""

    batch: Batch
    weight: float
    """Its share of the mean: over all micro-batches of all data ranks the weights sum to the number of data ranks.

    1 / microbatches where all parts are equal; 0 for a part that is only there so that every rank takes part.
    """


def resolved(data: Any) -> Any:
    """What `data` is, or what it returns where it is a function that makes the data."""
    # A class has these methods too, but it is called to make the data set.
    if callable(data) and (isinstance(data, type) or not (is_map_style(data) or is_stream(data))):
        return data()
    return data


def is_map_style(data: Any) -> bool:
    """Whether samples can be asked for by number."""
    # torch's IterableDataset has a [i] too, which raises.
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def is_stream(data: Any) -> bool:
    """Whether samples come one after the other, and in no other way."""
    return hasattr(data, "__iter__") and not is_map_style(data) and not isinstance(data, DataLoader)


def dataset_of(experiment: Experiment) -> Any:
    """The experiment's map-style dataset.

    Raises `ExperimentError` where it is none, or holds less than one batch.
    """
    data = resolved(experiment.data)
    refuse_loader(data)
    if is_stream(data):
        raise ExperimentError(
            f"Experiment.data is a {type(data).__name__} without len() and [i], a stream, which only sp.Trainer takes; "
            "a check reads samples by number: give it a map-style dataset, as a list of the stream's first samples"
        )
    if not is_map_style(data):
        raise ExperimentError(
            f"Experiment.data is a {type(data).__name__} without len() and [i]; "
            "give a map-style dataset, or a function that returns one"
        )
    if len(data) < experiment.batch_size:
        raise ExperimentError(
            f"Experiment.data holds {len(data)} samples, less than one batch of {experiment.batch_size}; "
            "lower batch_size or add data"
        )
    return data


def refuse_loader(data: Any) -> None:
    """Raise `ExperimentError` for a DataLoader: what it yields are batches already."""
    if isinstance(data, DataLoader):
        raise ExperimentError(
            f"the data is a {type(data).__name__}, which yields batches, not samples; give its dataset, "
            "or return the loader from Experiment.batches"
        )


def refuse_uneven(size: int, data_ranks: int, microbatches: int) -> None:
    """Raise `StrategyError` where a batch cannot be cut into equal parts."""
    parts = data_ranks * microbatches
    if size % parts:
        below, above = size - size % parts, size + parts - size % parts
        raise StrategyError(
            f"batch_size {size} does not divide into {data_ranks} data ranks x {microbatches} micro-batches "
            f"= {parts} equal parts; use {f'{below} or {above}' if below else above}"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a global batch is cut: in order, into `data_ranks * microbatches` parts, as evenly as it goes.

    Part `rank * microbatches + m` is what data rank `rank` reads as its micro-batch `m`.
    """

    data_ranks: int
    microbatches: int

    def part(self, batch: Sequence[T], number: int) -> tuple[Sequence[T], float]:
        """One part and its weight: its share of the samples, so that the mean stays exact."""
        each, rest = divmod(len(batch), self.data_ranks * self.microbatches)
        start = number * each + min(number, rest)
        own = batch[start : start + each + (number < rest)]
        # A rank with nothing to read still has to take part in every collective: weight 0, not an empty batch.
        return own or batch[:1], len(own) * self.data_ranks / len(batch)

    def of_rank(self, batch: Sequence[T], data_rank: int) -> list[tuple[Sequence[T], float]]:
        """The parts that one data rank reads, micro-batch by micro-batch."""
        first = data_rank * self.microbatches
        return [self.part(batch, number) for number in range(first, first + self.microbatches)]


def cast(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """The batch on `device`, its floating tensors in `dtype`, complex ones in the complex type of that width."""
    return tree_map_only(Tensor, lambda t: t.to(device=device, dtype=numbers(t.dtype, dtype)), batch)


class GlobalBatches:
    """The samples of every step, in one order for all layouts, cut into one part per data rank and micro-batch.

    The global batch is cut into equal parts, in order (`Cut`). The last batch of an epoch may be short: it is cut as
    evenly as it goes, and every part is weighted by its samples.
    """

    def __init__(self, experiment: Experiment, *, data_ranks: int, shuffle: bool = False, microbatches: int) -> None:
        """Raise `StrategyError` where a batch cannot be cut into equal parts."""
        self.data = dataset_of(experiment)
        self.samples = Samples(self.data, experiment.seed)
        self.size = experiment.batch_size
        self.seed = experiment.seed
        self.cut = Cut(data_ranks, microbatches)
        self.shuffle = shuffle
        # A user's own step divides by the number of micro-batches, which is right for equal parts only.
        self.drop_last = experiment.train_step is not None
        refuse_uneven(self.size, data_ranks, microbatches)
        full, rest = divmod(len(self.data), self.size)
        self.steps_per_epoch: int = full if self.drop_last or not rest else full + 1
        """Optimizer steps in one pass over the data."""
        self._epoch = -1
        self._order: Tensor | None = None

    def indices(self, step: int) -> list[int]:
        """The samples of a global batch, in order. Shuffled per epoch under (seed, epoch) where that was asked for."""
        epoch, at = divmod(step, self.steps_per_epoch)
        start, end = at * self.size, min((at + 1) * self.size, len(self.data))
        if not self.shuffle:
            return list(range(start, end))
        if self._order is None or epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator)
        order: list[int] = self._order[start:end].tolist()
        return order

    def parts(self, step: int) -> list[tuple[list[int], float]]:
        """Sample indices and weight of each of the `data_ranks * microbatches` parts of a global batch."""
        batch = self.indices(step)
        numbers = range(self.cut.data_ranks * self.cut.microbatches)
        return [(list(own), weight) for own, weight in (self.cut.part(batch, number) for number in numbers)]

    def read(self, step: int, data_rank: int) -> list[Microbatch]:
        """A rank's micro-batches of one step."""
        epoch = step // self.steps_per_epoch
        parts = self.cut.of_rank(self.indices(step), data_rank)
        return [Microbatch(self.samples.batch(epoch, own), weight) for own, weight in parts]

    def of_rank(self, data_rank: int) -> Iterator[Microbatch]:
        """This rank's micro-batches, one after the other, without end."""
        step = 0
        while True:
            yield from self.read(step, data_rank)
            step += 1
