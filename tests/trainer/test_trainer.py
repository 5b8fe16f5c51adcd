"""`sp.Trainer` and `shardproof train` as people use them: in a plain process, in a notebook, on a terminal, wrongly."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import programs
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner, Result

import shardproof as sp
from shardproof import cli
from shardproof.checkpoint.together import PATIENCE, own_group
from shardproof.errors import RankFailed, RankHung, StrategyError, UsageError
from shardproof.ranks import Place, Ranks, start
from shardproof.ranks.place import FOREVER
from shardproof.trainer.loggers.console import ConsoleLogger

PROGRAM = Path(programs.__file__)
SHORT = sp.Training(max_duration="4ba", progress_bar=False)


class Counts(sp.Callback):
    """Changes itself on the ranks, and says so."""

    def __init__(self) -> None:
        self.steps = 0

    def step_end(self, loop: object) -> None:
        self.steps += 1
        print("counted", self.steps)


def _trainer(strategy: str, **changes: object) -> sp.Trainer:
    return sp.Trainer(programs.experiment, strategy, SHORT, ranks=2, **changes)


def test_two_trainers_share_a_plain_process_and_train_alike_under_different_strategies() -> None:
    counts = Counts()
    with _trainer("fsdp", callbacks=counts, quiet=True) as sharded, _trainer("tp") as split:
        fits = [trainer.fit() for trainer in (sharded, split)]
        states = [trainer.state_dict() for trainer in (sharded, split)]
        assert fits[0].losses == pytest.approx(fits[1].losses, rel=1e-5)
        torch.testing.assert_close(*states)
        with pytest.raises(UsageError, match=r"state_dict\(\) or predict\(\).* Trainer\(\.\.\., fork=False\)"):
            _ = sharded.loop
        with pytest.raises(UsageError, match=r"evaluate\(\) has to send its arguments to the ranks.* eval_data"):
            sharded.evaluate(lambda: None)
        assert sharded.fit("6ba").first_step == 4, "a refused call leaves the ranks as they are"
    assert counts.steps == 0, "what callbacks change stays on the ranks"


class InThisProcess:
    """What a forked rank does with a trainer that makes its own process a rank: backward passes forbid later forks."""

    def trains_alone(self, place: Place) -> tuple[object, ...]:
        found: list[object] = []
        for _ in range(2):
            with sp.Trainer(programs.experiment, training=SHORT, fork=False) as trainer:
                fit = trainer.fit()
                found.append((fit.step, trainer.loop.rank, dist.is_initialized()))
            found.append(dist.is_initialized())
        return tuple(found)

    def uses_the_group_that_is_there(self, place: Place) -> tuple[object, ...]:
        counts = Counts()
        with place.world("theirs", 2):
            with pytest.raises(StrategyError, match="takes 1 ranks, and this launch has 2 ranks"):
                sp.Trainer(programs.experiment, "single", SHORT)
            with sp.Trainer(programs.experiment, "fsdp", SHORT, callbacks=counts, timeout_s=77.0) as trainer:
                losses = trainer.fit().losses
                groups = trainer.loop.mesh["tp"].get_group(), own_group(), dist.group.WORLD
            return losses, counts.steps, dist.is_initialized(), tuple(map(_limit, groups))


def _limit(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, InThisProcess(), timeout_s=60.0) as ranks:
        yield ranks


def test_a_trainer_that_does_not_fork_is_a_world_of_one_and_leaves_it(ranks: Ranks) -> None:
    assert ranks.call("trains_alone", ranks=[0]) == {0: ((4, 0, True), False) * 2}


def test_a_process_group_that_is_there_is_used_and_kept(ranks: Ranks) -> None:
    got = ranks.call("uses_the_group_that_is_there")
    with _trainer("fsdp") as trainer:
        want = trainer.fit().losses
    limits = timedelta(seconds=77), PATIENCE, FOREVER
    assert got == dict.fromkeys(range(2), (want, 4, True, limits)), "a group of one's own for writers, who may be slow"


class Fails(sp.Callback):
    """Raises on one rank."""

    def step_end(self, loop: object) -> None:
        if loop.rank == 1:
            raise ValueError("not today")


def test_code_that_fails_on_one_rank_is_named_with_rank_file_and_line() -> None:
    with _trainer("ddp", callbacks=Fails()) as trainer, pytest.raises(RankFailed) as caught:
        trainer.fit()
    failure = caught.value.failure
    line = PROGRAM.with_name("test_trainer.py").read_text().splitlines()[failure.line - 1]
    assert (failure.rank, failure.file, failure.message) == (1, __file__, "not today")
    assert 'raise ValueError("not today")' in line


class Sleeps(sp.Callback):
    """On both ranks a little, and on rank 1 for ever at last."""

    def step_end(self, loop: object) -> None:
        time.sleep(0.3)
        if loop.rank == 1 and loop.progress.step == 8:
            time.sleep(600)


def test_silence_is_a_hang_and_a_slow_training_is_none() -> None:
    with sp.Trainer(programs.experiment, "ddp", SHORT, ranks=2, callbacks=Sleeps(), timeout_s=1.5) as trainer:
        began = time.monotonic()
        assert trainer.fit("7ba").step == 7
        assert time.monotonic() - began > 1.5
        with pytest.raises(RankHung, match=r"no answer in fit within 1\.5 s") as caught:
            trainer.fit("9ba")
    assert "in step_end" in caught.value.stacks[1]


def test_what_ranks_print_is_labelled_and_what_the_logger_prints_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with _trainer("fsdp", callbacks=Counts(), loggers=ConsoleLogger(every=2)) as trainer:
        trainer.fit()
    said, progress = capfd.readouterr()
    assert sorted(progress.splitlines()) == [f"[fit ranks 0-1] counted {step}" for step in range(1, 5)]
    assert [line.split("  ")[0] for line in said.splitlines()] == ["run", "step 1", "step 2", "step 4"]
    assert "\x1b" not in progress, "no progress bar outside a terminal"


def _run(target: str, *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["train", target, "--ranks", "2", *options])


def test_a_file_without_training_is_trained_for_one_epoch_and_quiet_prints_one_line(tmp_path: Path) -> None:
    source = PROGRAM.read_text().replace("training = ", "_unused = ")
    source = source.replace("    return model(batch)", '    print("on the ranks")\n    return model(batch)')
    (tmp_path / "plain.py").write_text(source)
    result = _run(str(tmp_path / "plain.py"), "--strategy", "fsdp", "--quiet")
    assert result.exit_code == 0
    (line,) = result.output.splitlines()
    assert re.fullmatch(r"fsdp: 8 steps, 1 epoch in [\d.]+ s; loss [\d.]+", line)


_DRIFTING = """
class Drifts(sp.Callback):
    def step_end(self, loop):
        if loop.rank == 1:
            with torch.no_grad():
                next(loop.model.parameters()).add_(1e-3)

class Raises(sp.Callback):
    def step_end(self, loop):
        raise ValueError("not today")
"""


@pytest.mark.parametrize(
    ("callback", "options", "code", "says"),
    [
        ("Drifts", ("--check-every", "2"), 1, "error: ranks that should hold the same do not:"),
        ("Says", ("--strategy", "ddd"), 2, "error: there is no strategy 'ddd'; did you mean ddp?"),
        ("Says", ("--timeout", "0"), 2, "error: timeout=0: the time limit of a call is a number of seconds above 0"),
        ("Raises", (), 3, "error: rank 0 failed in fit at "),
    ],
)
def test_the_exit_code_says_what_kind_of_end_it_was(
    callback: str, options: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    experiment, training = PROGRAM.read_text().split("experiment = ")
    source = f"{experiment}{_DRIFTING}\nexperiment = {training}".replace("[Says()]", f"[{callback}()]")
    (tmp_path / "train.py").write_text(source)
    result = _run(str(tmp_path / "train.py"), "--strategy", "ddp", *options)
    assert result.exit_code == code, result.output
    assert says in result.output
    assert "steps, " not in result.stdout, "no conclusion"


def test_on_a_terminal_a_bar_is_drawn_and_left_closed_and_the_conclusion_goes_to_stdout(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM.read_text().replace("progress_bar=False", "progress_bar=True"))
    ours, theirs = pty.openpty()
    command = ("train", str(tmp_path / "train.py"), "--strategy", "ddp", "--ranks", "2")
    with subprocess.Popen(
        [sys.executable, "-m", "shardproof", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as program:
        os.close(theirs)
        drawn = _everything(ours)
        assert program.stdout
        said = program.stdout.read()
    assert program.returncode == 0
    *logged, conclusion = said.splitlines()
    assert all(re.match(r"(run|step \d+)  ", line) for line in logged)
    assert conclusion.startswith("ddp: 20 steps, 2 epochs in ")
    assert "epoch 2 step 20/20" in drawn.rpartition("\r")[0] + drawn
    assert drawn.rpartition("\x1b[?25")[2].startswith("h"), "the cursor is there again"
    for step in range(1, programs.STEPS + 1):
        assert len(re.findall(rf"\[fit rank 0\] step {step}\b", drawn)) == 1


def _everything(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


def test_help_is_there_at_once() -> None:
    source = "import sys; from shardproof import cli; cli.app(['train', '--help'], standalone_mode=False); "
    source += "sys.exit('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, "no torch"
    options = shown.stdout.partition("Options:\n")[2].splitlines()
    assert len(options) > 20
    assert all(line.lstrip().startswith("-") for line in options), "a line for each"
