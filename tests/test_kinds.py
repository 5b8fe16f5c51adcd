"""Kinds of models, losses and batches that are rarer than floating tensors and own a trap each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.data import TensorDataset

import shardproof as sp

WIDTH, HIDDEN, CLASSES = 4, 6, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


DATA = TensorDataset(drawn(48, WIDTH), torch.arange(48) % CLASSES)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.fc2(self.fc1(x).tanh())


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


BASE = sp.Experiment(
    model=Mlp,
    data=DATA,
    loss=mean_loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=8,
    steps=2,
    tp_plan={"fc1": "colwise", "fc2": "rowwise"},
)


def checked(*strategies: str, ranks: int = 2, dtype: str = "float64", reference: str = "single", **changes: Any) -> Any:
    return sp.check(replace(BASE, **changes), strategies, ranks, dtype=dtype, reference=reference)


def verdicts(report: sp.Report, stage: str, name: str) -> set[str]:
    found = {str(c.verdict) for c in report.runs[0].comparisons if (c.stage, c.name) == (stage, name)}
    assert found, f"no {stage} of {name}"
    return found


class Rotary(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(HIDDEN // 2), torch.arange(HIDDEN // 2) + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.turns.is_complex():
            raise TypeError("the imaginary part is lost")
        pairs = torch.view_as_complex(self.fc1(x).unflatten(-1, (-1, 2)).contiguous())
        return self.fc2(torch.view_as_real(pairs * self.turns).flatten(-2))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


class Fourier(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = Spectrum()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.spectrum(self.fc1(x)).abs())


@pytest.mark.parametrize(("dtype"), ["float64", "float32"])
def test_a_complex_buffer_keeps_its_imaginary_part(dtype: str) -> None:
    report = checked("ddp", model=Rotary, dtype=dtype)
    assert report.proven, str(report)
    assert verdicts(report, "buffer", "turns") == {"equal"}


def test_a_complex_activation_is_compared() -> None:
    report = checked("ddp", model=Fourier)
    assert report.proven, str(report)
    assert "not-checked" not in verdicts(report, "forward", "spectrum")


def test_sparse_gradients_are_compared() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(CLASSES, HIDDEN, sparse=True), nn.Linear(HIDDEN, CLASSES))

    report = checked("single", model=build, loss=lambda model, batch: F.cross_entropy(model(batch[1]), batch[1]))
    assert report.proven, str(report)
    assert verdicts(report, "gradient", "0.weight") == {"equal"}


class Chosen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Routed(Mlp):
    """How many elements `chosen` shows depends on values, and so on rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = Chosen()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden.tanh()) + 0.01 * self.chosen(hidden).sum()


def test_a_shape_that_depends_on_values_does_not_stop_the_check() -> None:
    data = TensorDataset(drawn(4096, WIDTH), torch.arange(4096) % CLASSES)
    report = checked("single", model=Routed, data=data, batch_size=4096, steps=1, dtype="bfloat16")
    assert report.proven, str(report)


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(WIDTH))

    def forward(self) -> Tensor:
        return self.weight


class WithGiven(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.given = Given()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.given())


def test_a_module_that_returns_its_own_parameter_keeps_no_hook_of_ours() -> None:
    report = checked("ddp", model=WithGiven, microbatches=2, steps=3)
    assert report.proven, str(report)
    assert not report.runs[0].not_checked


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.factor


def test_a_zero_gradient_of_a_single_number_is_not_checked() -> None:
    assert verdicts(checked("ddp", model=Scaled), "gradient", "factor") == {"not-checked"}


# Random draws.


class PythonDraws(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random())


class NumpyDraws(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(1 + numpy.random.random())


def dropped_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(F.dropout(model(batch[0]), 0.3), batch[1])


@pytest.mark.parametrize(
    "changes", [{"model": PythonDraws}, {"model": NumpyDraws}, {"loss": dropped_loss}], ids=["python", "numpy", "loss"]
)
def test_draws_from_any_generator_are_no_finding(changes: dict[str, Any]) -> None:
    report = checked("ddp", **changes)
    assert report.first is None, str(report)
    assert not report.proven
    assert any("random" in reason for reason in report.runs[0].not_checked)
    assert checked("tp", **changes).proven


# Losses and layouts.


def test_accumulated_gradients_of_flat_tensor_parallel_shards_are_right() -> None:
    report = checked("tp_fsdp1", ranks=4, microbatches=2, fsdp_units=("fc1",), max_grad_norm=0.1)
    assert report.proven, str(report)


@pytest.mark.parametrize("reduced", [lambda x: (x**2).mean(), lambda x: (x**2).sum() / 8], ids=["mean", "sum"])
def test_a_loss_that_is_a_partial_dtensor_is_logged_whole(reduced: Any) -> None:
    plan = {"fc2": ColwiseParallel(use_local_output=False)}
    report = checked("tp", tp_plan=plan, loss=lambda model, batch: reduced(model(batch[0])))
    assert report.proven, str(report)
    assert verdicts(report, "loss", "(root)") <= {"equal", "rounding"}


class OddRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:1]])


class WithOddRows(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.odd = OddRows()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.odd(self.fc1(x).tanh())[:-1])


def test_what_a_trusted_strategy_cannot_make_whole_is_not_checked() -> None:
    report = checked("fsdp", model=WithOddRows, reference="ddp")
    assert report.proven, str(report)
    assert verdicts(report, "forward", "odd") == {"not-checked"}


@dataclass
class Pair:
    x: Tensor
    y: Tensor


def test_a_batch_in_which_no_tensor_is_found_is_refused() -> None:
    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Pair]:
        while True:
            yield Pair(*data[:8])

    with pytest.raises(sp.ExperimentError, match="no tensor was found in a batch of type Pair"):
        checked("ddp", batches=batches, loss=lambda model, batch: F.cross_entropy(model(batch.x), batch.y))


@pytest.mark.parametrize("placements", [{"fc1.weight": 0}, {"fc1.weight": {"tpp": 0}}, {"fc1.weight": {"tp": "0"}}])
def test_placements_of_the_wrong_kind_are_refused(placements: Any) -> None:
    with pytest.raises(sp.ExperimentError, match=r"placements .* the axes are dp_replicate, dp_shard, tp"):
        replace(BASE, placements=placements)
