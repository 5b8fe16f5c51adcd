"""Where rounding is not small: kinks, ties, chaos and gradients that are zero. None of it is a finding."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardproof as sp
from shardproof.compare.measure import MULTIPLE, drowned

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

WIDTH, HIDDEN, CLASSES = 6, 12, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(inputs: Tensor) -> TensorDataset:
    return TensorDataset(inputs, torch.arange(len(inputs)) % CLASSES)


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.fc2(F.relu(self.fc1(x)))


BASE = sp.Experiment(
    model=Mlp,
    data=points(drawn(48, WIDTH)),
    loss=mean_loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=12,
    steps=2,
    tp_plan={"fc1": "colwise", "fc2": "rowwise"},
    fsdp_units=("fc1",),
)


def never_different(experiment: sp.Experiment, *strategies: str, **options: Any) -> sp.Report:
    """Parity, and what could not be compared has a reason."""
    report = sp.check(experiment, strategies, **options)
    assert report.ok, str(report)
    assert report.first is None, str(report)
    for run in report.runs:
        for c in run.comparisons:
            assert c.verdict is not sp.Verdict.DIFFERENT, c
            assert c.reason or c.verdict is not sp.Verdict.NOT_CHECKED
    return report


class Kink(nn.Module):
    """A row-parallel sum that is zero but for rounding, and a ReLU on it: a unit is on or off by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        with torch.no_grad():
            # Every odd row of the first layer is the one before it, and counts with the opposite sign in the second.
            self.fc1.weight[1::2] = self.fc1.weight[::2]
            self.fc1.bias[1::2] = self.fc1.bias[::2]
            self.fc2.weight[:, 1::2] = -self.fc2.weight[:, ::2]
            self.fc2.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.head(F.relu(self.fc2(torch.tanh(self.fc1(x)))))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_relu_on_rounding_alone_is_no_finding(dtype: str) -> None:
    report = never_different(replace(BASE, model=Kink), "tp", "tp_fsdp", dtype=dtype)
    assert any(c.verdict is sp.Verdict.ROUNDING for c in report.runs[0].comparisons)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_relu_inputs_next_to_zero_are_no_finding(dtype: str) -> None:
    inputs = drawn(48, WIDTH)
    inputs[::2] *= 1e-15 if dtype == "float64" else 1e-3

    def build() -> nn.Module:
        model = Mlp()
        nn.init.normal_(model.fc1.bias, std=1e-17)
        return model

    never_different(replace(BASE, model=build, data=points(inputs)), "tp", "tp_fsdp", dtype=dtype)


class Routed(nn.Module):
    """Two experts of which each sample takes the better; the router has equal rows, so that all scores are ties."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(2))
        with torch.no_grad():
            self.router.weight[1] = self.router.weight[0]

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        x = self.fc2(torch.tanh(self.fc1(x)))
        weight, chosen = self.router(x).softmax(-1).topk(1)  # (batch, 1) both
        outputs = torch.stack([expert(x) for expert in self.experts], 1)  # (batch, 2, CLASSES)
        return outputs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, CLASSES)).squeeze(1) * weight


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_tie_between_experts_is_no_finding(dtype: str, seed: int) -> None:
    never_different(replace(BASE, model=Routed, seed=seed, steps=1), "tp", "tp_fsdp", dtype=dtype)


class Chaos(nn.Module):
    """A logistic map on what a linear layer says: what was rounding is doubled in each of its turns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        x = self.fc2(torch.tanh(self.fc1(x))).sigmoid()
        for _ in range(3):
            x = 3.99 * x * (1 - x)
        return self.head(x)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_long_chaotic_run_is_no_finding(dtype: str) -> None:
    experiment = replace(
        BASE, model=Chaos, steps=12, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    )
    report = never_different(experiment, "ddp", "tp", dtype=dtype)
    # Chaotic indeed: in the end rounding moves weights by far more than one unit in the last place.
    eps = torch.finfo(getattr(torch, dtype)).eps
    last = [c for c in report.runs[0].comparisons if c.stage == "update" and c.step == 11]
    assert max(c.floor for c in last) > 1e4 * eps


class KeyBias(nn.Module):
    """Attention whose key bias adds the same to all scores of a query, which softmax ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HIDDEN) for _ in range(3))
        self.o = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH, WIDTH) -> (batch, CLASSES)
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0])
def test_a_gradient_that_is_zero_in_mathematics_and_its_square_are_no_finding(dtype: str, seed: int) -> None:
    experiment = replace(
        BASE,
        model=KeyBias,
        data=points(drawn(48, WIDTH, WIDTH)),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        tp_plan={"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"},
        fsdp_units=(),
        seed=seed,
    )
    never_different(experiment, "tp", "tp_fsdp", dtype=dtype)


# What is drowned, and what is not.


def test_only_a_tensor_that_is_no_larger_than_its_floor_is_drowned() -> None:
    assert drowned(error=20.0, floor=1.0, size=1.0)
    assert drowned(error=20.0, floor=1.0, size=2.0)
    assert not drowned(error=20.0, floor=1.0, size=2.1)
    assert not drowned(error=MULTIPLE**2 * 1.01, floor=1.0, size=1.0)
    assert not drowned(error=float("nan"), floor=1.0, size=1.0)
    assert not drowned(error=1e-9, floor=0.0, size=1.0)


def test_a_wrong_gradient_where_zero_was_right_is_found() -> None:
    """Noise in the reference hides no number that is no noise."""

    def spoilt(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        del parallelism
        model.k.bias.register_hook(lambda grad: grad + 1e-9 * (1 + mesh.get_rank()))
        return nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())

    experiment = replace(BASE, model=KeyBias, data=points(drawn(48, WIDTH, WIDTH)), parallelize=spoilt, fsdp_units=())
    first = sp.check(experiment, ("ddp",), 2).first
    assert first is not None
    assert (first.stage, first.where, first.step) == ("gradient", "k.bias", 0)


def test_gradients_of_outputs_have_error_and_floor_in_one_unit() -> None:
    """DDP's are as many times the reference's as there are data ranks, and so is their rounding."""
    compared = never_different(BASE, "ddp", ranks=4).runs[0].comparisons
    floors = {c.name: c.floor for c in compared if c.stage == "backward" and c.step == 0}
    alone = sp.check(BASE, ("single",), 1).runs[0].comparisons
    assert floors == {c.name: pytest.approx(4 * c.floor) for c in alone if c.stage == "backward" and c.step == 0}


# The smallest fault that was tried, and the largest right error: benchmarks/noise_margins.py prints all of them.


def margins() -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    import noise_margins

    return noise_margins


def test_a_clean_decoder_of_24_layers_stays_under_the_threshold_in_bfloat16() -> None:
    found = margins().clean("bfloat16")
    assert max(found.values()) < MULTIPLE / 2, found


@pytest.mark.parametrize("fault", ["norm", "column"])
def test_a_missing_reduction_in_the_last_of_24_layers_is_found_in_bfloat16(fault: str) -> None:
    margin = margins().faulty("bfloat16", fault)
    assert (margin.stage, margin.step) == ("gradient", 0)
    assert margin.where.startswith("blocks.23.norm2.")
    assert margin.floors > MULTIPLE
