"""The two logs' runs, as examples/composer_mlp.py re-creates them: verdicts, causes, and every logged number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import shardproof as sp

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "composer_mlp.py"
LOGS = json.loads((HERE / "data" / "scenarios.json").read_text())
LOGGED = {scenario["name"]: scenario for scenario in LOGS["scenarios"]}
TOLERANCE = LOGS["tolerance"]
"""The logs print four digits."""

STRATEGIES = ("ddp", "fsdp", "tp_fsdp", "fsdp1", "tp_fsdp1")
"""The logs' three, and the older FSDP that they really ran under the names `fsdp` and `tp_fsdp`."""

RAN = [name for name in LOGGED if name != "crash-in-user-code"]
AGREE = [name for name in RAN if LOGGED[name]["expect"]["parity"]]
TENSOR_PARALLEL = {"tp_fsdp", "tp_fsdp1"}


@cache
def experiments() -> dict[str, sp.Experiment]:
    sys.path.insert(0, str(EXAMPLE.parent))
    import composer_mlp

    return composer_mlp.SCENARIOS


@cache
def checked(name: str) -> sp.Report:
    return sp.check(experiments()[name], strategies=STRATEGIES, ranks=LOGS["world_size"], show=(2, 3))


def run_of(name: str, strategy: str) -> sp.Run:
    return next(run for run in checked(name).runs if run.strategy == strategy)


def held(run: sp.Run, rank: int, stage: str, name: str, step: int) -> Any:
    """What one rank held of one tensor. Exactly one tensor must answer to that."""
    [found] = [s for s in run.shown[rank] if (s.stage, s.name, s.step, s.part) == (stage, name, step, "")]
    return found.values


def logged(numbers: Any) -> Any:
    """The log's numbers, for a comparison to the digits that it prints; nested lists become flat."""
    return pytest.approx(flat(numbers), abs=TOLERANCE, rel=0)


def flat(values: Any) -> list[float]:
    if values is None:
        return []
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def outputs_of_rank_3(expect: dict[str, Any]) -> list[tuple[str, int, list[float]]]:
    """(strategy, step, output) for every output that the log prints."""
    if "rank3_output_by_step" in expect:
        return [(s, step, out) for s in STRATEGIES for step, out in enumerate(expect["rank3_output_by_step"])]
    by_strategy = expect["rank3_output"]
    if isinstance(by_strategy, list):
        return [(strategy, 0, by_strategy) for strategy in STRATEGIES]
    return [(strategy, 0, by_strategy[strategy.removesuffix("1")]) for strategy in STRATEGIES]


def test_the_example_holds_every_scenario_of_the_logs():
    assert set(experiments()) == set(LOGGED)


@pytest.mark.parametrize("name", AGREE)
def test_runs_that_trained_rightly_agree_under_every_strategy(name: str):
    report = checked(name)
    assert report.ok, str(report)
    assert report.first is None
    assert [run.strategy for run in report.runs] == list(STRATEGIES)
    assert all(run.ok and not run.findings for run in report.runs)


@pytest.mark.parametrize("name", [name for name in RAN if name not in AGREE])
def test_runs_that_trained_wrongly_are_found_under_tensor_parallelism_alone(name: str):
    report = checked(name)
    assert not report.ok
    assert {run.strategy for run in report.runs if not run.ok} == TENSOR_PARALLEL
    assert {run.strategy for run in report.runs if run.findings} == TENSOR_PARALLEL


@pytest.mark.parametrize("name", RAN)
def test_rank_3_gets_the_output_of_the_log(name: str):
    for strategy, step, output in outputs_of_rank_3(LOGGED[name]["expect"]):
        assert flat(held(run_of(name, strategy), 3, "forward", "(root)", step)) == logged(output), (strategy, step)


@pytest.mark.parametrize("name", RAN)
def test_ranks_2_and_3_read_the_samples_of_the_log(name: str):
    logs = LOGGED[name]
    for step, inputs in enumerate(logs.get("rank_inputs_by_step") or [logs["rank_inputs"]]):
        for run in checked(name).runs:
            for rank in (2, 3):
                [read] = [s for s in run.shown[rank] if (s.stage, s.step, s.part) == ("batch", step, "[0]")]
                assert flat(read.values) == logged(inputs[rank])


@pytest.mark.parametrize("strategy", sorted(TENSOR_PARALLEL))
def test_peers_that_read_different_samples_are_found_at_the_batch(strategy: str):
    expect = LOGGED["mixed-inputs"]["expect"]
    [finding] = run_of("mixed-inputs", strategy).findings
    assert (finding.stage, finding.cause, finding.axis) == (expect["first"], expect["cause"], expect["axis"])
    assert finding.step == 0
    assert finding.where == "batch[0]"
    assert finding.factor is None
    assert finding.ranks == tuple(rank for group in expect["groups"] for rank in group)
    for group in expect["groups"]:
        assert ", ".join(map(str, group)) in finding.evidence
    assert 'mesh["dp"]' in finding.fix


@pytest.mark.parametrize("strategy", sorted(TENSOR_PARALLEL))
def test_a_batch_split_over_tp_makes_gradients_twice_too_large(strategy: str):
    expect = LOGGED["sharded-batch"]["expect"]
    [finding] = run_of("sharded-batch", strategy).findings
    assert (finding.stage, finding.cause, finding.axis) == (expect["first"], expect["cause"], expect["axis"])
    assert finding.factor == pytest.approx(expect["factor"])
    assert finding.step == 0
    # Backward ends at the first layer, so that the last layer's gradient is the first to be wrong.
    assert finding.where == "2.weight"
    # Ranks 1 and 3 hold zeros, which are right whatever the factor.
    assert 2 in finding.ranks
    assert not {1, 3} & set(finding.ranks)


@pytest.mark.parametrize("name", ["sharded-batch", "replicated-gradients"])
@pytest.mark.parametrize("parameter", ["0.weight", "2.weight"])
def test_ddp_gradients_are_those_of_the_log(name: str, parameter: str):
    for rank in (2, 3):
        gradient = held(run_of(name, "ddp"), rank, "gradient", parameter, 0)
        assert flat(gradient) == logged(LOGGED[name]["expect"]["ddp_grad"][parameter])


def test_tp_fsdp_gradients_are_the_doubled_ones_of_the_log():
    expect = LOGGED["sharded-batch"]["expect"]
    # The log prints local shards of the older FSDP: rank 2 and 3 hold columns 0 and 1 of the second matrix.
    run = run_of("sharded-batch", "tp_fsdp1")
    for rank, shards in expect["tp_fsdp_local_grad"].items():
        for parameter, shard in shards.items():
            assert flat(held(run, int(rank.removeprefix("rank")), "gradient", parameter, 0)) == logged(shard)
    # The same as columns of the whole, as the newer FSDP cuts them: rank 2 and 3 hold row 1 of the second matrix.
    run, whole = run_of("sharded-batch", "tp_fsdp"), expect["tp_fsdp_grad"]["2.weight"]
    for rank in (2, 3):
        assert flat(held(run, rank, "gradient", "2.weight", 0)) == logged(whole[1][rank - 2 : rank - 1])


@pytest.mark.parametrize("strategy", ["fsdp1", "tp_fsdp1"])
def test_local_shards_are_those_of_the_log(strategy: str):
    run = run_of("replicated-gradients", strategy)
    for rank, shards in LOGGED["replicated-gradients"]["expect"]["local_shards"][strategy].items():
        for name, shard in shards.items():
            parameter, stage = name.removesuffix(".grad"), "gradient" if name.endswith(".grad") else "initial-state"
            assert flat(held(run, int(rank.removeprefix("rank")), stage, parameter, 0 if ".grad" in name else -1)) == (
                logged(shard)
            ), (rank, name)


@pytest.fixture(scope="module")
def crash() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardproof", "check", f"{EXAMPLE}:crash_in_user_code", "--ranks", "4"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE.parent / "src"), "COLUMNS": "400", "NO_COLOR": "1"},
    )


def line_of(text: str) -> int:
    return 1 + next(n for n, line in enumerate(EXAMPLE.read_text().splitlines()) if text in line)


def test_a_crash_in_user_code_exits_with_3(crash: subprocess.CompletedProcess[str]):
    assert crash.returncode == LOGGED["crash-in-user-code"]["expect"]["exit_code"], crash.stderr


def test_a_crash_in_user_code_is_reported_once_with_rank_exception_file_and_line(
    crash: subprocess.CompletedProcess[str],
):
    said = crash.stdout + crash.stderr
    assert said.count("rank 3 failed") == 1
    assert not any(f"rank {other} failed" in said for other in (0, 1, 2))
    assert said.count("TypeError: 'list' object is not an iterator") in (1, 2)  # the headline, and its traceback
    assert f"{EXAMPLE.name}:{line_of('yield next(next(iter(loader)))')}" in said
    assert said.count("Traceback") <= 1


def test_a_crash_in_user_code_brings_no_noise(crash: subprocess.CompletedProcess[str]):
    said = crash.stdout + crash.stderr
    for noise in LOGGED["crash-in-user-code"]["expect"]["no_noise"]:
        assert noise not in said
    assert "destroy_process_group" not in said
    assert "site-packages/torch" not in said
