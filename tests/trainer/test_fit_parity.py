"""Twenty steps of training are the same training under every strategy: losses, weights, metrics.

Held against one device, with what rounding alone does to twenty steps as the measure: the one-device run again with
parameters and inputs disturbed by one unit in the last place.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

import shardproof as sp
from shardproof.compare.measure import MULTIPLE
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.strategies import parse
from shardproof.train.disturb import Disturbance
from shardproof.trainer.loop import Loop

STEPS, RANKS = 20, 4
STRATEGIES = ("ddp", "fsdp", "hsdp", "tp", "tp_ddp", "tp_fsdp", "fsdp1", "tp_fsdp1")
CLASSES = {"composer_mlp": 2, "digits": 10, "gpt": 256}
SAMPLES = 100
"""In training: an epoch ends within the twenty steps, mostly with a short batch."""

TESTED = 37
"""Samples to evaluate on: no number of ranks divides it."""

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


class Some(Dataset):
    """`count` samples, from the start again where there are not as many."""

    def __init__(self, data: Any, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.data[index % len(self.data)]


def predicted(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, labels = batch
    return model(inputs).flatten(0, -2), labels.flatten()


class OnRanks:
    """What four warm ranks do; nothing that they return is large."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, place: Place, model: str, strategy: str, precision: str, batch_size: int, draw: int | None) -> Any:
        """Losses and results of twenty steps. One device leaves its weights in a file, for the others."""
        experiment = replace(importlib.import_module(model).experiment, batch_size=batch_size)
        held_out = Some(getattr(importlib.import_module(model), "test_data", experiment.data), TESTED)
        experiment = replace(experiment, data=Some(experiment.data, SAMPLES))
        if draw is not None:
            experiment = disturbed(experiment, Disturbance(draw), precision)
        parallelism = laid_out(strategy)
        training = sp.Training(
            max_duration=f"{STEPS}ba",
            precision=precision,
            eval_data=held_out,
            metrics=sp.Metrics(
                metrics={"accuracy": MulticlassAccuracy(CLASSES[model], average="micro")}, inputs=predicted
            ),
            progress_bar=False,
        )
        file = self.folder / f"{model}-{precision}-{batch_size}.pt"
        with place.world(strategy, parallelism.world_size):
            loop = Loop(experiment, parallelism, training, place)
            if draw is not None:
                loop.template = replace(loop.template, loss_scale=Disturbance(draw).loss_scale)
            fit = loop.fit()
            if strategy == "single" and draw is None:
                torch.save({held.name: held.local(held.leaf).detach() for held in loop.parameters}, file)
            wanted = torch.load(file, weights_only=True)
            far = {
                held.name: apart(held.local(held.leaf).detach(), held.piece.take(wanted[held.name]))
                for held in loop.parameters
            }
        return fit.losses, fit.results, far

    def draws(self, place: Place, *about: Any) -> Any:
        """One disturbed run on each rank, all at once."""
        return self.train(place, *about, place.rank)


def disturbed(experiment: sp.Experiment, disturbance: Disturbance, precision: str) -> sp.Experiment:
    """The experiment with its initial weights and its inputs moved by one unit of the precision that computes."""
    computed_in = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def moved(tensor: Tensor) -> Tensor:
        low = tensor.detach().to(computed_in)
        return tensor.detach() + (disturbance.tensor(low) - low).to(tensor.dtype)

    def model() -> torch.nn.Module:
        made = experiment.model().to(torch.get_default_dtype())
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(moved(parameter))
        return made

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        return experiment.loss(model, tree_map_only(Tensor, lambda t: moved(t) if t.is_floating_point() else t, batch))

    return replace(experiment, model=model, loss=loss)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max()) if got.numel() else 0.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start(RANKS, OnRanks(tmp_path_factory.mktemp("parity"))) as started:
        yield started


_references: dict[tuple[str, str, int], Any] = {}


def reference(ranks: Ranks, model: str, precision: str, batch_size: int) -> Any:
    """One device's run, and how far rounding moves its losses, loss on held-out samples, and weights."""
    key = (model, precision, batch_size)
    if key not in _references:
        about = (model, "single", precision, batch_size)
        losses, results, _ = ranks.call("train", *about, None, ranks=[0])[0]
        moved = list(ranks.call("draws", *about, ranks=range(RANKS)).values())
        # A number that is told in so many digits cannot be nearer than one unit of the last.
        digit = torch.finfo(torch.float64 if precision == "fp64" else torch.float32).eps
        _references[key] = (
            losses,
            results,
            [max(digit * losses[step], *(abs(m[0][step] - losses[step]) for m in moved)) for step in range(STEPS)],
            max(digit * results["loss"], *(abs(m[1]["loss"] - results["loss"]) for m in moved)),
            {name: max(m[2][name] for m in moved) for name in moved[0][2]},
            max(abs(m[1]["accuracy"] - results["accuracy"]) for m in moved),
        )
    return _references[key]


def cases() -> Iterator[tuple[str, str, str, int]]:
    """Every strategy with every model, with every precision and at per-rank batches of 1 and 4, and every model with
    every precision, in 24 cases; all 144 of them with SHARDPROOF_FULL=1."""
    full = os.environ.get("SHARDPROOF_FULL") == "1"
    choices = (enumerate(STRATEGIES), enumerate(CLASSES), enumerate(("fp64", "fp32", "bf16")), enumerate((1, 4)))
    for (s, strategy), (m, model), (p, precision), (b, per_rank) in itertools.product(*choices):
        if full or (p == (s + m) % 3 and b == (s + m + m // 2) % 2):
            yield strategy, model, precision, per_rank


@pytest.mark.parametrize(("strategy", "model", "precision", "per_rank"), list(cases()))
def test_twenty_steps_are_those_of_one_device(
    ranks: Ranks, model: str, strategy: str, precision: str, per_rank: int
) -> None:
    if (model, strategy) == ("composer_mlp", "tp"):
        strategy = "tp=2"  # two hidden units have no four parts
    hold_against_one_device(ranks, model, strategy, precision, per_rank)


@pytest.mark.parametrize("model", list(CLASSES))
def test_twenty_steps_on_eight_ranks_are_those_of_one_device(tmp_path: Path, model: str) -> None:
    """Two replicas of two shards of two tensor-parallel ranks, held against references of their own."""
    with start(2 * RANKS, OnRanks(tmp_path)) as ranks:
        _references.clear()
        hold_against_one_device(ranks, model, "tp_hsdp", "fp64", 1)
    _references.clear()


def laid_out(strategy: str) -> sp.Parallelism:
    return parse(strategy, 2 * RANKS if strategy == "tp_hsdp" else RANKS)


def hold_against_one_device(ranks: Ranks, model: str, strategy: str, precision: str, per_rank: int) -> None:
    parallelism = laid_out(strategy)
    batch_size = per_rank * parallelism.dp
    losses, results, loss_floors, eval_floor, floors, accuracy_floor = reference(ranks, model, precision, batch_size)
    told = ranks.call("train", model, strategy, precision, batch_size, None, ranks=range(parallelism.world_size))
    for rank, (got_losses, got_results, far) in told.items():
        assert len(got_losses) == STEPS
        worst = max(
            range(STEPS), key=lambda step: abs(got_losses[step] - losses[step]) / max(loss_floors[step], 1e-300)
        )
        assert abs(got_losses[worst] - losses[worst]) <= MULTIPLE * loss_floors[worst], (rank, worst)
        assert abs(got_results["loss"] - results["loss"]) <= MULTIPLE * eval_floor, rank
        beyond = {name: (far[name], floors[name]) for name in far if not far[name] <= MULTIPLE * floors[name]}
        assert not beyond, (rank, beyond)
        # A sample on the edge between two classes may fall to either side, where rounding alone has done so too.
        assert abs(got_results["accuracy"] - results["accuracy"]) <= accuracy_floor + 1e-12, rank
    assert all(math.isfinite(loss) for loss in losses)
