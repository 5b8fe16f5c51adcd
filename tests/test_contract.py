"""The small print of the contract (DESIGN.md), a test or a few for each line. Right code never gets a finding."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import shardproof as sp
from shardproof.zoo.fixtures.megatron import Column, Row

ROOT = Path(__file__).parents[1]
SAMPLES, WIDTH, HIDDEN, CLASSES = 48, 4, 6, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DATA = TensorDataset(drawn(SAMPLES, WIDTH), torch.arange(SAMPLES) % CLASSES)


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.drop(self.fc2(self.fc1(x).tanh()))


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


BASE = sp.Experiment(
    model=Mlp,
    data=DATA,
    loss=mean_loss,
    optimizer=sgd,
    batch_size=8,
    steps=2,
    tp_plan={"fc1": "colwise", "fc2": "rowwise"},
    fsdp_units=("fc1",),
)


def checked(*strategies: str, ranks: int = 2, **changes: Any) -> sp.Report:
    return sp.check(replace(BASE, **changes), strategies, ranks)


def agrees(report: sp.Report) -> sp.Report:
    assert report.ok, str(report)
    assert report.first is None
    return report


def comparisons(report: sp.Report, stage: str, run: int = 0) -> list[sp.Comparison]:
    return [c for c in report.runs[run].comparisons if c.stage == stage]


def count_of(report: sp.Report, collective: str) -> int:
    """How often a collective ran in the first step on rank 0, over all axes."""
    return sum(names.get(collective, 0) for names in report.runs[0].collectives.values())


class Notes:
    """What code on the ranks wrote down; appending a short line to a file is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, "world": dist.get_world_size(), "rank": dist.get_rank(), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, kind: str, **having: Any) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [line for line in lines if line["kind"] == kind and having.items() <= line.items()]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


# A layout and a step such as a careful user writes.


def by_hand(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    if parallelism.tp > 1:
        parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    if parallelism.dp_shard > 1:
        return fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    if parallelism.dp_replicate > 1:
        return DistributedDataParallel(model, process_group=mesh["dp_replicate"].get_group())
    return model


def step_by_hand(step: sp.Step) -> float:
    step.optimizer.zero_grad()
    total, last = 0.0, len(step.microbatches) - 1
    for m, batch in enumerate(step.microbatches):
        with ExitStack() as stack:
            if isinstance(step.model, FSDPModule):
                step.model.set_requires_gradient_sync(m == last)
            elif m < last and hasattr(step.model, "no_sync"):
                stack.enter_context(step.model.no_sync())
            loss = step.loss(step.model, batch) / len(step.microbatches)
            loss.backward()
        total += loss.item()
    if step.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm)
    step.optimizer.step()
    return total


def reduced_by_hand(step: sp.Step) -> Tensor:
    """Plain data parallelism on a bare model, with the reduction in the step."""
    step.optimizer.zero_grad()
    total = torch.zeros(())
    for batch in step.microbatches:
        loss = step.loss(step.model, batch) / len(step.microbatches)
        loss.backward()
        total += loss.detach()
    for parameter in step.model.parameters():
        dist.all_reduce(parameter.grad, group=step.mesh["dp"].get_group())
        parameter.grad /= step.parallelism.dp
    step.optimizer.step()
    return total


def bare(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return model


# Mesh.


@pytest.mark.parametrize(
    ("strategy", "degrees"),
    [("ddp", (4, 1, 1)), ("fsdp", (1, 4, 1)), ("hsdp", (2, 2, 1)), ("tp", (1, 1, 4)), ("tp_fsdp", (1, 2, 2))],
)
def test_the_mesh_always_has_three_axes_and_dp_flattened(
    notes: Notes, strategy: str, degrees: tuple[int, int, int]
) -> None:
    """Mesh: `dp_replicate`, `dp_shard`, `tp` in this order, size 1 too; `dp`; the attributes of `parallelism`."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        p = parallelism
        notes.add(
            "mesh",
            axes=list(mesh.mesh_dim_names),
            sizes=[mesh[axis].size() for axis in ("dp_replicate", "dp_shard", "tp")],
            dp=[mesh["dp"].size(), mesh["dp"].get_local_rank()],
            parallelism=[p.dp_replicate, p.dp_shard, p.tp, p.dp, p.world_size, p.strategy],
        )
        return by_hand(model, mesh, parallelism)

    # Twelve is divided by 2, 3 and 4.
    agrees(checked(strategy, ranks=4, parallelize=parallelize, batch_size=12, model=lambda: Wide(4)))
    seen = notes.of("mesh")
    dp = degrees[0] * degrees[1]
    assert sorted(line["rank"] for line in seen) == [0, 1, 2, 3]
    for line in seen:
        assert line["axes"] == ["dp_replicate", "dp_shard", "tp"]
        assert line["sizes"] == list(degrees)
        assert line["dp"] == [dp, line["rank"] // degrees[2]]
        assert line["parallelism"] == [*degrees, dp, 4, strategy]


class Wide(Mlp):
    """A hidden width that `tp` divides."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * multiple), nn.Linear(2 * multiple, CLASSES)


def test_explicit_degrees_bring_their_own_number_of_ranks_and_dashes_are_underscores() -> None:
    """Mesh: a strategy with degrees does not look at `ranks`; `-` is read as `_`."""
    report = agrees(sp.check(BASE, ("tp=2,dp-shard=2", "FSDP"), ranks=2))
    assert [run.strategy for run in report.runs] == ["tp=2,dp_shard=2", "fsdp"]
    assert report.runs[0].degrees == {"dp_replicate": 1, "dp_shard": 2, "tp": 2}
    assert report.runs[1].degrees == {"dp_replicate": 1, "dp_shard": 2, "tp": 1}


# Under test.


def test_the_reference_uses_nothing_of_the_user_and_is_answered_one_rank(notes: Notes) -> None:
    """Under test: layout, loader and step are the user's; the reference has a world of its own, of size 1."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        notes.add("parallelize")
        return by_hand(model, mesh, parallelism)

    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        notes.add("batches")
        yield from in_order(data, mesh, parallelism)

    def step(step: sp.Step) -> float:
        notes.add("step")
        return step_by_hand(step)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        notes.add("loss", samples=len(batch[0]), environment=os.environ["WORLD_SIZE"])
        # A factor that is 1 only where code that asks for the number of ranks is answered 1.
        return mean_loss(model, batch) * (1.0 if dist.get_world_size() == 2 else dist.get_world_size())

    agrees(checked("ddp", parallelize=parallelize, batches=batches, train_step=step, loss=loss))
    for kind, times in (("parallelize", 1), ("batches", 1), ("step", BASE.steps)):
        assert [line["world"] for line in notes.of(kind)] == [2] * (2 * times)
    alone = notes.of("loss", world=1)
    assert alone
    assert all(line["rank"] == 0 and line["samples"] == 8 and line["environment"] == "1" for line in alone)


def test_loss_and_step_get_the_very_object_that_parallelize_returned() -> None:
    """Under test: no proxies; attributes set on the model in one place are seen in the others."""
    returned: list[nn.Module] = []

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        returned[:] = [by_hand(model, mesh, parallelism)]
        returned[0].set_by_layout = 7
        return returned[0]

    def step(step: sp.Step) -> float:
        if step.model is not returned[0] or step.model.set_by_layout != 7:
            raise TypeError("the step got another object")
        step.model.set_by_step = step.index
        return step_by_hand(step)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if dist.get_world_size() > 1 and (model is not returned[0] or not hasattr(model, "set_by_step")):
            raise TypeError("the loss got another object")
        return mean_loss(model, batch)

    agrees(checked("ddp", "fsdp", parallelize=parallelize, train_step=step, loss=loss))
    agrees(checked("tp", ranks=2, parallelize=parallelize, train_step=step, loss=loss))


def test_another_experiment_may_be_the_reference() -> None:
    """Under test: `reference=` names another Experiment, trained by its own step on one device, without its layout."""
    agrees(sp.check(BASE, ("ddp",), 2, reference=replace(BASE, parallelize=broken)))
    agrees(sp.check(replace(BASE, train_step=doubled), ("single",), 1, reference=replace(BASE, train_step=doubled)))
    other = sp.check(BASE, ("ddp",), 2, reference=replace(BASE, optimizer=adamw))
    assert other.first is not None
    assert other.first.stage in ("optimizer-state", "update")


def test_another_strategy_may_be_the_reference() -> None:
    """Under test: `reference=` names another strategy."""
    agrees(sp.check(BASE, ("fsdp",), 2, reference="ddp"))


def broken(*_: object) -> None:
    raise TypeError("this must not be called")


# Order.


def in_order(data: Any, mesh: Any, parallelism: sp.Parallelism, order: list[int] | None = None) -> Iterator[Any]:
    """One micro-batch a step: this data rank's part of every global batch of eight."""
    order = order if order is not None else list(range(len(data)))
    each = 8 // parallelism.dp
    for start in range(0, len(order), 8):
        own = order[start:][mesh["dp"].get_local_rank() * each :][:each]
        yield tuple(torch.stack([data[i][leaf] for i in own]) for leaf in range(2))


def test_part_r_times_m_plus_m_is_what_rank_r_reads_as_its_micro_batch_m() -> None:
    """Order: the global batch is cut into dp parts in order, each part into micro-batches in order."""
    numbers = torch.arange(48.0).reshape(48, 1)
    experiment = replace(
        BASE,
        model=lambda: nn.Linear(1, 1),
        data=numbers,
        loss=lambda m, b: m(b / 48).square().mean(),
        batch_size=12,
        microbatches=2,
        fsdp_units=(),
    )
    report = agrees(sp.check(experiment, ("ddp",), 3, show=(0, 1, 2)))
    for rank, shown in report.runs[0].shown.items():
        read = [entry.values for entry in shown if entry.stage == "batch"]
        first = rank * 4
        assert read[:2] == [[[first + 0.0], [first + 1.0]], [[first + 2.0], [first + 3.0]]]
        assert read[2] == [[first + 12.0], [first + 13.0]]


def test_tp_peers_read_the_same_and_data_ranks_do_not(notes: Notes) -> None:
    """TP peers: must get the same samples."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        notes.add("read", labels=batch[1].tolist(), first=round(batch[0].double().sum().item(), 6))
        return mean_loss(model, batch)

    agrees(checked("tp_fsdp", ranks=4, loss=loss, steps=1))
    read = {line["rank"]: line["first"] for line in notes.of("read", world=4)}
    assert read[0] == read[1] != read[2] == read[3]


def test_batches_is_called_once_and_asked_for_no_more_than_is_needed(notes: Notes) -> None:
    """Order: `batches` is called once on each rank, and yields all micro-batches of all steps, in order."""

    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        notes.add("called")
        for number in range(1000):
            notes.add("yielded", number=number)
            start = (number % 2) * 2 + mesh["dp"].get_local_rank() * 4 + (number // 2) * 8
            yield tuple(leaf[start : start + 2] for leaf in data.tensors)

    agrees(checked("ddp", microbatches=2, batches=batches))
    assert len(notes.of("called")) == 2
    for rank in (0, 1):
        assert [line["number"] for line in notes.of("yielded", rank=rank)] == [0, 1, 2, 3]


def test_batches_that_end_early_are_an_error() -> None:
    """Order: ending early is an error."""
    with pytest.raises(sp.ExperimentError, match="ended after 6 micro-batches"):
        checked("ddp", steps=7, batches=in_order)


@pytest.mark.parametrize(
    "order",
    [
        [7, 2, 5, 0, 1, 6, 3, 4, *range(15, 7, -1), *range(16, 48)],
        torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist(),
    ],
    ids=["inside one global batch", "over the whole epoch"],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_permutation_or_a_shuffle_of_the_users_own_is_no_finding(strategy: str, order: list[int]) -> None:
    """Order: the reference replays the samples that were read, found by content."""
    agrees(checked(strategy, batches=lambda data, mesh, p: in_order(data, mesh, p, order)))


def test_a_users_augmentation_at_random_is_no_finding() -> None:
    """Order: what was read is replayed, also where no sample of the data set looks like it."""

    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        for inputs, labels in in_order(data, mesh, parallelism):
            yield inputs + torch.rand(len(inputs), 1) + mesh["dp"].get_local_rank(), labels

    agrees(checked("ddp", "fsdp", batches=batches))


def test_data_ranks_that_read_the_same_batch_are_a_finding() -> None:
    """Order: data ranks must be disjoint."""
    report = checked("ddp", batches=lambda data, mesh, p: (data[i * 4 : i * 4 + 4] for i in range(12)))
    assert report.first is not None
    assert (report.first.cause, report.first.stage, report.first.step) == ("batch-repeated-across-dp", "batch", 0)
    assert report.first.ranks == (0, 1)
    assert report.first.axis == "dp_replicate"


def test_samples_read_twice_while_others_were_not_are_a_finding() -> None:
    """Order: nothing is read twice or left out within an epoch."""

    def the_same_each_step(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        first = next(in_order(data, mesh, parallelism))
        while True:
            yield first

    report = checked("ddp", batches=the_same_each_step)
    assert report.first is not None
    assert (report.first.cause, report.first.stage, report.first.step) == ("data-order", "batch", 1)


def test_a_second_epoch_of_the_users_loader_is_no_finding() -> None:
    """Order: the next epoch reads everything once more."""

    def two_epochs(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        yield from in_order(data, mesh, parallelism, list(range(16)))
        yield from in_order(data, mesh, parallelism, list(range(15, -1, -1)))

    agrees(checked("ddp", data=TensorDataset(*DATA[:16]), steps=4, batches=two_epochs))


def test_torchs_distributed_sampler_is_no_finding_over_two_epochs() -> None:
    """Order: its last batch is filled up with samples of the same epoch, and every epoch is shuffled anew."""

    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
        rank = mesh["dp"].get_local_rank()
        sampler = DistributedSampler(data, num_replicas=parallelism.dp, rank=rank, shuffle=True)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            yield from loader

    agrees(checked("ddp", "fsdp", data=TensorDataset(*DATA[:11]), batch_size=4, steps=9, batches=batches))


def test_shuffling_is_the_same_for_every_layout() -> None:
    """Order: `check(shuffle=True)` shuffles the data in one order for all."""
    report = agrees(sp.check(BASE, ("ddp", "tp_fsdp"), 4, shuffle=True, show=(0,)))
    (read,) = [s.values for s in report.runs[0].shown[0] if (s.step, s.stage, s.part) == (0, "batch", "[0]")]
    assert read != DATA[:2][0].double().tolist()


# TP peers.


def one_sample_each(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[Any]:
    """Blind to which ranks are TP peers: every rank reads its own."""
    for start in range(0, 48, 4):
        yield data[start + dist.get_rank() : start + dist.get_rank() + 1]


def test_tp_peers_that_read_different_samples_are_a_finding() -> None:
    """TP peers: must get the same samples."""
    report = checked("tp_fsdp", ranks=4, batch_size=4, batches=one_sample_each)
    assert report.first is not None
    assert (report.first.cause, report.first.axis, report.first.step) == ("batch-differs-in-group", "tp", 0)
    assert report.first.ranks == (0, 1, 2, 3)


SPLIT_PLAN = {"fc1": ColwiseParallel(input_layouts=Shard(0)), "fc2": RowwiseParallel(output_layouts=Shard(0))}


def test_where_the_plan_splits_the_batch_over_tp_the_gradients_are_what_is_wrong() -> None:
    """TP peers: unless the plan's own input layout says that the batch is split over `tp`."""
    report = checked("tp_fsdp", ranks=4, batch_size=4, batches=one_sample_each, tp_plan=SPLIT_PLAN)
    assert report.first is not None
    assert (report.first.cause, report.first.stage, report.first.axis) == ("grad-scale", "gradient", "tp")
    assert report.first.factor == pytest.approx(2.0)
    before = [c for c in comparisons(report, "batch") + comparisons(report, "forward") if c.step == 0]
    assert {str(c.verdict) for c in before} <= {"equal", "rounding"}


def test_a_batch_split_over_tp_is_right_where_the_loss_is_divided_by_tp() -> None:
    """TP peers: a batch that is rightly split gets no finding."""

    def step(step: sp.Step) -> float:
        step.optimizer.zero_grad()
        loss = step.loss(step.model, step.microbatches[0])
        (loss / step.parallelism.tp).backward()
        step.optimizer.step()
        return loss.item()

    report = checked("tp_fsdp", ranks=4, batch_size=4, batches=one_sample_each, tp_plan=SPLIT_PLAN, train_step=step)
    assert report.first is None, str(report)
    assert report.ok


# What parallelize owes our step.


def collectives(strategy: str, microbatches: int, collective: str, **changes: Any) -> int:
    return count_of(agrees(checked(strategy, microbatches=microbatches, **changes)), collective)


@pytest.mark.parametrize("parallelize", [None, by_hand], ids=["ours", "by hand"])
@pytest.mark.parametrize(("strategy", "collective"), [("ddp", "allreduce"), ("fsdp", "reduce_scatter_base")])
def test_gradients_are_reduced_in_the_last_micro_batch_only(strategy: str, collective: str, parallelize: Any) -> None:
    """What `parallelize` owes: our step turns the synchronisation of DDP and FSDP off for earlier micro-batches."""
    once = collectives(strategy, 1, collective, parallelize=parallelize)
    assert once > 0
    assert collectives(strategy, 4, collective, parallelize=parallelize) == once


class Reducing(nn.Module):
    """Data parallelism of a user's own: every backward pass averages what it adds."""

    def __init__(self, inner: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner = inner
        self.no_sync_was_asked_for = False
        for parameter in inner.parameters():
            parameter.register_hook(lambda grad: self._averaged(grad, group))

    @staticmethod
    def _averaged(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=group)
        return grad / dist.get_world_size(group)

    def no_sync(self) -> None:
        raise TypeError("nobody but the user calls this")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_modules_that_our_step_does_not_know_keep_their_habits() -> None:
    """What `parallelize` owes: only DDP and FSDP are known; others reduce as often as they like."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return Reducing(model, mesh["dp"].get_group())

    assert collectives("ddp", 1, "allreduce", parallelize=parallelize) == 4
    assert collectives("ddp", 4, "allreduce", parallelize=parallelize) == 16


def test_a_wrapper_that_does_not_reduce_is_a_finding() -> None:
    """What `parallelize` owes: gradients averaged over dp by the end of the last backward."""
    report = checked("ddp", parallelize=bare)
    assert report.first is not None
    assert report.first.stage == "gradient"


# What train_step owns.


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_right_step_of_the_users_own_is_no_finding(microbatches: int) -> None:
    """What `train_step` owns: zero_grad, scaling, optimizer.step; returning its own part's loss is right."""
    agrees(checked("ddp", "fsdp", "tp", microbatches=microbatches, train_step=step_by_hand))


def test_a_step_that_logs_the_mean_over_dp_is_right_as_well() -> None:
    """What `train_step` owns: the loss of its own part, or the mean over dp."""

    def step(step: sp.Step) -> Tensor:
        logged = torch.tensor(step_by_hand(step))
        dist.all_reduce(logged, group=step.mesh["dp"].get_group())
        return logged / step.parallelism.dp

    agrees(checked("ddp", "fsdp", train_step=step))


@pytest.mark.parametrize("wrong", ["sum over dp", "one peer alone"])
def test_a_step_that_logs_another_loss_is_a_finding(wrong: str) -> None:
    """What `train_step` owns: the logged loss is compared, and TP peers must agree."""

    def step(step: sp.Step) -> float:
        logged = step_by_hand(step)
        if wrong == "sum over dp":
            return logged * step.parallelism.dp
        return logged + step.mesh["tp"].get_local_rank()

    report = checked("fsdp" if wrong == "sum over dp" else "tp", train_step=step)
    assert report.first is not None
    assert (report.first.stage, report.first.step) == ("loss", 0)


def test_the_step_is_handed_what_the_contract_says(notes: Notes) -> None:
    """What `train_step` owns: `Step` and its fields; `microbatches` is a list."""

    def step(step: sp.Step) -> float:
        notes.add(
            "step",
            index=step.index,
            microbatches=[type(step.microbatches).__name__, len(step.microbatches)],
            norm=step.max_grad_norm,
            types=[isinstance(step.optimizer, torch.optim.SGD), isinstance(step.model, nn.Module), callable(step.loss)],
            dp=[step.mesh["dp"].size(), step.parallelism.dp],
        )
        return step_by_hand(step)

    agrees(checked("ddp", microbatches=2, train_step=step))
    seen = notes.of("step", rank=1)
    assert [line["index"] for line in seen] == [0, 1]
    for line in seen:
        assert line["microbatches"] == ["list", 2]
        assert line["norm"] is None
        assert line["types"] == [True, True, True]
        assert line["dp"] == [2, 2]


def test_a_step_that_forgets_zero_grad_is_found_in_the_second_step() -> None:
    """What `train_step` owns: `zero_grad`."""

    def step(step: sp.Step) -> float:
        loss = step.loss(step.model, step.microbatches[0])
        loss.backward()
        step.optimizer.step()
        return loss.item()

    report = checked("ddp", train_step=step, parallelize=by_hand)
    assert report.first is not None
    assert (report.first.stage, report.first.step) == ("gradient", 1)


# LossSum.

LENGTHS = (torch.arange(48) * 7) % 5 + 1


class Ragged:
    """Samples of one to five positions that count, out of five."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": drawn(5, WIDTH, seed=index), "y": torch.arange(5) % 3, "mask": torch.arange(5) < LENGTHS[index]}


def ragged_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="none")
    return (losses * batch["mask"].flatten()).sum(), batch["mask"].sum()


def ragged_sum(model: nn.Module, batch: dict[str, Tensor]) -> sp.LossSum:
    return sp.LossSum(*ragged_losses(model, batch))


def ragged_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    total, count = ragged_losses(model, batch)
    return total / count


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_loss_sum_is_exact_where_counts_are_ragged(microbatches: int) -> None:
    """`LossSum`: gradients are divided by the global count after the last backward."""
    report = checked(
        "ddp", "fsdp", "tp_fsdp", ranks=4, microbatches=microbatches, data=Ragged(), loss=ragged_sum, max_grad_norm=0.01
    )
    agrees(report)


def test_the_mean_of_ragged_means_is_a_finding() -> None:
    """`LossSum`: what it is for."""
    report = checked("ddp", data=Ragged(), loss=ragged_mean)
    assert report.first is not None


def test_a_count_may_be_a_number_and_may_be_zero_on_one_rank() -> None:
    """`LossSum`: the count is a number or a tensor, and only the global one must be above 0."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> sp.LossSum:
        # Only the samples of the first four have label 0 here.
        chosen = batch[1] == 0
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return sp.LossSum((losses * chosen).sum(), int(chosen.sum()))

    data = TensorDataset(DATA.tensors[0][:16], torch.tensor([0, 0, 0, 1, 1, 2, 1, 2] * 2))
    agrees(checked("ddp", "fsdp", data=data, loss=loss))


def test_a_loss_sum_costs_no_extra_forward(notes: Notes) -> None:
    """`LossSum`: no extra forward."""

    class Counted(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            notes.add("forward")
            return super().forward(x)

    agrees(checked("ddp", microbatches=2, data=Ragged(), loss=ragged_sum, model=Counted))
    assert len(notes.of("forward", world=2)) == 2 * 2 * BASE.steps  # ranks * micro-batches * steps


# Activation gradients.


def test_one_factor_on_a_whole_backward_pass_is_no_finding() -> None:
    """Activation gradients: a user may call backward on the sum and divide the gradients later."""

    def step(step: sp.Step) -> float:
        step.optimizer.zero_grad()
        parameters, total = list(step.model.parameters()), 0.0
        for m, batch in enumerate(step.microbatches):
            before = [0.0 if p.grad is None else p.grad.clone() for p in parameters]
            factor = 10.0 + m
            loss = step.loss(step.model, batch)
            (loss * factor).backward()
            for p, kept in zip(parameters, before, strict=True):
                p.grad = kept + (p.grad - kept) / factor
            total += loss.item()
        for p in parameters:
            p.grad /= len(step.microbatches) * step.parallelism.dp
            dist.all_reduce(p.grad)
        step.optimizer.step()
        return total / len(step.microbatches)

    report = agrees(checked("ddp", microbatches=2, parallelize=bare, train_step=step))
    backward = comparisons(report, "backward")
    assert backward
    assert {str(c.verdict) for c in backward} <= {"equal", "rounding"}


# Clipping.

SMALL = 1e-3
"""A norm that every gradient here exceeds."""


def test_our_clipping_shows_gradients_before_and_after() -> None:
    """Clipping: both are compared, and the norm as well."""
    report = agrees(checked("ddp", "fsdp", "tp_fsdp", ranks=4, max_grad_norm=SMALL))
    for run in range(3):
        assert {c.part for c in comparisons(report, "grad-norm", run)} == {"norm", "clipped"}
        assert {str(c.verdict) for c in comparisons(report, "gradient", run)} <= {"equal", "rounding"}
        assert {str(c.verdict) for c in comparisons(report, "grad-norm", run)} <= {"equal", "rounding"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_right_clipping_in_a_users_step_is_no_finding_and_is_looked_behind(notes: Notes, strategy: str) -> None:
    """Clipping: run again with `Step.max_grad_norm` at 1e30 to see the gradients before."""

    def step(step: sp.Step) -> float:
        notes.add("norm", norm=step.max_grad_norm, index=step.index)
        return step_by_hand(step)

    report = agrees(checked(strategy, max_grad_norm=SMALL, train_step=step, parallelize=by_hand))
    assert {line["norm"] for line in notes.of("norm", index=0)} == {SMALL, 1e30}
    before = [c for c in comparisons(report, "gradient") if c.step == 0]
    after = [c for c in comparisons(report, "grad-norm") if c.part == "clipped"]
    assert {str(c.verdict) for c in before} <= {"equal", "rounding"}
    assert {str(c.verdict) for c in after} <= {"equal", "rounding"}


def test_clipping_by_the_norm_of_a_rank_is_told_apart_from_a_wrong_gradient() -> None:
    """Clipping: gradients before are right, so that the finding is `grad-norm`."""

    def step(step: sp.Step) -> float:
        # Each rank takes the norm of its own shards.
        step.optimizer.zero_grad()
        loss = step.loss(step.model, step.microbatches[0])
        loss.backward()
        local = [p.grad.to_local() for p in step.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_([_with_grad(g) for g in local], step.max_grad_norm)
        step.optimizer.step()
        return loss.item()

    report = checked("fsdp", max_grad_norm=SMALL, train_step=step)
    assert report.first is not None
    assert (report.first.cause, report.first.stage, report.first.step) == ("grad-norm", "grad-norm", 0)
    assert {str(c.verdict) for c in comparisons(report, "gradient") if c.step == 0} <= {"equal", "rounding"}


def _with_grad(grad: Tensor) -> Tensor:
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


# Applied or not.


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_bare_model_reduced_by_hand_is_a_right_ddp(microbatches: int) -> None:
    """Applied or not: judged by what happened, never by wrapper types."""
    agrees(checked("ddp", microbatches=microbatches, parallelize=bare, train_step=reduced_by_hand))


def test_a_strategy_that_was_declared_but_not_applied_is_a_finding() -> None:
    """Applied or not: fsdp that is plain data parallelism, and tp that splits nothing."""

    def ddp(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return DistributedDataParallel(model)

    report = checked("fsdp", parallelize=ddp)
    assert report.first is not None
    assert (report.first.cause, report.first.axis) == ("strategy-not-applied", "dp_shard")
    report = checked("tp", parallelize=bare)
    assert report.first is not None
    assert (report.first.cause, report.first.axis) == ("strategy-not-applied", "tp")


# Randomness.


class Dropping(Mlp):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)


def test_tp_peers_draw_alike_so_that_dropout_under_tp_is_compared() -> None:
    """Randomness: TP peers draw alike, and one data rank draws like the reference."""
    report = agrees(checked("tp", model=Dropping))
    dropped = [c for c in report.runs[0].comparisons if c.name in ("drop", "fc2.weight")]
    assert dropped
    assert {str(c.verdict) for c in dropped} <= {"equal", "rounding"}
    assert not any("random" in reason for reason in report.runs[0].not_checked)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dropout_with_data_ranks_is_not_checked_with_that_reason(strategy: str) -> None:
    """Randomness: with dropout on and dp > 1, values that depend on it are `not-checked`."""
    report = checked(strategy, model=Dropping)
    assert report.first is None
    before = [c for c in comparisons(report, "forward") if c.step == 0 and c.name in ("fc1", "fc2")]
    assert {str(c.verdict) for c in before} <= {"equal", "rounding"}
    assert len(before) == 2
    after = [c for c in report.runs[0].comparisons if c.name == "drop" or c.stage in ("gradient", "update", "loss")]
    assert after
    for comparison in after:
        assert comparison.verdict == "not-checked"
        assert "random" in comparison.reason
    assert any("random" in reason for reason in report.runs[0].not_checked)


def test_every_generator_is_seeded_before_each_step(notes: Notes) -> None:
    """Randomness: seeded from (seed, step, data coordinate), in torch, NumPy and Python."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        notes.add("drawn", torch=torch.rand(1).item(), numpy=float(numpy.random.random()), python=random.random())
        return mean_loss(model, batch)

    checked("tp_fsdp", ranks=4, loss=loss)
    per_rank = {rank: [_numbers(line) for line in notes.of("drawn", world=4, rank=rank)] for rank in range(4)}
    assert per_rank[0] == per_rank[1] != per_rank[2] == per_rank[3]
    assert len({numbers for steps in per_rank.values() for step in steps for numbers in step}) == 2 * 2 * 3
    alone = {_numbers(line) for line in notes.of("drawn", world=1)}
    assert alone == set(per_rank[0])


def _numbers(line: dict[str, Any]) -> tuple[float, ...]:
    return line["torch"], line["numpy"], line["python"]


# dtype.


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_model_and_floating_data_are_cast_and_the_default_is_set(notes: Notes, dtype: str) -> None:
    """dtype: model, floating data and torch's default; whole numbers stay as they are."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        # A tensor of one's own is made in the default dtype.
        seen = [next(model.parameters()).dtype, batch[0].dtype, batch[1].dtype, torch.zeros(1).dtype]
        notes.add("dtypes", seen=[str(each).removeprefix("torch.") for each in seen])
        return mean_loss(model, batch)

    report = agrees(sp.check(replace(BASE, loss=loss), ("ddp", "tp"), 2, dtype=dtype))
    assert report.dtype == dtype
    assert {tuple(line["seen"]) for line in notes.of("dtypes", world=2)} == {(dtype, dtype, "int64", dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_is_found_in_low_precision_too(dtype: str) -> None:
    """dtype: rounding passes, a doubled gradient does not."""

    def step(step: sp.Step) -> float:
        step.optimizer.zero_grad()
        loss = step.loss(step.model, step.microbatches[0])
        (2 * loss).backward()
        step.optimizer.step()
        return loss.item()

    report = sp.check(replace(BASE, train_step=step), ("ddp",), 2, dtype=dtype)
    assert report.first is not None
    assert (report.first.stage, report.first.step) == ("gradient", 0)


# Extra work.


class Singular(Mlp):
    """Cannot be copied, holds a process group and runs a collective in a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.group = dist.group.WORLD
        self.register_forward_hook(self._talk)

    def _talk(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        total = output.detach().sum()
        dist.all_reduce(total, group=self.group)

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("a process group cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> None:
        raise TypeError("a process group cannot be pickled")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_models_that_cannot_be_copied_and_that_talk_in_hooks_work(strategy: str) -> None:
    """Extra work: on the one-device copy only; user models may hold groups and run collectives in hooks."""
    agrees(checked(strategy, model=Singular))


def test_our_own_hooks_call_no_collective() -> None:
    """Extra work: a bare model under `tp` of nothing but local work runs no collective at all."""
    report = checked("ddp", parallelize=bare)
    assert report.runs[0].collectives == {}


# Plain local tensors.


def megatron(slices: Callable[[int], list[int]]) -> Callable[..., nn.Module]:
    """Plain tensors only: rank r holds the hidden units `slices(r)`."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        group, chosen = mesh["tp"].get_group(), torch.tensor(slices(mesh["tp"].get_local_rank()))
        column, row = Column(model.fc1, group), Row(model.fc2, group)
        column.weight = nn.Parameter(model.fc1.weight.detach()[chosen].clone())
        column.bias = nn.Parameter(model.fc1.bias.detach()[chosen].clone())
        row.weight = nn.Parameter(model.fc2.weight.detach()[:, chosen].clone())
        model.fc1, model.fc2 = column, row
        return model

    return parallelize


RIGHT_SLICES = {
    "in order": lambda rank: list(range(rank * 3, rank * 3 + 3)),
    "uneven": lambda rank: [[0, 1, 2, 3], [4, 5]][rank],
    "interleaved": lambda rank: list(range(rank, 6, 2)),
    "swapped": lambda rank: list(range(3 - rank * 3, 6 - rank * 3)),
}


@pytest.mark.parametrize("name", RIGHT_SLICES)
def test_the_layout_of_hand_written_tensor_parallelism_is_inferred(name: str) -> None:
    """Plain local tensors: layouts are inferred from values; any slices that tile the whole are right."""
    report = agrees(checked("tp", parallelize=megatron(RIGHT_SLICES[name]), optimizer=adamw, max_grad_norm=0.1))
    layouts = {c.name: c.layout for c in comparisons(report, "initial-state")}
    how = {"interleaved": "interleaved: every 2nd", "swapped": "rearranged slices"}.get(name, "slices")
    assert layouts["fc1.weight"] == f"tp: {how} of dim 0"
    assert layouts["fc2.weight"] == f"tp: {how} of dim 1"
    assert layouts["fc2.bias"] == "replicated"


def test_two_ranks_with_the_same_good_slice_are_a_finding() -> None:
    """Plain local tensors: the pieces must tile the whole."""
    report = checked("tp", parallelize=megatron(lambda rank: [0, 1, 2]))
    assert report.first is not None
    assert (report.first.stage, report.first.step, report.first.ranks) == ("initial-state", -1, (1,))
    assert report.first.where.startswith("fc1.")


class Constant(Mlp):
    """Weights that all look alike, so that values cannot tell which slice is which."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.25)


DECLARED = {
    "fc1.weight": {"tp": 0},
    "fc1.bias": {"tp": 0},
    "fc2.weight": {"tp": 1},
}


@pytest.mark.parametrize("placements", [None, DECLARED, {"fc1.*": {"tp": 0}}], ids=["none", "name", "pattern"])
def test_placements_declare_where_constants_lie(placements: Any) -> None:
    """Plain local tensors: `Experiment(placements=...)` declares the layout by name or pattern."""
    parallelize = megatron(RIGHT_SLICES["in order"])
    agrees(checked("tp", parallelize=parallelize, model=Constant, placements=placements))


@pytest.mark.parametrize("placements", [DECLARED, {"fc1.*": {"tp": 0}}], ids=["name", "pattern"])
def test_a_declared_layout_is_held_to(placements: Any) -> None:
    """Plain local tensors: where slices are declared to lie in order, swapped ones are wrong."""
    report = checked("tp", parallelize=megatron(RIGHT_SLICES["swapped"]), placements=placements)
    assert report.first is not None
    assert report.first.stage == "initial-state"


# Names.


class Owner(nn.Module):
    """Owns an attribute called `module`, and one called `_orig_mod`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh())
        self._orig_mod = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(self.module(x))


OWN_NAMES = {"module.0.weight", "module.0.bias", "_orig_mod.weight", "_orig_mod.bias"}


def named(report: sp.Report, run: int = 0) -> set[str]:
    return {c.name for c in comparisons(report, "gradient", run)}


def test_a_model_that_owns_an_attribute_called_module_keeps_its_names() -> None:
    """Names: canonical by wrapper type, not by cutting text."""
    report = agrees(checked("ddp", "fsdp", "fsdp1", model=Owner, fsdp_units=("module",), tp_plan={}))
    assert [named(report, run) for run in range(3)] == [OWN_NAMES] * 3
    modules = {"module.0", "module.1", "module", "_orig_mod", "(root)"}
    assert {c.name for c in comparisons(report, "forward", 2)} == modules


def compiled(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    model.module = torch.compile(model.module, backend="eager")
    return torch.compile(by_hand(model, mesh, parallelism), backend="eager")


# torch 2.13's dynamo looks at the gradients of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torch_compile_keeps_the_names_of_what_it_wraps(strategy: str) -> None:
    """Names: torch.compile's `_orig_mod` is taken off, the model's own is not."""
    report = agrees(checked(strategy, model=Owner, parallelize=compiled, fsdp_units=(), tp_plan={}))
    assert named(report) == OWN_NAMES


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters_are_taken_apart_also_in_the_optimizers_state(use_orig_params: bool) -> None:
    """Names: FSDP1's flat parameters are unflattened, in the optimizer's state too."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return FullyShardedDataParallel(
            model, device_mesh=mesh["dp_shard"], use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    report = agrees(checked("fsdp1", "fsdp", parallelize=parallelize, optimizer=adamw, ranks=3, batch_size=12))
    for run in range(2):
        states = {(c.name, c.part) for c in comparisons(report, "optimizer-state", run)}
        names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
        assert {name for name, part in states if part == "exp_avg"} == names
        assert {str(c.verdict) for c in comparisons(report, "optimizer-state", run)} <= {"equal", "rounding"}
        assert {c.shape for c in comparisons(report, "gradient", run) if c.name == "fc1.weight"} == {(HIDDEN, WIDTH)}


def test_a_wrapper_of_the_users_own_is_looked_through() -> None:
    """Names: a module that the user puts around the model does not change the names."""
    report = agrees(checked("ddp", parallelize=lambda model, mesh, p: Reducing(model, mesh["dp"].get_group())))
    assert named(report) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


# Ties.


class TiedModel(nn.Module):
    """Embedding and head are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, WIDTH)
        self.head = nn.Linear(WIDTH, 8, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.emb(tokens).tanh())


TIED = replace(
    BASE,
    model=TiedModel,
    data=TensorDataset(torch.arange(48) % 8, torch.arange(48) * 5 % 8),
    tp_plan={"emb": "rowwise", "head": "colwise_gather"},
    fsdp_units=(),
)


def test_ties_survive_every_layout() -> None:
    """Words: the initial state includes storage identity."""
    agrees(sp.check(TIED, ("ddp", "fsdp", "tp", "tp_fsdp", "fsdp1", "tp_fsdp1"), 4))


def test_a_layout_that_cuts_a_tie_is_a_finding() -> None:
    """Words: the initial state includes storage identity."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model.head.weight = nn.Parameter(model.emb.weight.detach().clone())
        return DistributedDataParallel(model)

    report = sp.check(replace(TIED, parallelize=parallelize), ("ddp",), 2)
    assert report.first is not None
    assert (report.first.cause, report.first.stage, report.first.step) == ("tied-weights-split", "initial-state", -1)


# Sequence parallelism and partial gradients.


class Normed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, CLASSES)
        return self.fc2(self.norm(self.up(x)).tanh())


def test_partial_gradients_of_a_sequence_parallel_norm_are_summed_before_they_are_clipped() -> None:
    """Clipping and placements: a right plan on mixed meshes, TP over some parameters only, passes."""
    plan: dict[str, str | ParallelStyle] = {
        "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "fc2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    data = TensorDataset(drawn(48, 6, WIDTH), torch.arange(48 * 6).reshape(48, 6) % CLASSES)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    experiment = replace(
        BASE, model=Normed, data=data, loss=loss, tp_plan=plan, fsdp_units=(), max_grad_norm=0.01, optimizer=adamw
    )
    agrees(sp.check(experiment, ("tp=2", "tp=2,dp_shard=2", "tp=3")))


# Findings and reports.


def doubled(step: sp.Step) -> float:
    step.optimizer.zero_grad()
    loss = step.loss(step.model, step.microbatches[0])
    (2 * loss).backward()
    step.optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def diverging() -> sp.Report:
    """Gradients twice too large, where dp and tp are both 2, beside a run that agrees."""
    return sp.check(replace(BASE, train_step=doubled), ("tp_fsdp", "ddp"), 4)


def test_a_finding_has_the_types_of_the_contract(diverging: sp.Report) -> None:
    """Types of a finding."""
    first = diverging.first
    assert first is not None
    assert isinstance(first.where, str)
    assert first.where in {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert isinstance(first.factor, float)
    assert first.factor == pytest.approx(2.0)
    assert isinstance(first.ranks, tuple)
    assert first.ranks == (0, 1, 2, 3)
    assert all(isinstance(rank, int) for rank in first.ranks)
    assert (first.step, first.stage, first.cause) == (0, "gradient", "grad-scale")
    assert isinstance(first.evidence, str)
    assert isinstance(first.fix, str)
    assert "2" in first.evidence
    assert first.fix


def test_sizes_that_make_an_axis_ambiguous_are_both_named(diverging: sp.Report) -> None:
    """Types of a finding: dp 2 and tp 2, the finding says both."""
    assert diverging.runs[0].findings[0].axis == "dp_shard or tp"
    assert diverging.runs[1].findings[0].axis is None  # twice, where dp is 4


def test_a_factor_says_observed_over_reference_and_an_axis_that_has_that_size() -> None:
    """Types of a finding: 1/3 under dp 3 is the axis dp_replicate."""

    def step(step: sp.Step) -> float:
        step.optimizer.zero_grad()
        loss = step.loss(step.model, step.microbatches[0])
        (loss / step.parallelism.dp).backward()
        step.optimizer.step()
        return loss.item()

    first = checked("ddp", ranks=3, batch_size=12, train_step=step).first
    assert first is not None
    assert (first.factor, first.axis) == (pytest.approx(1 / 3), "dp_replicate")


def test_the_report_has_the_names_of_the_contract(diverging: sp.Report) -> None:
    """Public names: ok, runs (strategy, ok, verdicts, findings), first; the report as text."""
    assert diverging.ok is False
    run = diverging.runs[0]
    assert (run.strategy, run.ok) == ("tp_fsdp", False)
    assert set(run.verdicts) == {"equal", "rounding", "different", "not-checked"}
    assert all(isinstance(count, int) for count in run.verdicts.values())
    assert sum(run.verdicts.values()) == len(run.comparisons)
    assert run.findings[0] is diverging.first
    assert "DIVERGES" in str(diverging)
    assert "gradient" in str(diverging)


def test_the_json_report_has_the_same_names(diverging: sp.Report, tmp_path: Path) -> None:
    """`report.to_json` writes these names and `schema_version`."""
    diverging.to_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert isinstance(found["schema_version"], int)
    assert found["ok"] is False
    assert [run["strategy"] for run in found["runs"]] == ["tp_fsdp", "ddp"]
    assert found["runs"][0]["ok"] is False
    assert found["runs"][0]["verdicts"] == diverging.runs[0].verdicts
    first = diverging.first
    assert first is not None
    for finding in (found["first"], found["runs"][0]["findings"][0]):
        for name in ("cause", "stage", "where", "axis", "factor", "step", "evidence", "fix"):
            assert finding[name] == getattr(first, name)
        assert finding["ranks"] == list(first.ranks)


def test_the_html_report_is_written(diverging: sp.Report, tmp_path: Path) -> None:
    """Public names: `report.to_html`."""
    diverging.to_html(tmp_path / "report.html")
    assert "grad-scale" in (tmp_path / "report.html").read_text()


def test_assert_parity_raises_an_assertion_error_whose_text_is_the_report() -> None:
    """Public names: `assert_parity`."""
    sp.assert_parity(BASE, strategies=("ddp",), ranks=2)
    with pytest.raises(sp.ParityError) as caught:
        sp.assert_parity(replace(BASE, train_step=doubled), strategies=("ddp",), ranks=2)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value).strip() == str(caught.value.report).strip()


# Experiment files and the command line.

FILE = """\
import torch
from torch import nn

import shardproof as sp
from beside import width


def make(scale):
    hidden = width()
    return sp.Experiment(
        model=lambda: nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)),
        data=lambda: [(torch.full((4,), i / 16), torch.tensor(i % 3)) for i in range(16)],
        loss=lambda model, batch: scale * nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=8,
        steps=2,
        train_step=twice if scale == 2 else None,
    )


def twice(step):
    step.optimizer.zero_grad()
    loss = step.loss(step.model, step.microbatches[0])
    (3 * loss).backward()
    step.optimizer.step()
    return loss


experiment = make(1)
wrong = make(2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "mine.py").write_text(FILE)
    (folder / "beside.py").write_text("def width():\n    return 6\n")
    return folder


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "code", "word"),
    [
        ("{folder}/mine.py", 0, "parity"),
        ("{folder}/mine.py:wrong", 1, "DIVERGES"),
        ("{folder}/mine.py:absent", 2, "absent"),
        ("mine:experiment", 0, "parity"),
    ],
)
def test_exit_codes_and_ways_to_name_an_experiment(
    folder: Path, tmp_path: Path, target: str, code: int, word: str
) -> None:
    """Exit codes 0, 1, 2 (3 in test_bad_input); the file's folder is importable; lambdas and closures work."""
    cwd = folder if target.startswith("mine") else tmp_path
    target = target.format(folder=folder)
    done = python("-m", "shardproof", "check", target, "--strategies", "ddp", "--ranks", "2", cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert word in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import shardproof",
        "import shardproof; shardproof.Experiment, shardproof.LossSum, shardproof.load, shardproof.UsageError",
        "import shardproof.cli",
        "import runpy; sys.argv = ['', '--help']; runpy.run_module('shardproof', run_name='__main__')",
        "import runpy; sys.argv = ['', 'check', '--help']; runpy.run_module('shardproof', run_name='__main__')",
    ],
)
def test_what_needs_no_tensors_loads_no_torch(statement: str, tmp_path: Path) -> None:
    """`import shardproof` and `--help` load no torch."""
    program = f"import sys\ntry:\n    {statement}\nexcept SystemExit as end:\n    assert not end.code\n"
    done = python("-c", f"{program}assert 'torch' not in sys.modules, 'torch was loaded'", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_looked_up() -> None:
    """Public names: what `__all__` lists is there, and nothing else is made up."""
    assert [name for name in sp.__all__ if not hasattr(sp, name)] == []

    with pytest.raises(AttributeError, match="chekc"):
        _ = sp.chekc


@pytest.mark.parametrize("room", ["record.watch", "diff"])
def test_a_public_name_is_no_module_whatever_was_imported(room: str) -> None:
    name = room.partition(".")[0]
    code = f"import shardproof.{room}, shardproof as sp; assert callable(sp.{name}), sp.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_parameter_may_be_a_dtensor_or_not_as_the_user_likes() -> None:
    """Applied or not: TP over DTensors that stay whole for one module only."""

    def parallelize(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(output_layouts=Replicate())})
        if not isinstance(model.fc1.weight, DTensor):
            raise TypeError("fc1 was not split")
        return model

    agrees(checked("tp", parallelize=parallelize))
