"""Replicas against each other: right code never gets a finding, and a rank that is alone with its bits always does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import test_planted as planted
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardproof as sp
from shardproof.parallel.held import held_parameters
from shardproof.train.step import train_step

ROOT = Path(__file__).parents[1]
ON_FOUR = ("ddp", "fsdp", "hsdp", "tp", "tp_ddp", "tp_fsdp", "fsdp1", "tp_fsdp1")
EXAMPLES = ("digits.experiment", "gpt.experiment", "gpt.sequence_parallel", "gpt.ragged")

HAND, PLAIN, DDP = planted.HAND, planted.PLAIN, planted.DDP


def example(name: str) -> sp.Experiment:
    if str(ROOT / "examples") not in sys.path:
        sys.path.insert(0, str(ROOT / "examples"))
    module, _, attribute = name.partition(".")
    if module == "digits":
        pytest.importorskip("sklearn")
    return getattr(__import__(module), attribute)


def invariants(experiment: sp.Experiment, *strategies: str, ranks: int = 4, **options: Any) -> sp.Report:
    return sp.check(experiment, strategies or None, ranks, invariants=True, **options)


def consistent(experiment: sp.Experiment, *strategies: str, **options: Any) -> sp.Report:
    """No finding, nothing different, and nothing that claims more than it saw."""
    report = invariants(experiment, *strategies, **options)
    assert report.ok, str(report)
    assert report.first is None
    assert not report.proven, "replicas that agree prove nothing"
    for run in report.runs:
        assert run.verdicts["different"] == run.verdicts["rounding"] == 0
    return report


def violated(experiment: sp.Experiment, strategy: str, **options: Any) -> sp.Finding:
    report = invariants(experiment, strategy, **options)
    assert not report.ok, str(report)
    assert report.first is not None
    return report.first


def equal(run: sp.Run, stage: str) -> set[str]:
    return {c.name for c in run.comparisons if c.stage == stage and c.verdict is sp.Verdict.EQUAL}


# `check --invariants`: right code.


@cache
def of_example(name: str) -> sp.Report:
    return consistent(example(name), steps=2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_hold_their_invariants_under_every_strategy(name: str) -> None:
    report = of_example(name)
    assert [run.strategy for run in report.runs] == list(ON_FOUR)
    assert str(report).splitlines()[-1] == "consistent: the replicas of 8 strategies hold the same bits"


@pytest.mark.parametrize("strategy", ["ddp", "hsdp", "tp_ddp"])
def test_every_weight_gradient_and_moment_of_replicas_is_compared(strategy: str) -> None:
    run = next(run for run in of_example("gpt.experiment").runs if run.strategy == strategy)
    names = {name for name, _ in example("gpt.experiment").model().named_parameters()}
    for stage in ("initial-state", "gradient", "grad-norm", "optimizer-state", "update"):
        assert equal(run, stage) >= names, stage


def test_what_tp_does_not_split_is_compared_and_what_it_splits_is_not() -> None:
    run = next(run for run in of_example("gpt.experiment").runs if run.strategy == "tp")
    assert "blocks.0.mlp_norm.weight" in equal(run, "gradient")
    assert "blocks.0.mlp.fc1.weight" not in equal(run, "gradient")
    assert equal(run, "batch") == {"batch"}
    assert "blocks.0.mlp.fc1.weight" in equal(run, "optimizer-state"), "steps are counted alike everywhere"


def test_tensor_parallelism_of_eight_ranks_holds_its_invariants() -> None:
    consistent(example("digits.experiment"), "tp_hsdp", ranks=8, steps=1)


@pytest.mark.parametrize("strategy", [*planted.TENSOR_PARALLEL, "dp_replicate=3"])
def test_tensor_parallelism_written_by_hand_holds_its_invariants(strategy: str) -> None:
    run = consistent(HAND, strategy).runs[0]
    assert equal(run, "gradient") >= {"norm1.weight", "head.weight", "down.bias"}
    # Slices of two tp peers differ, and those of two data ranks are the same.
    assert ("up.weight" in equal(run, "gradient")) is ("dp_replicate" in strategy)


def hand_made_below_fsdp(model: planted.Small, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    alone = sp.Parallelism(tp=parallelism.tp)
    return fully_shard(planted.by_hand(model, mesh, alone), mesh=mesh["dp_shard"])


def test_slices_cut_by_hand_below_fsdp_hold_their_invariants() -> None:
    run = consistent(replace(PLAIN, parallelize=hand_made_below_fsdp), "tp=2,dp_shard=2").runs[0]
    assert "norm1.weight" in equal(run, "update")
    assert "up.weight" not in equal(run, "update")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_the_same_on_all_replicas(dtype: str) -> None:
    consistent(example("digits.experiment"), "hsdp", "tp_ddp", "tp_fsdp1", steps=2, dtype=dtype)


class Normed(planted.Small):
    """Running statistics in fractions, and a count of batches in whole numbers; dropout besides."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(planted.LENGTH)
        self.register_buffer("constant", torch.linspace(0, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(self.batch_norm(x), 0.2, self.training))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "fsdp1"])
def test_running_statistics_of_data_ranks_are_their_own(strategy: str) -> None:
    run = consistent(replace(PLAIN, model=Normed), strategy).runs[0]
    assert equal(run, "buffer") == {"batch_norm.num_batches_tracked", "constant"}
    assert any("statistic" in reason for reason in run.not_checked)


def test_micro_batches_and_steps_of_a_users_own_hold_their_invariants() -> None:
    consistent(replace(PLAIN, microbatches=3), "ddp", "hsdp", "fsdp1")
    for no_sync in ("never", "backward", "forward and backward"):
        consistent(replace(planted.THREE, train_step=partial(planted.hand_step, no_sync=no_sync)), "dp_replicate=2")
    bare = replace(PLAIN, parallelize=planted.bare, train_step=partial(planted.hand_step, reduce=True))
    consistent(bare, "dp_replicate=3")


def test_no_reference_is_trained_and_none_can_be_named() -> None:
    class Message(Exception):
        pass

    def only_parallel(model: nn.Module, batch: Any) -> Tensor:
        if dist.get_world_size() == 1:
            raise Message("trained on one device")
        return planted.loss(model, batch)

    consistent(replace(PLAIN, loss=only_parallel), "ddp")
    with pytest.raises(sp.UsageError, match="leave reference out"):
        invariants(PLAIN, "ddp", reference="fsdp")


# `check --invariants`: faults.


def seeded_by_rank() -> nn.Module:
    model = planted.Small()
    if dist.get_rank() == 2:
        torch.manual_seed(100)
        model.up.reset_parameters()
    return model


def test_weights_of_one_rank_that_differ_before_the_first_step_are_the_initial_state() -> None:
    step = partial(planted.hand_step, reduce=True)
    first = violated(replace(PLAIN, model=seeded_by_rank, parallelize=planted.bare, train_step=step), "dp_replicate=3")
    assert (first.cause, first.stage, first.where, first.step) == ("initial-state", "initial-state", "up.weight", -1)
    assert (first.axis, first.ranks) == ("dp_replicate", (2,))
    assert first.comparison is not None
    assert {sample.rank for sample in first.comparison.samples} == {2}


@pytest.mark.parametrize("strategy", ["dp_replicate=3", "tp=2,dp_replicate=3"])
def test_gradients_that_nobody_reduced_are_named_so(strategy: str) -> None:
    first = violated(replace(HAND, loss=planted.past_the_wrapper), strategy)
    assert (first.cause, first.stage, first.where, first.step) == ("grad-not-reduced", "gradient", "head.bias", 0)
    assert first.axis == "dp_replicate"
    assert first.ranks == planted.everyone(strategy)


def test_gradients_reduced_for_some_micro_batches_have_no_cause_without_a_reference() -> None:
    first = violated(replace(planted.THREE, train_step=planted.sync_first), "dp_replicate=2")
    assert (first.cause, first.stage, first.axis) == ("unexplained", "gradient", "dp_replicate")


@pytest.mark.parametrize("strategy", planted.TENSOR_PARALLEL)
def test_a_missing_sum_over_tp_shows_in_the_gradients_above_it(strategy: str) -> None:
    first = violated(replace(HAND, parallelize=partial(planted.by_hand, enter=planted.same)), strategy)
    assert (first.cause, first.stage, first.where) == ("unexplained", "gradient", "norm2.bias")
    assert first.axis == "tp"
    assert first.ranks == planted.everyone(strategy)


def test_tp_peers_that_read_other_samples_are_found() -> None:
    first = violated(planted.read(cut="world"), "tp=2,dp_replicate=3")
    assert (first.cause, first.stage, first.where, first.axis) == ("batch-differs-in-group", "batch", "batch[0]", "tp")


def test_data_ranks_that_read_the_same_samples_are_found() -> None:
    first = violated(planted.read(cut="nobody"), "dp_replicate=3")
    assert (first.cause, first.stage, first.axis) == ("batch-repeated-across-dp", "batch", "dp_replicate")


def test_an_axis_that_does_nothing_is_found() -> None:
    first = violated(DDP, "dp_shard=3")
    assert (first.cause, first.axis) == ("strategy-not-applied", "dp_shard")


def own_rate(step: sp.Step) -> Tensor:
    for group in step.optimizer.param_groups:
        group["lr"] = 0.1 + 0.01 * (dist.get_rank() == 1)
    return planted.hand_step(step)


def test_a_rank_with_a_learning_rate_of_its_own_is_found_in_the_weights() -> None:
    first = violated(replace(DDP, train_step=own_rate), "dp_replicate=3")
    assert (first.cause, first.stage, first.step) == ("optimizer", "update", 0)
    assert (first.axis, first.ranks) == ("dp_replicate", (1,))


class Counting(planted.Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1 + dist.get_rank()
        return super().forward(x)


def test_whole_numbers_that_data_ranks_count_differently_are_found() -> None:
    step = partial(planted.hand_step, reduce=True)
    first = violated(replace(PLAIN, model=Counting, parallelize=planted.bare, train_step=step), "dp_replicate=3")
    assert (first.cause, first.stage, first.where, first.axis) == ("buffers", "buffer", "seen", "dp_replicate")


def test_the_command_prints_the_violation_and_ends_with_1() -> None:
    def run(target: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shardproof", "check", target, "--strategies", "tp_fsdp", "--invariants", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    right = run("examples/gpt.py", "--steps", "1")
    assert right.returncode == 0, right.stderr
    assert "replicas against each other, float64" in right.stdout
    wrong = run("examples/composer_mlp.py:mixed_inputs")
    assert wrong.returncode == 1, wrong.stderr
    assert wrong.stdout.splitlines()[-1] == "DIVERGES: tp_fsdp, first at step 0, batch of batch[0]"
    assert run("examples/gpt.py", "--reference", "ddp").returncode == 2


# `check_invariants`, in a training loop.


def watched(experiment: sp.Experiment, *strategies: str, expect: Callable[[list[sp.Violation]], bool]) -> sp.Report:
    """Train with shardproof's step, looking on after the backward pass and after the step, on all ranks."""
    model = experiment.model()
    shapes = {name: tuple(value.shape) for name, value in (*model.named_parameters(), *model.named_buffers())}

    def look(step: sp.Step, **options: Any) -> None:
        found = sp.check_invariants(step.model, step.optimizer, mesh=step.mesh, **options)
        assert expect(found), [str(violation) for violation in found]

    def own(step: sp.Step) -> Tensor:
        class Onlooker:
            def gradients(self) -> None:
                look(step, batch=step.microbatches[0])
                look(step, shapes=shapes)

            def norm(self, norm: Tensor) -> None:
                """Nothing to see."""

        logged = train_step(step, list(held_parameters(step.model)), Onlooker())
        look(step, batch=step.microbatches, shapes=shapes)
        return logged

    return sp.check(replace(experiment, train_step=own, max_grad_norm=None), strategies or ON_FOUR, steps=2)


def nothing(found: list[sp.Violation]) -> bool:
    return not found


@pytest.mark.parametrize("name", ["digits.experiment", "gpt.experiment", "gpt.sequence_parallel"])
def test_a_right_loop_is_never_told_of_a_violation(name: str) -> None:
    report = watched(example(name), expect=nothing)
    assert report.ok, str(report)


def test_a_right_loop_of_a_users_own_layout_is_never_told_of_a_violation() -> None:
    for layout, strategies in [
        (planted.by_hand, (*planted.TENSOR_PARALLEL, "dp_replicate=3")),
        (planted.planned, ("dp_shard=3", "tp=2,dp_shard=2")),
        (hand_made_below_fsdp, ("tp=2,dp_shard=2",)),
    ]:
        assert watched(replace(PLAIN, parallelize=layout, microbatches=1), *strategies, expect=nothing).ok


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp_fsdp1"])
def test_running_statistics_and_dropout_are_no_violation(strategy: str) -> None:
    # It does not train like one device, as each rank normalises by its own samples; its replicas are the same still.
    plan = {"up": "colwise", "down": "rowwise"}
    watched(replace(PLAIN, model=Normed, tp_plan=plan), strategy, expect=nothing)


def test_looking_on_leaves_the_run_as_it_is() -> None:
    """The same bits, the same collectives, and the same random numbers."""
    dropped = replace(PLAIN, model=Normed)
    bare = sp.check(replace(dropped, train_step=_own_step), ("ddp",), show=(0,), steps=2).runs[0]
    seen = sp.check(replace(dropped, train_step=partial(_own_step, look=True)), ("ddp",), show=(0,), steps=2).runs[0]
    assert seen.collectives == bare.collectives
    assert seen.shown[0] == bare.shown[0]


def _own_step(step: sp.Step, look: bool = False) -> Tensor:
    def see() -> None:
        if look:
            sp.check_invariants(step.model, step.optimizer, mesh=step.mesh, batch=step.microbatches, raises=True)

    see()
    step.optimizer.zero_grad()
    loss = step.loss(step.model, step.microbatches[0])
    loss.backward()
    see()
    step.optimizer.step()
    return loss.detach()


def in_a_loop(
    body: Callable[[sp.Step], None], strategy: str, layout: Callable[..., nn.Module] = planted.by_hand, **changes: Any
) -> None:
    """Call `body` on all ranks after the backward pass of the first step. What it asserts is asserted here."""

    def step(step: sp.Step) -> Tensor:
        step.optimizer.zero_grad()
        loss = step.loss(step.model, step.microbatches[0])
        loss.backward()
        if step.parallelism.world_size > 1 and step.index == 0:
            body(step)
        step.optimizer.step()
        return loss.detach()

    sp.check(replace(PLAIN, parallelize=layout, train_step=step, **changes), (strategy,), invariants=True, steps=1)


def told(step: sp.Step, **options: Any) -> list[tuple[str, str, str, tuple[int, ...]]]:
    found = sp.check_invariants(step.model, step.optimizer, mesh=step.mesh, **options)
    return [(one.kind, one.name, one.axis, one.ranks) for one in found]


def parameter(step: sp.Step, name: str) -> nn.Parameter:
    return next(held.leaf for held in held_parameters(step.model) if held.name == name)


def nudged(tensor: Tensor, *ranks: int) -> None:
    """Moved by one unit in the last place, in one element."""
    if dist.get_rank() in ranks:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        flat = local.detach().view(-1)
        flat[1] = torch.nextafter(flat[1], torch.tensor(float("inf"), dtype=flat.dtype))


def test_one_bit_on_one_rank_is_told_with_its_rank_on_every_rank() -> None:
    def body(step: sp.Step) -> None:
        nudged(parameter(step, "head.weight"), 2)
        assert told(step) == [("weight", "head.weight", "dp_replicate", (2,))]
        nudged(parameter(step, "norm1.bias").grad, 0)
        assert told(step)[1:] == [("gradient", "norm1.bias", "dp_replicate", (0,))]

    in_a_loop(body, "dp_replicate=3")


def test_two_ranks_that_differ_are_both_told_as_nobody_knows_who_is_wrong() -> None:
    def body(step: sp.Step) -> None:
        nudged(parameter(step, "head.weight"), 1)
        assert told(step) == [("weight", "head.weight", "dp_replicate", (0, 1))]

    in_a_loop(body, "dp_replicate=2")


def test_along_tp_a_plain_tensor_is_compared_where_its_shape_says_that_it_is_whole() -> None:
    shapes = {name: tuple(value.shape) for name, value in planted.Small().named_parameters()}

    def body(step: sp.Step) -> None:
        nudged(parameter(step, "norm1.weight"), 1, 3)
        nudged(parameter(step, "up.weight"), 1, 3)
        # It may be a slice; up.weight is one.
        assert told(step) == []
        assert told(step, shapes=shapes) == [("weight", "norm1.weight", "tp", (0, 1, 2, 3))]
        assert told(step, shapes=shapes, ignore=["norm1.*"]) == []
        nudged(parameter(step, "up.weight"), 2)
        assert told(step, ignore=["norm1.*"]) == [("weight", "up.weight", "dp_replicate", (0, 2))]

    in_a_loop(body, "tp=2,dp_replicate=2")


def test_a_dtensor_says_itself_where_it_is_replicated() -> None:
    def body(step: sp.Step) -> None:
        bias = parameter(step, "down.bias")
        assert isinstance(bias, DTensor)
        nudged(bias, 1)
        assert told(step) == [("weight", "down.bias", "tp", (0, 1))]

    in_a_loop(body, "tp=2,dp_shard=2", layout=planted.planned)


def test_batches_are_the_same_along_tp_and_apart_along_dp() -> None:
    def body(step: sp.Step) -> None:
        inputs, targets = step.microbatches[0]
        assert told(step, batch=step.microbatches[0]) == []
        mine = inputs + dist.get_rank()
        assert told(step, batch=(mine, targets)) == [("batch", "batch", "tp", tuple(range(6)))]
        # Labels alone may be the same by chance.
        assert told(step, batch=(inputs, torch.zeros(4))) == []
        [twins] = sp.check_invariants(step.model, mesh=step.mesh, batch=torch.ones(3))
        assert (twins.same, twins.axis, twins.ranks) == (True, "dp_replicate", tuple(range(6)))
        assert str(twins) == "batch is the same along dp_replicate: ranks 0, 1, 2, 3, 4, 5"

    in_a_loop(body, "tp=2,dp_replicate=3")


def test_optimizer_state_and_whole_numbers_in_buffers_are_compared() -> None:
    def body(step: sp.Step) -> None:
        step.optimizer.step()
        assert told(step) == []
        state = step.optimizer.state[parameter(step, "head.bias")]
        nudged(state["exp_avg_sq"], 1)
        state["step"] += dist.get_rank() == 2
        step.model.module.seen += dist.get_rank() == 0
        assert [(v.kind, v.part, v.ranks) for v in sp.check_invariants(step.model, step.optimizer, mesh=step.mesh)] == [
            ("optimizer state", "step", (2,)),
            ("optimizer state", "exp_avg_sq", (1,)),
            ("buffer", "", (0,)),
        ]

    class Seen(planted.Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    adam = {"optimizer": lambda model: torch.optim.Adam(model.parameters()), "model": Seen}
    in_a_loop(body, "dp_replicate=3", **adam)


def test_a_missing_gradient_is_no_gradient_of_zeros_unless_it_is() -> None:
    def body(step: sp.Step) -> None:
        bias = parameter(step, "head.bias")
        kept = bias.grad
        bias.grad = None if dist.get_rank() == 1 else torch.zeros_like(bias)
        assert told(step) == []
        bias.grad = None if dist.get_rank() == 1 else kept
        assert told(step) == [("gradient", "head.bias", "dp_replicate", (1,))]

    in_a_loop(body, "dp_replicate=3")


def test_gradients_before_their_reduction_are_left_out() -> None:
    def body(step: sp.Step) -> None:
        with step.model.no_sync():
            step.loss(step.model, step.microbatches[0]).backward()
            assert told(step) == []
        assert told(step) == []
        step.optimizer.zero_grad()
        step.loss(step.model, step.microbatches[0]).backward()
        assert told(step) == []

    in_a_loop(body, "dp_replicate=2")


def test_a_violation_is_raised_where_that_is_asked_for() -> None:
    def body(step: sp.Step) -> None:
        nudged(parameter(step, "head.weight"), 2)
        with pytest.raises(
            sp.InvariantError, match=r"weight of head.weight differs along dp_replicate: rank 2"
        ) as caught:
            sp.check_invariants(step.model, mesh=step.mesh, raises=True)
        assert isinstance(caught.value, AssertionError)
        assert [violation.name for violation in caught.value.violations] == ["head.weight"]

    in_a_loop(body, "dp_replicate=3")


def test_any_mesh_with_names_will_do_and_none_is_plain_data_parallelism() -> None:
    def body(step: sp.Step) -> None:
        nudged(parameter(step, "head.weight"), 3)
        assert told_on(None) == [("dp", (3,))]
        assert told_on(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "fsdp"))) == [
            ("replicate", (1, 3)),
            ("fsdp", (2, 3)),
        ]
        strange = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
        assert told_on(strange) == []
        assert told_on(strange, data_axes=["y"]) == [("y", (2, 3))]
        # A part of the world: its own ranks alone, each row by itself.
        rows = told_on(strange["y"], data_axes=["y"])
        assert rows == ([("y", (2, 3))] if dist.get_rank() > 1 else [])
        with pytest.raises(sp.UsageError, match="has no axis 'dp'"):
            told_on(strange, data_axes=["dp"])
        with pytest.raises(sp.UsageError, match="have no names"):
            told_on(init_device_mesh("cpu", (4,)))

        cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "dp", "tp"))["dp", "tp"]
        assert told_on(cube) == [("dp", (1, 3))]

    def told_on(mesh: Any, **options: Any) -> list[tuple[str, tuple[int, ...]]]:
        return [(one.axis, one.ranks) for one in sp.check_invariants(model[0], mesh=mesh, **options)]

    model: list[nn.Module] = []

    def remembering(step: sp.Step) -> None:
        model[:] = [step.model]
        body(step)

    in_a_loop(remembering, "dp_replicate=4")


def test_pipeline_stages_with_other_parameters_are_not_held_against_each_other() -> None:
    def body(step: sp.Step) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        stage = nn.ModuleDict({f"layer{mesh['pp'].get_local_rank()}": nn.Linear(2, 2)})
        if mesh["pp"].get_local_rank():
            stage["more"] = nn.Linear(3, 3)
        for value in stage.parameters():
            nn.init.constant_(value, 0.5)
        assert sp.check_invariants(stage, mesh=mesh) == []
        if mesh["pp"].get_local_rank():
            nudged(stage["more"].weight, 3)
        [found] = sp.check_invariants(stage, mesh=mesh)
        assert (found.kind, found.axis, found.ranks) == ("weight", "dp", (2, 3))
        assert found.name == ("more.weight" if dist.get_rank() > 1 else "(not on this rank)")

    in_a_loop(body, "dp_replicate=4")


def test_ranks_are_needed() -> None:
    with pytest.raises(sp.UsageError, match="init_process_group"):
        sp.check_invariants(nn.Linear(2, 2))
