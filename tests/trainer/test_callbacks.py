"""Callbacks on a stand-in for the loop, and the gradient norm on ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardproof.errors import UsageError
from shardproof.parallel import mesh as meshes
from shardproof.parallel.held import held_parameters
from shardproof.ranks import Place, start
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.training import Training
from shardproof.trainer.callbacks import memory
from shardproof.trainer.callbacks.early_stopping import EarlyStopping
from shardproof.trainer.callbacks.gradient_norm import GradientNorm
from shardproof.trainer.callbacks.learning_rate import LearningRateMonitor
from shardproof.trainer.callbacks.memory import MemoryMonitor
from shardproof.trainer.callbacks.throughput import Throughput


@dataclass
class Progress:
    step: int = 0
    epoch: int = 0
    samples: int = 0
    elapsed_s: float = 0.0


@dataclass
class StandIn:
    """As much of the loop as callbacks ask for."""

    training: Training = field(default_factory=lambda: Training(eval_data=[1]))
    progress: Progress = field(default_factory=Progress)
    parallelism: Parallelism = field(default_factory=lambda: Parallelism(dp_replicate=4))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    optimizer: Any = None
    parameters: Any = None
    mesh: Any = None
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def log(self, values: Mapping[str, float]) -> None:
        self.logged.append((self.progress.step, dict(values)))

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)


def evaluations_until_stop(callback: EarlyStopping, values: list[float]) -> int | None:
    """How many evaluations were made when it stopped."""
    loop = StandIn()
    for count, value in enumerate(values, 1):
        callback.eval_end(loop, {callback.monitor: value, "other": 0.0})
        if loop.stopped:
            return count
    return None


@pytest.mark.parametrize(
    ("settings", "values", "stops_after"),
    [
        ({}, [3, 2, 1, 1, 1, 1], 6),
        ({}, [3, 2, 2, 2, 1, 2, 2], None),
        ({"mode": "max"}, [1, 2, 3, 3, 2, 1], 6),
        ({"patience": 1}, [1, 1], 2),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.5], 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.4, 2.0, 2.0], 5),
        ({"patience": 2}, [1, math.nan, math.nan], 3),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 2}, [math.nan, 5, 4, 3], None),
        ({"patience": 1, "mode": "max"}, [math.inf], 1),
    ],
)
def test_training_stops_when_evaluations_get_no_better(
    settings: dict[str, Any], values: list[float], stops_after: int | None
):
    assert evaluations_until_stop(EarlyStopping(**settings), values) == stops_after


def test_the_reason_to_stop_names_the_metric_and_its_values():
    loop = StandIn()
    callback = EarlyStopping("accuracy", mode="max", patience=1)
    callback.eval_end(loop, {"accuracy": 0.9})
    callback.eval_end(loop, {"accuracy": 0.8})
    assert loop.stopped == ["accuracy was no better in 1 evaluations (last 0.8, best 0.9)"]


@pytest.mark.parametrize("cut", range(5))
def test_a_resumed_run_stops_where_an_uninterrupted_one_would(cut: int):
    values = [3.0, math.nan, 2.0, 2.5, 2.5]
    first = EarlyStopping(patience=2)
    assert evaluations_until_stop(first, values[:cut]) is None
    second = EarlyStopping(patience=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert evaluations_until_stop(second, values[cut:]) == len(values) - cut


def test_an_unknown_metric_is_answered_with_those_there_are():
    with pytest.raises(UsageError, match="gave no 'acuracy'; did you mean accuracy") as caught:
        EarlyStopping("acuracy").eval_end(StandIn(), {"loss": 1.0, "accuracy": 0.5})
    assert "loss, accuracy" in str(caught.value)


def test_a_metric_may_be_named_as_loggers_show_it():
    assert evaluations_until_stop(EarlyStopping("eval/loss", patience=1), [1.0, 2.0]) == 2


def test_early_stopping_without_an_evaluation_is_refused_at_the_start():
    with pytest.raises(UsageError, match="give the trainer eval_data"):
        EarlyStopping().fit_start(StandIn(training=Training()))


@pytest.mark.parametrize("settings", [{"mode": "least"}, {"patience": 0}, {"min_delta": -1}, {"min_delta": math.nan}])
def test_early_stopping_refuses_values_that_no_run_could_use(settings: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(settings))):
        EarlyStopping(**settings)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_learning_rate_logged_is_the_one_that_the_last_step_was_taken_with(as_tensor: bool):
    groups = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    rates = [torch.tensor(rate) if as_tensor else rate for rate in (1.0, 10.0)]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": lr} for p, lr in zip(groups, rates, strict=True)], capturable=False, foreach=False
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loop, monitor = StandIn(optimizer=optimizer), LearningRateMonitor()
    for _ in range(2):
        monitor.step_start(loop)
        optimizer.step()
        scheduler.step()
        loop.progress.step += 1
        monitor.losses(loop, loop.progress.step, [0.0])
    assert loop.logged == [
        (1, {"lr/group0": 1.0, "lr/group1": 10.0}),
        (2, {"lr/group0": 0.5, "lr/group1": 5.0}),
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def take(throughput: Throughput, loop: StandIn, clock: Clock, seconds: float, *, losses: bool = True) -> None:
    clock.now += seconds
    loop.progress.step += 1
    loop.progress.samples += 8
    throughput.step_end(loop)
    if losses:
        throughput.losses(loop, loop.progress.step - 1, [0.0])


def test_throughput_leaves_out_the_first_steps_and_counts_windows():
    clock, loop = Clock(), StandIn()
    throughput = Throughput(every=2, skip=3, clock=clock)
    throughput.fit_start(loop)
    for seconds in (50, 50, 50, 1, 1, 2, 2):
        take(throughput, loop, clock, seconds)
    assert loop.logged == [
        (5, {"throughput/samples_per_s": 8.0, "throughput/steps_per_s": 1.0}),
        (7, {"throughput/samples_per_s": 4.0, "throughput/steps_per_s": 0.5}),
    ]


def test_throughput_takes_all_steps_between_two_exchanges_of_losses():
    clock, loop = Clock(), StandIn()
    throughput = Throughput(every=2, skip=0, clock=clock)
    throughput.losses(loop, 0, [])
    for index in range(5):
        take(throughput, loop, clock, 1, losses=index == 4)
    assert loop.logged == [(5, {"throughput/samples_per_s": 8.0, "throughput/steps_per_s": 1.0})]


@pytest.mark.parametrize("losses_first", [False, True])
def test_evaluating_and_saving_do_not_slow_training_down(losses_first: bool, tmp_path: Any):
    clock, loop = Clock(), StandIn()
    throughput = Throughput(every=2, skip=1, clock=clock)
    take(throughput, loop, clock, 1)
    take(throughput, loop, clock, 1, losses=losses_first)
    clock.now += 100
    throughput.eval_end(loop, {"loss": 1.0})
    clock.now += 1000
    throughput.saved(loop, tmp_path)
    take(throughput, loop, clock, 1)
    assert loop.logged == [(3, {"throughput/samples_per_s": 8.0, "throughput/steps_per_s": 1.0})]


def test_model_flops_utilisation_is_what_the_model_needs_over_what_all_devices_could_do():
    clock, loop = Clock(), StandIn()
    # 8 samples/s of 1e12 FLOPs on 4 ranks: 2e12 each.
    throughput = Throughput(flops_per_sample=1e12, peak_flops=8e12, every=1, skip=0, clock=clock)
    take(throughput, loop, clock, 1)
    take(throughput, loop, clock, 1)
    ((_, values),) = loop.logged
    assert values["throughput/tflops_per_rank"] == 2.0
    assert values["throughput/mfu"] == 0.25


@pytest.mark.parametrize(
    "settings", [{"flops_per_sample": 0}, {"peak_flops": 1e12}, {"every": 0}, {"skip": -1}, {"every": 1.5}]
)
def test_throughput_refuses_values_that_no_run_could_use(settings: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(settings))):
        Throughput(**settings)


def test_memory_that_is_in_use_is_seen_and_its_peak_stays():
    loop, monitor = StandIn(), MemoryMonitor()
    held = torch.ones(2**28 // 4)  # a quarter of a GiB
    monitor.losses(loop, 0, [])
    del held
    monitor.losses(loop, 0, [])
    (_, full), (_, empty) = loop.logged
    assert full["memory/peak_resident_gib"] >= full["memory/resident_gib"]
    assert full["memory/resident_gib"] - empty["memory/resident_gib"] == pytest.approx(0.25, abs=0.05)
    assert empty["memory/peak_resident_gib"] == pytest.approx(full["memory/peak_resident_gib"], abs=0.05)


def test_memory_is_told_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    known, loop = StandIn(), StandIn()
    MemoryMonitor().losses(known, 0, [])
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    MemoryMonitor().losses(loop, 0, [])
    ((_, want),), ((_, got),) = known.logged, loop.logged
    assert got["memory/peak_resident_gib"] == pytest.approx(want["memory/peak_resident_gib"], rel=0.5)


class OnRanks:
    def norms(self, place: Place) -> list[tuple[int, dict[str, float]]]:
        """What is logged in six steps whose gradients are all step + 1, sharded over four ranks."""
        with place.world("norms", 4):
            mesh, _ = meshes.build(Parallelism(dp_shard=4), "cpu")
            model = nn.Linear(5, 3, bias=False)
            fully_shard(model, mesh=mesh["dp_shard"])
            loop = StandIn(parameters=list(held_parameters(model)), mesh=mesh)
            callback = GradientNorm(every=3)
            for step in range(6):
                model.weight.grad = torch.ones_like(model.weight) * (step + 1)
                callback.gradients(loop)
                loop.progress.step += 1
                callback.step_end(loop)
            return loop.logged

    def largest(self, place: Place) -> float:
        """Peak memory told by this rank; rank 2 has used most."""
        with place.world("largest", 4):
            used = torch.ones((place.rank == 2) * 2**28 // 4)
            loop = StandIn()
            MemoryMonitor().losses(loop, 0, [])
            ((_, values),) = loop.logged
            del used
            return values["memory/resident_gib"]


def test_ranks_tell_the_norm_of_the_whole_gradient_and_the_memory_of_the_largest():
    with start(4, OnRanks()) as ranks:
        for logged in ranks.call("norms").values():
            assert [step for step, _ in logged] == [3, 6]
            norms = [values["gradient/norm"] for _, values in logged]
            assert norms == pytest.approx([3 * math.sqrt(15), 6 * math.sqrt(15)])
        assert len(set(ranks.call("largest").values())) == 1


def test_the_gradient_norm_asks_for_gradients():
    assert GradientNorm().watches_gradients
    with pytest.raises(UsageError, match="every=0"):
        GradientNorm(every=0)
