"""What an experiment hides is said where the check is blind, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import shardproof as sp

SAMPLES, WIDTH = 48, 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def summed_loss(model: nn.Module, batch: Any) -> sp.LossSum:
    inputs, counts = batch
    return sp.LossSum(total=(model(inputs).square().sum(-1) * counts).sum(), count=counts.sum())


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def own_step(step: sp.Step) -> Tensor:
    """Right; its only fault would be one that these experiments do not show."""
    step.optimizer.zero_grad()
    loss = step.loss(step.model, step.microbatches[0])
    loss.backward()
    if step.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm)
    step.optimizer.step()
    return loss.detach()


def summing_step(step: sp.Step) -> Tensor:
    """Divides by what its own part counts, and lets DDP average: a mean of means."""
    step.optimizer.zero_grad()
    loss = step.loss(step.model, step.microbatches[0])
    mean = loss.total / loss.count
    mean.backward()
    step.optimizer.step()
    return mean.detach()


def replicated(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh["dp"].get_group())


BASE = sp.Experiment(
    model=model,
    data=TensorDataset(drawn(SAMPLES, WIDTH), torch.arange(SAMPLES)),
    loss=mean_loss,
    optimizer=sgd,
    batch_size=8,
    steps=3,
    tp_plan={"0": "colwise", "2": "rowwise"},
)


def warned(experiment: sp.Experiment, *strategies: str, ok: bool = True, **options: Any) -> tuple[str, ...]:
    report = sp.check(experiment, strategies or ("ddp",), 2, **options)
    assert report.ok is ok, str(report)
    return report.warnings


def test_an_experiment_that_shows_all_is_not_warned_of() -> None:
    assert warned(BASE, "ddp", "fsdp", "tp") == ()
    assert warned(replace(BASE, max_grad_norm=1e-3, train_step=own_step), "ddp") == ()


def zeroed(module: nn.Module) -> nn.Module:
    nn.init.zeros_(module[0].bias)
    nn.init.zeros_(module[2].bias)
    return module


def test_zero_biases_are_said_by_name_where_only_one_step_is_looked_at() -> None:
    zero, one = warned(replace(BASE, model=lambda: zeroed(model())), steps=1)
    assert "2 parameters are all zero in every forward pass (0.bias, 2.bias)" in zero
    assert "one step was checked" in one


def test_zero_biases_that_move_in_the_first_step_hide_nothing_in_float64() -> None:
    assert warned(replace(BASE, model=lambda: zeroed(model()))) == ()


def test_zero_biases_that_bfloat16_cannot_tell_from_their_double_are_said() -> None:
    [zero] = warned(replace(BASE, model=lambda: zeroed(model())), dtype="bfloat16")
    assert "(0.bias, 2.bias)" in zero


def frozen() -> nn.Module:
    module = zeroed(model())
    module[0].bias.requires_grad_(False)
    return module


def test_a_frozen_parameter_of_zeros_hides_what_is_done_with_it_in_every_step() -> None:
    [zero] = warned(replace(BASE, model=frozen))
    assert "a parameter is all zero in every forward pass (0.bias)" in zero


@pytest.mark.parametrize("strategy", ["ddp", "dp_replicate=3"])
def test_the_same_sample_everywhere_hides_a_missing_reduction(strategy: str) -> None:
    data = TensorDataset(drawn(1, WIDTH).expand(SAMPLES, WIDTH), torch.zeros(SAMPLES))
    [same] = warned(replace(BASE, data=data, batch_size=12), strategy)
    assert "hold the very same samples" in same
    # What it hides: nobody reduces, and the check cannot see it.
    blind = warned(replace(BASE, data=data, batch_size=12, parallelize=lambda model, *_: model), strategy)
    assert any("hold the very same samples" in warning for warning in blind)


def test_a_learning_rate_of_zero_shows_nothing_of_the_optimizer() -> None:
    [still] = warned(replace(BASE, optimizer=lambda model: sgd(model, lr=0.0)))
    assert still.startswith("no weight changed in 3 steps")


COUNTED = replace(BASE, loss=summed_loss, parallelize=replicated, steps=2)
EQUAL = TensorDataset(drawn(SAMPLES, WIDTH), torch.full((SAMPLES,), 3.0))
RAGGED = TensorDataset(drawn(SAMPLES, WIDTH), 1.0 + torch.arange(SAMPLES) % 5)


def test_equal_counts_hide_a_mean_of_means_in_a_step_of_ones_own() -> None:
    [equal] = warned(replace(COUNTED, data=EQUAL, train_step=summing_step))
    assert "counts the same (12) in LossSum" in equal
    assert warned(replace(COUNTED, data=RAGGED, train_step=summing_step), ok=False) == ()


def test_equal_counts_hide_nothing_of_shardproofs_own_step() -> None:
    assert warned(replace(COUNTED, data=EQUAL)) == ()


def test_a_limit_that_no_norm_reaches_leaves_a_users_clipping_unseen() -> None:
    [unclipped] = warned(replace(BASE, max_grad_norm=1000.0, train_step=own_step))
    assert unclipped.startswith("max_grad_norm 1000 is never reached (the largest norm is")
    assert warned(replace(BASE, max_grad_norm=1000.0)) == ()


@pytest.mark.parametrize(
    ("strategies", "said"), [(["tp=2,dp_shard=2"], True), (["tp=2,dp_shard=2", "dp_shard=2"], False)]
)
def test_equal_sizes_are_said_unless_another_layout_tells_them_apart(strategies: list[str], said: bool) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def laid_out(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        if parallelism.tp > 1:
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["dp_shard"])

    found = warned(replace(BASE, parallelize=laid_out), *strategies)
    assert any("data ranks and tp are equally many (2)" in warning for warning in found) is said
    assert len(found) == said


@pytest.mark.parametrize("strategies", [("tp=2,dp_shard=2",), ("hsdp",)])
def test_equal_sizes_hide_nothing_of_shardproofs_own_layouts(strategies: tuple[str, ...]) -> None:
    report = sp.check(BASE, strategies, 4)
    assert report.ok
    assert report.warnings == ()


def test_beside_a_divergence_blind_spots_are_left_out() -> None:
    report = sp.check(replace(COUNTED, data=RAGGED, train_step=summing_step), ("ddp",), 2, steps=1)
    assert not report.ok
    assert report.warnings == ()
