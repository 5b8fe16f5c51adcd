"""Reports as a check would make them, without one."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Page, opened
from shown_names import LONG_NAME, NAMES

from shardproof.compare.picture import Picture
from shardproof.compare.verdict import Comparison, Sample, Verdict
from shardproof.diagnose.finding import Finding, Hypothesis
from shardproof.report.data import Report, Run, Shown

MESHES = {
    "ddp": {"dp_replicate": 8, "dp_shard": 1, "tp": 1},
    "fsdp": {"dp_replicate": 1, "dp_shard": 8, "tp": 1},
    "tp_fsdp": {"dp_replicate": 1, "dp_shard": 4, "tp": 2},
    "dp_replicate=2,dp_shard=2,tp=2": {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
}


def clean(stage: str, name: str) -> Comparison:
    if stage == "batch":
        return Comparison(step=0, stage=stage, name=name, verdict=Verdict.EQUAL)
    if stage == "optimizer-state":
        return Comparison(step=0, stage=stage, name=name, verdict=Verdict.NOT_CHECKED, reason="zero in the reference")
    return Comparison(step=0, stage=stage, name=name, verdict=Verdict.ROUNDING, error=2.1e-16, floor=1.7e-16)


def run(strategy: str) -> Run:
    tensors = [clean("batch", "(root)")]
    tensors += [clean(stage, name) for stage in ("gradient", "optimizer-state", "update") for name in NAMES]
    return Run(strategy=strategy, degrees=MESHES[strategy], comparisons=tuple(tensors), findings=(), time_s=1.3)


@pytest.fixture
def parity() -> Report:
    return Report(
        experiment="examples/decoder.py:experiment",
        runs=tuple(run(strategy) for strategy in MESHES),
        ranks=8,
        steps=3,
        dtype="float64",
        device="cpu",
        reference="single",
        warnings=("the optimizer is Adam, which hides a constant factor in the gradients",),
        time_s=14.2,
    )


@pytest.fixture
def wrong() -> Comparison:
    return Comparison(
        step=0,
        stage="gradient",
        name="layers.0.attention_norm.weight",
        verdict=Verdict.DIFFERENT,
        shape=(64,),
        layout="tp: replicated, dp_shard: slices of dim 0",
        error=0.0123,
        floor=3.1e-17,
        ranks=(0, 1, 2, 3, 7),
        ratio=0.5,
        samples=(
            Sample(rank=0, index=(3,), got=0.0113427, want=0.0226854),
            Sample(rank=2, index=(40,), got=-0.00871, want=-0.01742),
        ),
    )


@pytest.fixture
def finding(wrong: Comparison) -> Finding:
    return Finding(
        cause="grad-not-summed",
        stage="gradient",
        where="layers.0.attention_norm.weight",
        axis="tp",
        factor=0.5,
        ranks=(0, 1, 2, 3, 7),
        step=0,
        evidence="the sum over tp equals the reference (residual 2.1e-16), what any one rank holds does not",
        fix="all-reduce the gradients of the norms over tp after backward",
        comparison=wrong,
    )


@pytest.fixture
def divergence(parity: Report, wrong: Comparison, finding: Finding) -> Report:
    """`tp_fsdp` lacks half of a gradient; the run with explicit degrees holds NaN in a tensor with a long name."""
    ddp, fsdp, tp_fsdp, degrees = parity.runs
    later = replace(finding, stage="grad-norm", where="(root)", cause="unexplained", factor=None, comparison=None)
    bad = replace(tp_fsdp, comparisons=(*tp_fsdp.comparisons, wrong), findings=(finding, later))
    poisoned = Comparison(
        step=-1,
        stage="initial-state",
        name=LONG_NAME,
        verdict=Verdict.DIFFERENT,
        error=float("nan"),
        floor=3.1e-17,
        ranks=(5,),
        samples=(Sample(rank=5, index=(11, 1023), got=float("nan"), want=1.5),),
    )
    # A tensor that differs and that nobody has explained.
    unexplained = replace(degrees, comparisons=(poisoned, *degrees.comparisons), time_s=201.0)
    return replace(parity, runs=(ddp, fsdp, bad, unexplained))


def shown(stage: str, shape: tuple[int, ...], layout: str, values: object) -> Shown:
    return Shown(step=0, stage=stage, name="2.weight", part="", layout=layout, shape=shape, values=values)


@pytest.fixture
def held(parity: Report) -> Report:
    """The gradient of the same weight on rank 2, as three strategies lay it out."""
    ddp, fsdp, tp_fsdp, _ = parity.runs
    batch = Shown(step=0, stage="batch", name="(root)", part="0", layout="samples 2:4", shape=(2,), values=[1, 0])
    whole = shown("gradient", (2, 2), "whole", [[0.1134, 0.0], [0.1134, 0.0]])
    row = shown("gradient", (1, 2), "dp_shard: rows 0:1", [[0.1134, 0.0]])
    none = shown("gradient", (0, 2), "dp_shard: rows 2:2", [])
    runs = ((ddp, whole), (fsdp, row), (tp_fsdp, none))
    # Recorded out of order: reading goes by stage.
    return replace(parity, runs=tuple(replace(run, shown={2: (piece, batch)}) for run, piece in runs))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of the page."""
    with opened(tmp_path_factory.mktemp("browser")) as page:
        yield page


def picture_of(comparison: Comparison) -> Picture:
    """A vector of 64 over two peers of four data ranks, of which the first half is off."""
    half = tuple(0.01 * at for at in range(8))
    return Picture(
        key=comparison.key,
        shape=(64,),
        split=0,
        cells=(1, 64),
        owners=((0, 2, 4, 6), (1, 3, 5, 7)),
        held=bytes([0] * 32 + [1] * 32),
        heat=array("d", [comparison.error * (at + 1) / 32 for at in range(31)] + [math.inf] + [0.0] * 32),
        first=(0, 28),
        window=(1, 8),
        want=half,
        got=((0, (*(value / 2 for value in half[:4]), None, None, None, None)), (1, (None,) * 4 + half[4:])),
    )


@pytest.fixture
def pictured(divergence: Report) -> Report:
    """The report with a picture of the wrong tensor, its errors rank by rank, and what was tried."""
    ddp, fsdp, bad, last = divergence.runs
    wrong = replace(bad.comparisons[-1], errors=(0.0123, 0.004, 0.0123, 0.0123, None, 0.0, 1e-17, 0.0123))
    tried = (Hypothesis(name="another rank's slice", residual=4.1e14, holds=False),)
    found = replace(bad.findings[0], comparison=wrong, tried=tried)
    bad = replace(
        bad,
        comparisons=(*bad.comparisons[:-1], wrong),
        findings=(found, *bad.findings[1:]),
        pictures=(picture_of(wrong),),
    )
    return replace(divergence, runs=(ddp, fsdp, bad, last))


@pytest.fixture
def page(browser: Page, pictured: Report, tmp_path: Path) -> Page:
    """The page of that report, in the browser."""
    pictured.to_html(tmp_path / "report.html")
    return browser.open(tmp_path / "report.html")
