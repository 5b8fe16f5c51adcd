"""Right code that once raised an alarm, or ended in an error of torch's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import mlp, uneven_parts
from shardproof.zoo.setting import Setting

SETTING = Setting(dp=3)


def passes(experiment: sp.Experiment, strategy: str) -> None:
    report = sp.check(experiment, (strategy,))
    assert report.ok, str(report)
    assert report.proven


def weighted(step: sp.Step) -> Tensor:
    """Each rank's mean counts by its samples, and what it logs is its own part's mean."""
    step.optimizer.zero_grad()
    batch: Any = step.microbatches[0]
    value = step.loss(step.model, batch)
    (value * (len(batch[1]) * step.parallelism.dp / SETTING.batch)).backward()
    step.optimizer.step()
    return value.detach()


def test_a_rank_may_log_the_mean_of_its_own_part_of_an_uneven_batch():
    experiment = mlp(SETTING, batches=uneven_parts(SETTING), parallelize=replicated, train_step=weighted)
    passes(experiment, "dp_replicate=3")


def test_a_rank_that_logs_something_else_of_an_uneven_batch_is_found():
    experiment = mlp(SETTING, batches=uneven_parts(SETTING), parallelize=replicated)
    report = sp.check(replace(experiment, train_step=lambda step: weighted(step) + 0.01), ("dp_replicate=3",))
    assert report.first is not None
    assert (report.first.stage, report.first.step) == ("loss", 0)


def static(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), static_graph=True)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_ddp_with_a_static_graph_may_have_micro_batches(microbatches: int):
    passes(mlp(SETTING, parallelize=static, microbatches=microbatches), "dp_replicate=3")


def reseeding(step: sp.Step, *, then: float) -> Tensor:
    """Seeds torch anew, as a loop with a seed for every step does, though nothing of the model draws."""
    torch.manual_seed(step.index)
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    value.backward()
    step.optimizer.step()
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter *= then
    return value.detach()


@pytest.mark.parametrize(("then", "ok"), [(1.0, True), (2.0, False)])
def test_seeding_anew_is_no_drawing_and_hides_nothing(then: float, ok: bool):
    step = lambda step: reseeding(step, then=then)  # noqa: E731 (a lambda as users write it)
    report = sp.check(mlp(SETTING, parallelize=replicated, train_step=step), ("dp_replicate=3",))
    assert report.ok is ok, str(report)
    assert not any("random" in reason for reason in report.runs[0].not_checked)
