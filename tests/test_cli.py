from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shardproof import cli
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.finding import Finding
from shardproof.errors import ExperimentError, Failure, RankDied, RankFailed
from shardproof.report.data import Report, Run, Shown
from shardproof.spec.parallelism import Parallelism

EXPERIMENT = """\
from shardproof.spec.experiment import Experiment

experiment = Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size=8)
"""

TENSOR = Comparison(step=0, stage="gradient", name="fc1.weight", verdict=Verdict.ROUNDING, error=1e-17, floor=1e-17)
PIECE = Shown(step=0, stage="gradient", name="fc1.weight", part="", layout="whole", shape=(2,), values=[0.5, 0.25])
GOOD = Run(strategy="ddp", degrees={"dp_replicate": 4}, comparisons=(TENSOR,), findings=(), shown={2: (PIECE,)})
FINDING = Finding(
    cause="grad-not-reduced",
    stage="gradient",
    where="fc1.weight",
    axis="dp",
    factor=None,
    ranks=(0, 1, 3),
    step=0,
    evidence="each rank holds its own row",
    fix="call the wrapped model, not model.module",
)
BAD = replace(GOOD, comparisons=(replace(TENSOR, verdict=Verdict.DIFFERENT, error=1.0),), findings=(FINDING,))
PARITY = Report(
    experiment="", runs=(GOOD,), ranks=4, steps=3, dtype="float64", device="cpu", reference="single", time_s=1.0
)
DIVERGENCE = replace(PARITY, runs=(BAD,))


@dataclass
class FakeCheck:
    """Stands in for `shardproof.parity.check`: keeps what it was called with, and gives or raises `outcome`."""

    outcome: Report | BaseException | None = None
    called: dict[str, Any] = field(default_factory=dict)

    def __call__(self, experiment: object, **options: Any) -> Report | None:
        self.called = {"experiment": experiment, **options}
        options["progress"].starting("ddp on 4 ranks")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCheck:
    """A check that finds parity, and a folder to work in that holds `mlp.py`."""
    fake = FakeCheck(PARITY)
    module = ModuleType("shardproof.parity")
    module.__dict__["check"] = fake
    monkeypatch.setitem(sys.modules, "shardproof.parity", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mlp.py").write_text(EXPERIMENT)
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["check", "mlp.py", *arguments])


def test_parity_prints_the_report_and_exits_0(check: FakeCheck):
    result = run()
    assert result.exit_code == 0
    assert result.stdout.startswith("shardproof: mlp.py\n")
    assert result.stdout.endswith("parity: ddp computes the same training as single\n")


def test_divergence_exits_1_and_names_stage_where_ranks_cause_and_fix(check: FakeCheck):
    check.outcome = DIVERGENCE
    result = run()
    assert result.exit_code == 1
    for fact in ("gradient, step 0", "fc1.weight", "0-1,3 of 4", "grad-not-reduced", "call the wrapped model"):
        assert fact in result.stdout
    assert result.stdout.splitlines()[-1] == "DIVERGES: ddp, first at step 0, gradient of fc1.weight"


def test_without_options_every_strategy_that_fits_is_asked_for(check: FakeCheck):
    run()
    del check.called["experiment"], check.called["progress"]
    assert check.called == {
        "strategies": None,
        "ranks": 4,
        "dtype": "float64",
        "device": "cpu",
        "steps": None,
        "reference": "single",
        "shuffle": False,
        "invariants": False,
        "timeout_s": 600.0,
        "show": (),
        "prove": False,
    }


def test_every_option_reaches_the_check(check: FakeCheck):
    result = run(
        *("--strategies", "ddp, tp-fsdp", "--strategy", "tp=2,dp_shard=3", "--strategy", "tp=4", "--ranks", "8"),
        *("--steps", "5", "--dtype", "bfloat16", "--device", "cuda", "--reference", "ddp", "--shuffle", "--prove"),
        *("--timeout", "30", "--show", "0", "--show", "2"),
    )
    assert result.exit_code == 0, result.output
    del check.called["experiment"], check.called["progress"]
    assert check.called == {
        "strategies": [
            Parallelism(dp_replicate=8, strategy="ddp"),
            Parallelism(dp_shard=4, tp=2, strategy="tp_fsdp"),
            Parallelism(dp_shard=3, tp=2, strategy="tp=2,dp_shard=3"),
            Parallelism(tp=4, strategy="tp=4"),
        ],
        "ranks": 8,
        "dtype": "bfloat16",
        "device": "cuda",
        "steps": 5,
        "reference": "ddp",
        "shuffle": True,
        "invariants": False,
        "timeout_s": 30.0,
        "show": (0, 2),
        "prove": True,
    }


def test_a_strategy_asked_for_twice_is_checked_once(check: FakeCheck):
    run("--strategies", "ddp,DDP", "--strategy", "ddp")
    assert [parallelism.strategy for parallelism in check.called["strategies"]] == ["ddp"]


def test_show_prints_what_the_rank_held_above_the_report(check: FakeCheck):
    shown = run("--show", "2").stdout
    assert "ddp  [2] whole  0.5000  0.2500" in shown
    assert shown.index("rank 2: what it held") < shown.index("shardproof: mlp.py")


def test_json_and_html_are_written_whatever_the_verdict(check: FakeCheck):
    check.outcome = DIVERGENCE
    assert run("--json", "report.json", "--html", "report.html").exit_code == 1
    written = json.loads(Path("report.json").read_text())
    assert written["experiment"] == "mlp.py"
    assert written["runs"][0]["findings"][0]["cause"] == "grad-not-reduced"
    assert "grad-not-reduced" in Path("report.html").read_text()


def test_verbose_lists_every_tensor(check: FakeCheck):
    assert "every tensor of ddp" in run("--verbose").stdout


def test_quiet_leaves_the_conclusion_alone(check: FakeCheck):
    result = run("--quiet")
    assert result.output == "parity: ddp computes the same training as single\n"


def test_progress_goes_to_stderr(check: FakeCheck):
    result = run()
    assert result.stderr == "ddp on 4 ranks ...\n"
    assert "ddp on 4 ranks" not in result.stdout


def test_a_rank_of_torchrun_without_a_report_ends_silently(check: FakeCheck, monkeypatch: pytest.MonkeyPatch):
    check.outcome = None
    result = run("--quiet", "--json", "report.json")
    assert (result.exit_code, result.output) == (0, "")
    assert not Path("report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategies", "dpd"), "error: there is no strategy 'dpd'; did you mean ddp"),
        (("--strategies", "tp=2,dp_shard=2"), "takes names; write --strategy tp=2,dp_shard=2 for degrees"),
        (("--strategies", ""), "holds no name"),
        (("--strategies", "hsdp", "--ranks", "6", "--strategy", "pt=2"), "there is no axis 'pt'"),
        (("--strategies", "hsdp", "--ranks", "5"), "does not fit 5 ranks"),
        (("--timeout", "0"), "give a number of seconds above 0"),
        (("--timeout", "nan"), "give a number of seconds above 0"),
        (("--quiet", "--verbose"), "exclude each other"),
        (("--json", "missing/report.json"), "there is no folder missing"),
        (("--html", "."), "is a folder"),
    ],
)
def test_wrong_use_is_one_line_on_stderr_before_anything_runs(
    check: FakeCheck, arguments: tuple[str, ...], message: str
):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert check.called == {}


def test_an_experiment_that_does_not_exist_is_wrong_use(check: FakeCheck):
    result = CliRunner().invoke(cli.app, ["check", "mpl.py"])
    assert result.exit_code == 2
    assert result.stderr == "error: mpl.py: there is no such file; did you mean mlp.py? (all: mlp.py)\n"


def test_an_experiment_that_does_not_train_exits_2(check: FakeCheck):
    check.outcome = ExperimentError("the loss has shape (8,)")
    result = run("--quiet")
    assert (result.exit_code, result.output) == (2, "error: the loss has shape (8,)\n")


@pytest.mark.parametrize("option", ["--dtype", "--device", "--ranks", "--steps", "--show"])
def test_a_value_that_an_option_does_not_take_is_wrong_use(check: FakeCheck, option: str):
    result = run(option, "-1")
    assert result.exit_code == 2
    assert option in result.stderr
    assert check.called == {}


def test_a_wrong_dtype_is_answered_with_the_right_ones(check: FakeCheck):
    result = run("--dtype", "foo")
    assert result.exit_code == 2
    assert "'float64', 'float32', 'bfloat16'" in result.stderr


def test_an_unknown_option_is_wrong_use(check: FakeCheck):
    assert run("--strategie", "ddp").exit_code == 2


def test_a_crashed_rank_exits_3_and_its_message_is_printed_once_without_our_traceback(check: FakeCheck):
    failure = Failure(
        rank=1, type_name="ValueError", message="bad", file="mlp.py", line=3, traceback="Traceback: mlp.py, line 3"
    )
    check.outcome = RankFailed(failure, during="tp")
    result = run("--quiet")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == "error: rank 1 failed in tp at mlp.py:3: ValueError: bad\n\nTraceback: mlp.py, line 3\n"


def test_a_dead_rank_exits_3(check: FakeCheck):
    check.outcome = RankDied(2, "killed by SIGKILL")
    assert run().exit_code == 3


def test_ctrl_c_exits_130_quietly(check: FakeCheck):
    check.outcome = KeyboardInterrupt()
    result = run("--quiet")
    assert (result.exit_code, result.output) == (130, "")


def test_an_unexpected_error_shows_its_traceback_and_is_not_taken_for_a_divergence(
    check: FakeCheck, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    check.outcome = ZeroDivisionError("a bug of ours")
    monkeypatch.setattr(sys, "argv", ["shardproof", "check", "mlp.py"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "ZeroDivisionError: a bug of ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("check", "shardproof check train.py:decoder --strategies ddp,fsdp,tp_fsdp --ranks 8"),
        ("zoo", "shardproof zoo 'ddp_*' mean-of-means --verbose"),
    ],
)
def test_help_explains_each_option_and_shows_examples(command: str, example: str):
    help_text = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    assert example in help_text
    options = help_text[help_text.index("Options:") :].splitlines()[1:]
    # One line each.
    assert all(line.lstrip().startswith("-") for line in options if line)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["check", "--help"],
        ["check", "x.py", "--strategies", "nope"],
        ["zoo", "--help"],
        ["zoo", "--grid", "2"],
        ["zoo", "--width", "3"],
    ],
)
def test_an_answer_that_needs_no_torch_does_not_load_it(arguments: list[str]):
    code = """\
import sys
from shardproof.cli import main
try:
    main()
finally:
    loaded = "torch" in sys.modules
    print("torch was loaded" if loaded else "no torch")
"""
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.stdout.endswith("no torch\n"), ended.stdout + ended.stderr


def test_python_m_shardproof_is_the_same_command():
    ended = subprocess.run(
        [sys.executable, "-m", "shardproof", "check", "--nope"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "Usage: shardproof check" in ended.stderr
