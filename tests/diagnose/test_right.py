"""The models under right layouts: no finding, and nothing is run twice to explain one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, TIED, BiasedRow, edited, passes, split
from shardproof.zoo.fixtures.steps import nothing, plain_step


@pytest.mark.parametrize(
    ("experiment", "strategies"),
    [
        (PICTURES, ("dp_replicate=3",)),
        (replace(TEXT, microbatches=3, train_step=edited(nothing)), ("dp_replicate=2",)),
        (replace(TIED, parallelize=None), ("dp_shard=2",)),
        (GATED, ("tp=2", "tp=2,dp_replicate=2")),
    ],
    ids=["pictures", "text", "tied", "gated"],
)
def test_the_models_pass_as_they_are(experiment: sp.Experiment, strategies: tuple[str, ...]) -> None:
    passes(experiment, *strategies)


def steps_run(path: Path, experiment: sp.Experiment) -> tuple[list[int], sp.Report]:
    """Which steps rank 0 took under tp=2, written to a file by the user's own step."""

    def step(given: sp.Step) -> Tensor:
        if given.mesh.get_rank() == 0:
            with path.open("a") as file:
                file.write(f"{given.index}\n")
        return plain_step(given)

    report = sp.check(replace(experiment, train_step=step), ("tp=2",))
    return [int(line) for line in path.read_text().splitlines()], report


def test_right_code_is_run_once_and_wrong_code_again_as_far_as_its_divergence(tmp_path: Path) -> None:
    steps, report = steps_run(tmp_path / "right", GATED)
    assert report.proven, str(report)
    assert steps == [0, 1]
    steps, report = steps_run(tmp_path / "wrong", replace(GATED, parallelize=partial(split, row=BiasedRow)))
    assert report.first is not None
    assert report.first.step == 0
    assert steps == [0, 1, 0]
