"""Right code that once raised an alarm, or ended in an error of torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import shardproof as sp
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import mlp, uneven_parts
from shardproof.zoo.fixtures.steps import plain_step
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


SHUFFLE = torch.Generator().manual_seed(5)
"""Of the module, as scripts keep theirs: a second iteration goes on where the first one stopped."""


def shuffled(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
    each, own = SETTING.batch // parallelism.dp, mesh["dp"].get_local_rank()
    order = torch.randperm(len(data), generator=SHUFFLE).tolist()
    for first in range(0, len(data), SETTING.batch):
        start = first + own * each
        yield default_collate([data[i] for i in order[start : start + each]])


def clip_as_torch_does(step: sp.Step) -> None:
    nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm)


def clip_without_epsilon(step: sp.Step) -> None:
    """By min(1, limit / norm); torch adds 1e-6 to the norm."""
    grads = [parameter.grad for parameter in step.model.parameters()]
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    for grad in grads:
        grad *= min(1.0, step.max_grad_norm / norm.item())


def clipped(clip: Any, **changes: Any) -> sp.Experiment:
    step = partial(plain_step, before_update=clip)
    return mlp(SETTING, max_grad_norm=0.05, parallelize=replicated, train_step=step, **changes)


def test_a_generator_of_the_module_shuffles_for_a_step_that_clips():
    passes(clipped(clip_as_torch_does, batches=shuffled), "dp_replicate=3")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_clipping_without_torchs_epsilon_is_right(dtype: str):
    report = sp.check(clipped(clip_without_epsilon), ("dp_replicate=3",), dtype=dtype)
    assert report.proven, str(report)


def zero(step: sp.Step, *, others: str) -> Tensor:
    """Each parameter has an owner, to whom gradients are reduced, who steps and hands out the weight."""
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    value.backward()
    ranks, own = step.parallelism.dp, step.mesh.get_rank()
    parameters = list(step.model.parameters())
    for number, parameter in enumerate(parameters):
        total = parameter.grad.clone()
        dist.reduce(total, number % ranks)
        if number % ranks == own:
            parameter.grad = total / ranks
        elif others == "none":
            parameter.grad = None
    step.optimizer.step()
    for number, parameter in enumerate(parameters):
        dist.broadcast(parameter.detach(), number % ranks)
    return value.detach()


def bare(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return model


@pytest.mark.parametrize("others", ["none", "their own"])
def test_gradients_reduced_to_the_owner_who_steps_and_broadcasts_are_right(others: str):
    report = sp.check(mlp(SETTING, parallelize=bare, train_step=partial(zero, others=others)), ("dp_replicate=3",))
    assert report.first is None, str(report)
    assert report.ok, str(report)
