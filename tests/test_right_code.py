"""Right code that is easily taken for wrong, and wrong code that is easily taken for right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import shardproof as sp
from shardproof.zoo.fixtures.megatron import copy, reduce

WIDTH, HIDDEN, CLASSES = 4, 8, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


DATA = TensorDataset(drawn(48, WIDTH), torch.arange(48) % CLASSES)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.fc2(self.fc1(x).tanh())


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


BASE = sp.Experiment(model=Mlp, data=DATA, loss=mean_loss, optimizer=sgd, batch_size=8, steps=2)


def split_by_hand(model: Any, mesh: Any) -> None:
    group, rank, size = mesh["tp"].get_group(), mesh["tp"].get_local_rank(), mesh["tp"].size()
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().chunk(size, 0)[rank].clone())
    model.fc1.bias = nn.Parameter(model.fc1.bias.detach().chunk(size, 0)[rank].clone())
    model.fc2.weight = nn.Parameter(model.fc2.weight.detach().chunk(size, 1)[rank].clone())
    model.fc1.register_forward_pre_hook(lambda _m, args: (copy(args[0], group),))
    model.fc2.register_forward_hook(lambda _m, _a, out: reduce(out, group))


def by_hand_under_fsdp(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    split_by_hand(model, mesh)
    fully_shard(model, mesh=mesh["dp_shard"])
    return model


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_hand_written_tp_below_fsdp_is_read_by_its_values(max_grad_norm: float | None) -> None:
    experiment = replace(BASE, parallelize=by_hand_under_fsdp, max_grad_norm=max_grad_norm, batch_size=12)
    report = sp.check(experiment, ("tp=2,dp_shard=2", "tp=2,dp_shard=3"))
    assert report.proven, str(report)
    layouts = {c.layout for c in report.runs[0].comparisons if (c.stage, c.name) == ("update", "fc2.weight")}
    assert layouts == {"tp: slices of dim 1, sharded again over dp_shard"}


def test_hand_written_tp_below_fsdp_with_a_wrong_shard_is_found() -> None:
    def swapped(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        split_by_hand(model, mesh)
        if mesh["tp"].get_local_rank() == 1:
            model.fc1.weight.data.mul_(1.01)
        fully_shard(model, mesh=mesh["dp_shard"])
        return model

    report = sp.check(replace(BASE, parallelize=swapped), ("tp_fsdp",), 4)
    assert report.first is not None
    assert (report.first.stage, report.first.where, report.first.step) == ("initial-state", "fc1.weight", -1)


# Batches.


def padded(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[tuple[Tensor, Tensor]]:
    """Each micro-batch padded to the longest of its own samples; 0 is padding."""
    rank, per_rank = mesh["dp"].get_local_rank(), 8 // parallelism.dp
    for start in range(0, len(data), 8):
        own = [data[i] for i in range(start + rank * per_rank, start + (rank + 1) * per_rank)]
        longest = max(int((tokens > 0).sum()) for tokens, _ in own)
        yield torch.stack([tokens[:longest] for tokens, _ in own]), torch.stack([label for _, label in own])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, 11)
        return self.head(self.emb(tokens).tanh())


def token_sum(model: nn.Module, batch: Any) -> sp.LossSum:
    tokens = batch[0]
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="none")
    kept = tokens.flatten() > 0
    return sp.LossSum((loss * kept).sum(), kept.sum())


def ragged_tokens() -> TensorDataset:
    tokens = torch.arange(48 * 9).reshape(48, 9) % 10 + 1
    for row in range(48):
        tokens[row, 2 + row % 7 :] = 0
    return TensorDataset(tokens, torch.arange(48))


@pytest.mark.parametrize("strategies", [("ddp", "fsdp")])
def test_micro_batches_padded_to_lengths_of_their_own_are_compared(strategies: tuple[str, ...]) -> None:
    experiment = replace(BASE, model=Bag, data=ragged_tokens(), loss=token_sum, batches=padded)
    report = sp.check(experiment, strategies, 4)
    assert report.proven, str(report)
    assert report.runs[0].verdicts["not-checked"] == 0
    assert "not found in Experiment.data" in report.runs[0].notes[0]


def test_a_token_mean_over_padded_micro_batches_is_still_found() -> None:
    def token_mean(model: nn.Module, batch: Any) -> Tensor:
        found = token_sum(model, batch)
        return found.total / found.count

    experiment = replace(BASE, model=Bag, data=ragged_tokens(), loss=token_sum, batches=padded)
    wrong = replace(experiment, train_step=lambda step: backward_of(step, token_mean))
    report = sp.check(wrong, ("ddp",), 4)
    assert report.first is not None
    # What it logs is a mean of means too, but that is no part of training.
    assert (report.first.stage, report.first.step) == ("gradient", 0)


def backward_of(step: Any, loss: Callable[[nn.Module, Any], Tensor]) -> float:
    step.optimizer.zero_grad()
    value = loss(step.model, step.microbatches[0])
    value.backward()
    step.optimizer.step()
    return value.item()


def test_a_loader_that_fills_one_buffer_again_and_again_is_right() -> None:
    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(4, WIDTH, dtype=torch.get_default_dtype()), torch.empty(4, dtype=torch.long)
        rank = mesh["dp"].get_local_rank()
        for start in range(0, len(data), 8):
            own = data[start + rank * 4 : start + rank * 4 + 4]
            x.copy_(own[0])
            y.copy_(own[1])
            yield x, y

    report = sp.check(replace(BASE, batches=batches), ("ddp",), 2)
    assert report.proven, str(report)


def test_data_ranks_that_read_the_same_transformed_samples_are_found() -> None:
    def batches(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(data), 8):
            x, y = data[start : start + 4]
            yield x * 2 + 1, y

    report = sp.check(replace(BASE, batches=batches), ("ddp",), 2)
    assert report.first is not None
    assert (report.first.cause, report.first.stage) == ("batch-repeated-across-dp", "batch")


# Steps.


def test_gradients_that_a_closure_computes_are_seen() -> None:
    def step(given: Any) -> float:
        def closure() -> Tensor:
            given.optimizer.zero_grad()
            loss = given.loss(given.model, given.microbatches[0])
            loss.backward()
            return loss

        return given.optimizer.step(closure).item()

    report = sp.check(replace(BASE, train_step=step), ("ddp",), 2)
    assert report.proven, str(report)
    compared = [c for c in report.runs[0].comparisons if c.stage == "gradient"]
    assert {str(c.verdict) for c in compared} <= {"equal", "rounding"}
    assert len(compared) == 3 * BASE.steps


def test_a_loss_sum_logged_as_the_mean_of_its_own_part_is_right() -> None:
    def step(given: Any) -> Tensor:
        given.optimizer.zero_grad()
        own = given.loss(given.model, given.microbatches[0])
        count = torch.as_tensor(own.count).clone()
        dist.all_reduce(count)
        (own.total * dist.get_world_size() / count).backward()
        given.optimizer.step()
        return own.total.detach() / own.count

    experiment = replace(BASE, model=Bag, data=ragged_tokens(), loss=token_sum, train_step=step)
    wrapped = replace(experiment, parallelize=lambda model, mesh, parallelism: DistributedDataParallel(model))
    report = sp.check(wrapped, ("ddp",), 4)
    assert report.proven, str(report)


@pytest.mark.parametrize("strategy", ["fsdp1", "tp_fsdp1"])
def test_state_of_empty_shards_need_not_count_steps(strategy: str) -> None:
    experiment = replace(
        BASE,
        optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
        tp_plan={"fc1": "colwise", "fc2": "rowwise"},
    )
    report = sp.check(experiment, (strategy,), 4)
    assert report.proven, str(report)


# Outputs.


class SortedInside(Mlp):
    """Sorts its samples by their first feature, as code that packs sequences does, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.sorted = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return super().forward(self.sorted(x[order]))[order.argsort()]


def test_outputs_in_another_order_are_not_checked_where_the_training_is_right() -> None:
    report = sp.check(replace(BASE, model=SortedInside), ("ddp",), 2)
    assert report.proven, str(report)
    verdicts = {str(c.verdict) for c in report.runs[0].comparisons if (c.stage, c.name) == ("forward", "sorted")}
    assert verdicts == {"not-checked"}


class Counted(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def test_a_counter_of_forward_passes_is_no_finding_under_micro_batches() -> None:
    assert sp.check(replace(BASE, model=Counted, microbatches=2), ("ddp",), 2).proven


def test_initial_values_owe_the_same_bits_in_bfloat16_too() -> None:
    def nudged(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        with torch.no_grad():
            model.fc1.weight.mul_(1 + 2**-7)
        return DistributedDataParallel(model)

    report = sp.check(replace(BASE, parallelize=nudged), ("ddp",), 2, dtype="bfloat16")
    assert report.first is not None
    assert (report.first.stage, report.first.where) == ("initial-state", "fc1.weight")


# What is not proven.


def test_assert_parity_warns_where_no_gradient_could_be_compared() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES))

    with pytest.warns(UserWarning, match="UNPROVEN: no gradient or updated weight of ddp could be compared"):
        sp.assert_parity(replace(BASE, model=build), ("ddp",), 2)


def test_a_strategy_whose_model_raises_something_else_is_not_left_out() -> None:
    class Grumpy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if (
                dist.get_world_size() > 1
                and self.fc1.weight.shape[0] == HIDDEN
                and hasattr(self.fc1.weight, "placements")
            ):
                raise RuntimeError("wrong dim of my cache")
            return super().forward(x)

    experiment = replace(BASE, model=Grumpy, tp_plan={"fc1": "colwise", "fc2": "rowwise"})
    with pytest.raises(sp.RankFailed, match="wrong dim of my cache"):
        sp.check(experiment, None, 2)
