"""What every contestant trains: a model with fixed weights, its samples in a fixed order, and a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from shardproof.spec.experiment import Experiment
from shardproof.spec.loading import load
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import parse

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model under one layout."""

    model: str
    experiment: Experiment
    parallelism: Parallelism

    @property
    def strategy(self) -> str:
        """`ddp`, `fsdp`, `tp`, `tp_fsdp` or `single`."""
        return self.parallelism.strategy

    def data_rank(self, rank: int) -> int:
        """Which part of each global batch this rank reads; tensor-parallel peers read the same."""
        return self.parallelism.coordinates(rank)["dp"]

    def loader(self, rank: int) -> DataLoader:
        """An epoch of this rank's parts: each global batch is cut in order, one part per data rank."""
        data, size = self.experiment.data, self.experiment.batch_size
        part = size // self.parallelism.dp
        first = self.data_rank(rank) * part
        rows = [range(start + first, start + first + part) for start in range(0, len(data), size)]
        return DataLoader(data, batch_sampler=[list(row) for row in rows])


def task(model: str, strategy: str, ranks: int) -> Task:
    """Raises `SystemExit` for a model that there is none of."""
    if model not in MODELS:
        raise SystemExit(f"there is no model {model!r}; the models are {', '.join(MODELS)}")
    return Task(model=model, experiment=fixed(MODELS[model]()), parallelism=parse(strategy, ranks))


def fixed(experiment: Experiment) -> Experiment:
    """The experiment with weights that are drawn once, before ranks start, without clipping, in whole batches."""
    torch.manual_seed(experiment.seed)
    weights = {name: tensor.clone() for name, tensor in experiment.model().state_dict().items()}

    def model() -> nn.Module:
        built = experiment.model()
        built.load_state_dict(weights)
        return built

    # Whole batches only: libraries do not agree on what becomes of a short last one.
    samples = len(experiment.data) // experiment.batch_size * experiment.batch_size
    data = Subset(experiment.data, range(samples))
    return replace(experiment, model=model, data=data, max_grad_norm=None)


def digits() -> Experiment:
    """examples/digits.py: 0.15 million weights, arithmetic of well under a millisecond; what is left is overhead."""
    return load(f"{ROOT / 'examples' / 'digits.py'}")


def gpt() -> Experiment:
    """examples/gpt.py: two blocks, embedding and head tied."""
    return load(f"{ROOT / 'examples' / 'gpt.py'}")


def llama() -> Experiment:
    """transformers' own Llama in the size of the GPT, as its layouts are for its own model classes only."""
    from trainers.llama import experiment

    return experiment(gpt().data)


MODELS: Mapping[str, Callable[[], Experiment]] = {"digits": digits, "gpt": gpt, "llama": llama}
