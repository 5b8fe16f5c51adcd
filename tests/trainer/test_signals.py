"""A training that is told to end: SIGTERM saves and ends it, a second one and Ctrl-C end it at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof.checkpoint import folder as checkpoints
from shardproof.ranks.sigterm import ONE_REQUEST_S

PROGRAM = Path(programs.__file__)
TRAINING = sp.Training(max_duration=f"{programs.STEPS}ba", progress_bar=False)


def _tell_to_end() -> None:
    """From a rank: its parent, which trains, is asked to end."""
    os.kill(os.getppid(), signal.SIGTERM)


class TellsToEnd(sp.Callback):
    """Rank 0 asks after step 7."""

    def step_end(self, loop: object) -> None:
        if loop.rank == 0 and loop.progress.step == 7:
            _tell_to_end()


class Slow(sp.Callback):
    """Lasts long enough for a signal to arrive before the training is over by itself."""

    def step_end(self, loop: object) -> None:
        time.sleep(0.05)


def _weights(**changes: object) -> tuple[sp.Fit, dict[str, Tensor] | None]:
    with sp.Trainer(programs.experiment, "tp_fsdp", TRAINING, ranks=4, **changes) as trainer:
        return trainer.fit(), trainer.state_dict()


def test_sigterm_saves_and_a_resumed_run_ends_like_one_that_was_never_told(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    ended, _ = _weights(save_folder=folder, callbacks=[TellsToEnd(), Slow()])
    assert ended.stop_reason == "SIGTERM"
    assert 7 <= ended.step < programs.STEPS
    assert ended.checkpoint == checkpoints.newest(folder) == folder / f"step-{ended.step:08d}"
    resumed, got = _weights(save_folder=folder, load_path="auto")
    assert (resumed.first_step, resumed.step, resumed.stop_reason) == (ended.step, programs.STEPS, "max_duration")
    _, want = _weights()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_told_to_end_while_it_starts_it_ends_before_the_first_step_and_saves_nothing(tmp_path: Path) -> None:
    def model() -> nn.Module:
        if os.environ.get("RANK") == "0":
            _tell_to_end()
        time.sleep(0.3)
        return nn.Linear(4, 2)

    experiment = replace(programs.experiment, model=model, tp_plan=None)
    with sp.Trainer(experiment, "ddp", TRAINING, ranks=2, save_folder=tmp_path) as trainer:
        fit = trainer.fit()
        assert (fit.step, fit.stop_reason, fit.checkpoint) == (0, "SIGTERM", None)
        assert not list(tmp_path.iterdir())
        assert trainer.fit("2ba").step == 2, "the next call is not told"


class TellsInEvaluation(torch.utils.data.Dataset[Tensor]):
    """Data that ask to end when they are read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        if index == 0:
            _tell_to_end()
            time.sleep(0.2)
        return torch.ones(4)


def test_told_to_end_in_an_evaluation_it_takes_no_further_step(tmp_path: Path) -> None:
    experiment = replace(programs.experiment, tp_plan=None)
    changes = {"eval_data": TellsInEvaluation(), "eval_interval": "4ba", "save_folder": tmp_path}
    with sp.Trainer(experiment, "fsdp", TRAINING, ranks=2, **changes) as trainer:
        fit = trainer.fit()
    assert (fit.step, fit.stop_reason) == (4, "SIGTERM")
    assert len(fit.evaluations) == 1, "who is told to end evaluates no more"
    assert fit.checkpoint == tmp_path / "step-00000004"


def _train(folder: Path, step_s: str, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = ("train", str(PROGRAM), "--strategy", "fsdp", "--ranks", "2", "--save-folder", str(folder), *more)
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "shardproof", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "STEP_S": step_s},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _read_until(program: subprocess.Popen[str], wanted: str) -> list[int]:
    """The processes of the ranks, which are named before `wanted` is said."""
    assert program.stdout
    ranks, lines = [], []
    for line in program.stdout:
        lines.append(line)
        if found := re.search(r"rank \d is (\d+)$", line):
            ranks.append(int(found[1]))
        if re.search(wanted, line):
            return ranks
    raise AssertionError("".join(lines))


def test_a_command_that_is_told_to_end_saves_says_so_and_is_no_failure(tmp_path: Path) -> None:
    with _train(tmp_path, "0.05") as program:
        _read_until(program, "step 6$")
        program.send_signal(signal.SIGTERM)
        said, _ = program.communicate(timeout=30)
    newest = checkpoints.newest(tmp_path)
    assert program.returncode == 0
    assert ", ended by SIGTERM; loss " in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith(f"; saved {newest}")


def test_torchrun_that_is_told_to_end_has_its_ranks_save(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with _train(tmp_path, "0.05", launcher=torchrun) as program:
        _read_until(program, "step 6$")
        program.send_signal(signal.SIGTERM)
        said, _ = program.communicate(timeout=30)
    (conclusion,) = [line for line in said.splitlines() if ", ended by SIGTERM" in line]
    assert conclusion.endswith(f"; saved {checkpoints.newest(tmp_path)}")
    assert "error: " not in said
    assert program.returncode != 0, "torchrun's own"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_sigterm_or_ctrl_c_ends_everything_at_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    is_rank = r"rank \d is \d+$"
    # With a step that lasts longer than the test.
    with _train(tmp_path, "60") as program:
        ranks = _read_until(program, is_rank) + _read_until(program, is_rank)
        program.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(ONE_REQUEST_S + 0.1)
            assert program.poll() is None, "the first one waits for the step to end"
            program.send_signal(number)
        said, _ = program.communicate(timeout=10)
    assert program.returncode == code
    assert "Traceback" not in said
    assert len(ranks) == 2
    assert _within(5.0, lambda: not any(map(_alive, ranks)))


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()
