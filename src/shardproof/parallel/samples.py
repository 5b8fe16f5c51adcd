"""Samples of a map-style dataset, the same whoever reads them, and in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset, default_collate

from shardproof.parallel.seeding import seed_sample
from shardproof.spec.experiment import Batch


class Samples:
    """Reads batches. Where the data may draw random numbers, each sample draws under (seed, epoch, its index).

    Reading leaves the generators of Python, NumPy and torch in some other state; a training step seeds them itself.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data = data
        self.seed = seed
        self._may_draw = may_draw(data)

    def batch(self, epoch: int, indices: Sequence[int]) -> Batch:
        """The samples of these indices, collated by torch's `default_collate`.

        What the dataset raises goes through, with the index of the sample as a note.
        """
        rows = _rows(self.data, indices)
        if rows is not None:
            return rows
        return collated([self._read(epoch, index) for index in indices], f"samples {list(indices)}")

    def _read(self, epoch: int, index: int) -> Any:
        if self._may_draw:
            seed_sample(self.seed, epoch, index)
        try:
            return self.data[index]
        except Exception as error:
            error.add_note(f"while sample {index} of the {type(self.data).__name__} was read, in epoch {epoch}")
            raise


def collated(samples: list[Any], which: str) -> Batch:
    """One batch of these samples. What cannot be collated raises torch's own error, with a note that says `which`."""
    try:
        return default_collate(samples)
    except Exception as error:
        error.add_note(f"while {which} were collated; a sample is a tensor, or a tuple or dict of tensors of one shape")
        raise


def may_draw(data: Any) -> bool:
    """Whether reading a sample may draw random numbers: False only for types that are known not to.

    Seeding all generators takes some microseconds a sample, more than reading a row of a tensor does.
    """
    # Exact types: a subclass may do anything.
    if type(data) is Subset:
        return may_draw(data.dataset)
    if type(data) is ConcatDataset:
        return any(may_draw(part) for part in data.datasets)
    if type(data) is StackDataset:
        parts = data.datasets
        return any(may_draw(part) for part in (parts.values() if isinstance(parts, dict) else parts))
    return type(data) not in (TensorDataset, Tensor, list, tuple, range)


def _rows(data: Any, indices: Sequence[int]) -> list[Tensor] | None:
    """What `default_collate` makes of these samples of a TensorDataset, without making the samples. None for others."""
    while type(data) is Subset:
        indices = [int(data.indices[index]) for index in indices]
        data = data.dataset
    if type(data) is not TensorDataset or any(type(t) is not Tensor or t.layout != torch.strided for t in data.tensors):
        return None
    at = torch.tensor(indices)
    return [tensor[at] for tensor in data.tensors]
