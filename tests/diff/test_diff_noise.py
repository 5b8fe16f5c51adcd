"""The noise floor of two recordings: estimated, or measured by disturbed recordings of the trusted run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from somebodys_loop import OnRanks

import shardproof as sp
from shardproof.ranks import Ranks, start

DRAWS = (1, 2, 3)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`single`, three disturbed ones, and `tp` on 4 ranks, all in float32."""
    made = tmp_path_factory.mktemp("noise")
    for draw in (None, *DRAWS):
        path = made / ("single" if draw is None else f"single-{draw}")
        ranks.call("train_disturbed", path, "single", draw, torch.float32, ranks=[0])
    ranks.call("train_in", made / "tp", "tp", 4, torch.float32)
    ranks.call("train_in", made / "tp-double", "tp", 4, torch.float64)
    return made


def test_without_disturbed_runs_the_floor_is_an_estimate_and_the_report_says_so(folder: Path) -> None:
    report = sp.diff(folder / "single", folder / "tp")
    assert report.ok, str(report)
    assert report.estimated
    assert "estimated noise floor" in str(report)


def test_disturbed_runs_measure_the_floor(folder: Path) -> None:
    noise = [folder / f"single-{draw}" for draw in DRAWS]
    report = sp.diff(folder / "single", folder / "tp", noise=noise)
    assert report.ok, str(report)
    assert not report.estimated
    assert "measured noise floor" in " ".join(str(report).split())
    floors = {c.key: c.floor for c in report.runs[0].comparisons if c.stage == "gradient"}
    estimated = {c.key: c.floor for c in sp.diff(folder / "single", folder / "tp").runs[0].comparisons}
    assert floors
    assert all(0 < floor < 100 * estimated[key] for key, floor in floors.items())


def test_a_run_in_less_precision_is_held_to_its_own_precision(folder: Path) -> None:
    """The trusted run is in float64, and what float32 rounds is no divergence."""
    report = sp.diff(folder / "tp-double", folder / "tp")
    assert report.ok, str(report)
    assert report.dtype == "float32 against float64"
    assert sp.diff(folder / "single", folder / "tp-double").ok


class Shifted(torch.nn.Module):
    """Three numbers whose sum is added to all logits, of which a softmax knows nothing: their gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(5, 7)
        self.shift = torch.nn.Parameter(torch.tensor([0.1, -0.3, 0.4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_cancels_wholly_is_no_divergence(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 5, generator=generator), torch.randint(0, 7, (24,), generator=generator)
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Shifted().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with sp.record(tmp_path / str(parts), model, optimizer):
            for step in range(3):
                optimizer.zero_grad()
                for part in torch.arange(8 * step, 8 * step + 8).chunk(parts):
                    logits = model(inputs[part].to(dtype))
                    (torch.nn.functional.cross_entropy(logits, labels[part]) / parts).backward()
                optimizer.step()
    report = sp.diff(tmp_path / "1", tmp_path / "2")
    assert report.ok, str(report)
