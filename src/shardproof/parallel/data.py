"""The global batch of every step, and the part of it that a rank reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from shardproof.errors import ExperimentError, StrategyError
from shardproof.parallel.initial import numbers
from shardproof.spec.experiment import Batch, Experiment


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one rank feeds to one forward pass."""

    batch: Batch
    weight: float
    """Its share of the mean: over all micro-batches of all data ranks the weights sum to the number of data ranks.

    1 / microbatches where all parts are equal; 0 for a part that is only there so that every rank takes part.
    """


def dataset_of(experiment: Experiment) -> Any:
    """The experiment's map-style dataset.

    Raises `ExperimentError` where it is none, or holds less than one batch.
    """
    data = experiment.data
    # A class has these methods too, but it is called to make the data set.
    if callable(data) and (isinstance(data, type) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))):
        data = data()
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
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


def cast(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """The batch on `device`, its floating tensors in `dtype`, complex ones in the complex type of that width."""
    return tree_map_only(Tensor, lambda t: t.to(device=device, dtype=numbers(t.dtype, dtype)), batch)


class GlobalBatches:
    """The samples of every step, in one order for all layouts, cut into one part per data rank and micro-batch.

    The global batch is cut into `parts` equal parts, in order: part `rank * microbatches + m` is what data rank
    `rank` reads as its micro-batch `m`. The last batch of an epoch may be short: it is cut as evenly as it goes, and
    every part is weighted by its samples, so that the mean stays exact.
    """

    def __init__(self, experiment: Experiment, *, data_ranks: int, shuffle: bool = False, microbatches: int) -> None:
        """Raise `StrategyError` where a batch cannot be cut into equal parts."""
        self.data = dataset_of(experiment)
        self.size = experiment.batch_size
        self.seed = experiment.seed
        self.data_ranks = data_ranks
        self.microbatches = microbatches
        self.shuffle = shuffle
        # A user's own step divides by the number of micro-batches, which is right for equal parts only.
        self.drop_last = experiment.train_step is not None
        parts = data_ranks * microbatches
        if self.size % parts:
            below, above = self.size - self.size % parts, self.size + parts - self.size % parts
            raise StrategyError(
                f"batch_size {self.size} does not divide into {data_ranks} data ranks x {microbatches} micro-batches "
                f"= {parts} equal parts; use {f'{below} or {above}' if below else above}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        full, rest = divmod(len(self.data), self.size)
        return full if self.drop_last or not rest else full + 1

    def indices(self, step: int) -> list[int]:
        """The samples of a global batch, in order. Shuffled per epoch under (seed, epoch) where that was asked for."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.data)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.data), generator=generator).tolist()
        return order[at * self.size : (at + 1) * self.size]

    def parts(self, step: int) -> list[tuple[list[int], float]]:
        """Sample indices and weight of each of the `data_ranks * microbatches` parts of a global batch."""
        batch = self.indices(step)
        count = self.data_ranks * self.microbatches
        parts, start = [], 0
        for part in range(count):
            length = len(batch) // count + (part < len(batch) % count)
            own = batch[start : start + length]
            start += length
            weight = len(own) * self.data_ranks / len(batch)
            # A rank with nothing to read still has to take part in every collective: weight 0, not an empty batch.
            parts.append((own or batch[:1], weight))
        return parts

    def of_rank(self, data_rank: int) -> Iterator[Microbatch]:
        """This rank's micro-batches, one after the other, without end."""
        step = 0
        while True:
            own = self.parts(step)[data_rank * self.microbatches : (data_rank + 1) * self.microbatches]
            for indices, weight in own:
                yield Microbatch(default_collate([self.data[i] for i in indices]), weight)
            step += 1
