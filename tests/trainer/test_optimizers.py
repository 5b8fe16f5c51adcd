"""What peers refuse under tensor parallelism: param groups, subsets, frozen parameters, clipping on mixed meshes.

Held against one device in float64, with what rounding alone does to the same steps as the measure.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stack import RANKS, STRATEGIES, Stack, among, experiment, loop, samples, world
from torch import Tensor, nn

import shardproof as sp
from shardproof.compare.measure import MULTIPLE
from shardproof.ranks import Place, Ranks, start
from shardproof.train.disturb import Disturbance

STEPS = 4


def by_name(model: nn.Module) -> torch.optim.Optimizer:
    """Three groups with rates and decays of their own: exact names, prefixes and shapes all count."""
    named = dict(model.named_parameters())
    norms = [f"blocks.{n}.norm.{kind}" for n in (0, 1) for kind in ("weight", "bias")]
    matrices = [name for name, p in named.items() if p.ndim == 2 and not name.startswith("head.")]
    groups = [
        {"params": [named[name] for name in norms], "lr": 3e-2, "weight_decay": 0.0},
        {"params": [named[name] for name in matrices], "weight_decay": 0.1},
        {"params": [named["head.weight"], named["head.bias"]], "lr": 1e-3, "betas": (0.8, 0.9)},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def by_module(model: Any) -> torch.optim.Optimizer:
    """Some parameters only, asked of the modules themselves; one group after the other is added."""
    optimizer = torch.optim.SGD(model.blocks[1].parameters(), lr=5e-2, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": [model.head.weight], "lr": 1e-2, "weight_decay": 0.1})
    return optimizer


def of_what_trains(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5e-2, momentum=0.9)


def frozen() -> nn.Module:
    """A whole FSDP unit but its norm, and one tensor of another module."""
    model = Stack()
    for parameter in (*model.blocks[0].up.parameters(), *model.blocks[0].down.parameters(), model.stem.weight):
        parameter.requires_grad_(False)
    return model


def everything(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


CASES: dict[str, sp.Experiment] = {
    "groups by name": experiment(optimizer=by_name, max_grad_norm=0.3, microbatches=2),
    "a subset by module": experiment(optimizer=by_module, max_grad_norm=0.3),
    "frozen parameters": experiment(model=frozen, optimizer=of_what_trains, max_grad_norm=0.3, microbatches=2),
    "frozen parameters in the optimizer": experiment(model=frozen, optimizer=everything),
}
FROZEN = {"stem.weight"} | {f"blocks.0.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
NOT_OPTIMIZED = {
    "groups by name": {"stem.bias", *(f"blocks.{n}.{layer}.bias" for n in (0, 1) for layer in ("up", "down"))},
    "a subset by module": {"head.bias", *(name for name in Stack().state_dict() if name[:6] in ("stem.w", "stem.b"))}
    | {name for name in Stack().state_dict() if name.startswith("blocks.0.")},
    "frozen parameters": FROZEN,
    "frozen parameters in the optimizer": FROZEN,
}
"""What no step may touch."""


class OnRanks:
    def train(self, place: Place, case: str, strategy: str, draw: int | None = None) -> Any:
        """Losses; on rank 0 the weights before and after; how many of its parameters each group has."""
        about = CASES[case] if draw is None else disturbed(CASES[case], Disturbance(draw))
        with world(place, strategy), warnings.catch_warnings():
            # FSDP's advice on memory, where a unit is frozen in part.
            warnings.filterwarnings("ignore", r"(?s).*requires_grad=True and False")
            # Replicas are held against each other all the way: no case may raise a false alarm.
            trained = loop(place, about, strategy, max_duration=f"{STEPS}ba", check_every=1)
            before = trained.state_dict()
            fit = trained.fit()
            groups = [len(group["params"]) for group in trained.optimizer.param_groups]
            after = trained.state_dict()
        return fit.losses, numbers(before), numbers(after), groups

    def draws(self, place: Place, case: str) -> Any:
        return self.train(place, case, "single", place.rank)


def numbers(state: dict[str, Tensor] | None) -> dict[str, list[float]] | None:
    """Plain data, which may cross a pipe."""
    return None if state is None else {name: tensor.flatten().tolist() for name, tensor in state.items()}


def disturbed(about: sp.Experiment, disturbance: Disturbance) -> sp.Experiment:
    def model() -> nn.Module:
        made = about.model()
        disturbance.model_(made)
        return made

    data = samples()
    moved = torch.utils.data.TensorDataset(disturbance.tensor(data.tensors[0]), data.tensors[1])
    return replace(about, model=model, data=moved)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(RANKS, OnRanks()) as started:
        yield started


_references: dict[str, Any] = {}


def reference(ranks: Ranks, case: str) -> Any:
    """One device's run, and how far rounding moves its losses and each of its weights."""
    if case not in _references:
        losses, _, weights, groups = ranks.call("train", case, "single", ranks=[0])[0]
        eps = torch.finfo(torch.float64).eps
        moved = list(ranks.call("draws", case).values())
        loss_floors = [max(eps * loss, *(abs(m[0][step] - loss) for m in moved)) for step, loss in enumerate(losses)]
        floors = {name: max(apart(m[2][name], weights[name]) for m in moved) for name in weights}
        _references[case] = losses, weights, groups, loss_floors, floors
    return _references[case]


def apart(got: list[float], want: list[float]) -> float:
    return max(abs(g - w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        *((strategy, "groups by name") for strategy in STRATEGIES),
        *((strategy, "frozen parameters") for strategy in STRATEGIES),
        *((strategy, "a subset by module") for strategy in ("tp", "tp_ddp", "tp_fsdp", "tp_fsdp1")),
        *((strategy, "frozen parameters in the optimizer") for strategy in ("ddp", "tp_fsdp", "tp_fsdp1")),
    ],
)
def test_every_strategy_steps_the_same_parameters_as_one_device(ranks: Ranks, strategy: str, case: str) -> None:
    losses, weights, groups, loss_floors, floors = reference(ranks, case)
    told = ranks.call("train", case, strategy, ranks=among(strategy))
    for rank, (got, _, _, sizes) in told.items():
        assert sizes == groups, rank
        beyond = [step for step in range(STEPS) if not abs(got[step] - losses[step]) <= MULTIPLE * loss_floors[step]]
        assert not beyond, (rank, beyond)
    _, before, after, _ = told[0]
    assert list(after) == list(weights), "names and their order are those of one device"
    far = {name: (apart(after[name], weights[name]), floors[name]) for name in weights}
    assert not {name: both for name, both in far.items() if not both[0] <= MULTIPLE * both[1]}
    unmoved = {name for name in before if before[name] == after[name]}
    assert unmoved == NOT_OPTIMIZED[case]
