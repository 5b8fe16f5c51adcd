"""What the tests of the loader read, and how they look at it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from shardproof.parallel.loading import LoadedStep, Loader
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Experiment

SIZE, LENGTH = 8, 22
LAYOUTS = [(1, 1), (2, 1), (4, 2), (8, 1)]
"""(data ranks, micro-batches); the last batch of 6 leaves some of them parts without a sample."""


class Augmented(Dataset):
    """Every sample draws from all three generators."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"index": index, "draws": torch.tensor(draws)}


class Numbers(IterableDataset):
    """A stream: torch gives it a [i], which raises."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.length))


def experiment(data: Any = None, **changes: Any) -> Experiment:
    data = Augmented() if data is None else data
    return Experiment(model=dict, data=data, loss=max, optimizer=list, batch_size=SIZE, **changes)


def loader(described: Experiment, rank: int = 0, layout: tuple[int, int] = (1, 1), **changes: Any) -> Loader:
    ranks, microbatches = layout
    settings = {"seed": 3, "shuffle": True, "microbatches": microbatches} | changes
    return Loader(described, data_rank=rank, data_ranks=ranks, **settings)


def read(given: Loader, steps: int, state: Any = None) -> list[LoadedStep]:
    if state is not None:
        given.load_state_dict(json.loads(json.dumps(state)))
    found = []
    try:
        for step in islice(given, steps):
            found.append(step)
            # What a training step does to the generators must make no difference.
            seed_everything(len(found), os.getpid())
    finally:
        given.close()
    return found


def rows(steps: list[list[LoadedStep]]) -> list[Tensor]:
    """The global batches, [step][sample, value], out of what each rank read."""
    found = []
    for ranks in zip(*steps, strict=True):
        parts = [part for rank in ranks for part in rank.microbatches]
        assert sum(part.weight for part in parts) == pytest.approx(len(ranks))
        found.append(torch.cat([flat(part.batch) for part in parts if part.weight]))
    return found


def flat(batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return torch.cat([batch["index"][:, None].double(), batch["draws"].double()], dim=1)
    return batch.double().reshape(len(batch), -1)


def whole(
    described: Experiment, layout: tuple[int, int], steps: int, state: Any = None, **changes: Any
) -> list[Tensor]:
    return rows([read(loader(described, rank, layout, **changes), steps, state) for rank in range(layout[0])])


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
