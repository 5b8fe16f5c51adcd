"""`--junit`, `--annotate` and `--json -`: what `check` and `diff` write for other programs, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import torch.nn.functional as F
from jsonschema import Draft202012Validator
from torch import nn
from typer.testing import CliRunner, Result

import shardproof as sp
from shardproof import cli

EXPERIMENT = """\
import os
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
import shardproof as sp

DATA = TensorDataset(torch.linspace(-1, 1, 64).reshape(16, 4).sin(), torch.arange(16) % 2)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])

def fails(model, batch):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise ValueError("no such\\n::error::batch")
    return loss(model, batch)

def doubled(step):
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    (2 * value).backward()
    step.optimizer.step()
    return value.detach()

def made(**options):
    return dict(model=lambda: nn.Linear(4, 2), data=DATA, optimizer=sgd, batch_size=8, steps=1, **options)

def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

right = sp.Experiment(**made(loss=loss))
wrong = sp.Experiment(**made(loss=loss, train_step=doubled))
crash = sp.Experiment(**made(loss=fails))
"""


def line_of(text: str) -> int:
    return EXPERIMENT.splitlines().index(text) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment's folder, and two recordings in it."""
    made = tmp_path_factory.mktemp("checkout")
    (made / "train.py").write_text(EXPERIMENT)
    for name, rows in (("a", 4), ("b", 2)):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with sp.record(made / name, model, optimizer):
            F.cross_entropy(model(torch.ones(rows, 4)), torch.arange(rows) % 2).backward()
            optimizer.step()
    return made


def run(folder: Path, *arguments: str) -> Result:
    """The command as CI runs it: in the checkout, with a summary."""
    (folder / "summary.md").write_text("")
    environment = {"GITHUB_WORKSPACE": str(folder), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    with contextlib.chdir(folder):
        return CliRunner().invoke(cli.app, arguments, env=environment)


def test_a_divergence_is_written_everywhere_and_points_at_the_step(folder: Path) -> None:
    ended = run(
        folder, "check", "train.py:wrong", "--strategies", "ddp", "--ranks", "2", "--annotate", "--junit", "j.xml"
    )
    assert ended.exit_code == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("::stop-commands::")
    (end,) = [place for place, line in enumerate(lines) if line == f"::{lines[0].removeprefix('::stop-commands::')}::"]
    assert lines[end - 1].startswith("DIVERGES: ddp")
    (annotation,) = lines[end + 1 :]
    assert annotation.startswith(
        f"::error file=train.py,line={line_of('def doubled(step):')},title=shardproof%3A ddp%3A grad-scale"
    )
    root = ET.parse(folder / "j.xml").getroot()
    assert int(root.attrib["failures"]) >= 2
    assert "| ddp | ❌ DIVERGES |" in (folder / "summary.md").read_text()


def test_a_crash_is_an_error_at_the_users_line_in_all_of_them(folder: Path) -> None:
    options = ("--strategies", "ddp", "--ranks", "2", "--annotate", "--junit", "c.xml", "--json", "-")
    ended = run(folder, "check", "train.py:crash", *options)
    assert ended.exit_code == 3, ended.stderr
    written = json.loads(ended.stdout)
    Draft202012Validator(sp.report_schema()).validate(written)
    line = line_of('        raise ValueError("no such\\n::error::batch")')
    stopped = written["stopped"]
    assert (stopped["kind"], stopped["rank"], stopped["line"], stopped["crashed"]) == ("RankFailed", 1, line, True)
    (annotation,) = [line for line in ended.stderr.splitlines() if line.startswith("::error file")]
    assert annotation.startswith(f"::error file=train.py,line={line},title=shardproof%3A rank 1%3A RankFailed in ddp::")
    assert "ValueError: no such%0A::error::batch" in annotation
    (case,) = ET.parse(folder / "c.xml").getroot().iter("testcase")
    assert case[0].tag == "error"
    assert "❌ **RankFailed**" in (folder / "summary.md").read_text()


def test_an_experiment_that_cannot_be_loaded_is_an_error_in_ci_too(folder: Path) -> None:
    arguments = ["check", str(folder / "train.py:nothing"), "--junit", str(folder / "l.xml"), "--json", "-"]
    ended = CliRunner().invoke(cli.app, arguments)
    assert ended.exit_code == 2
    (case,) = ET.parse(folder / "l.xml").getroot().iter("testcase")
    assert case[0].attrib["type"] == "ExperimentError"
    assert json.loads(ended.stdout)["stopped"]["crashed"] is False


def test_json_on_stdout_is_alone_there(folder: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["diff", str(folder / "a"), str(folder / "b"), "--json", "-", "--annotate"])
    assert ended.exit_code == 1
    written = json.loads(ended.stdout)
    assert written["recorded"]
    Draft202012Validator(sp.report_schema()).validate(written)
    assert "DIVERGES: b" in ended.stderr
    # Of a recording nobody knows the code.
    (annotation,) = [line for line in ended.stderr.splitlines() if line.startswith("::error")]
    assert annotation.startswith("::error title=shardproof%3A b%3A ")


def test_a_recording_that_cannot_be_read_is_an_error_in_ci_too(folder: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        cli.app, ["diff", str(folder / "a"), str(tmp_path / "nothing"), "--junit", str(tmp_path / "j.xml")]
    )
    assert ended.exit_code == 2
    (case,) = ET.parse(tmp_path / "j.xml").getroot().iter("testcase")
    assert case[0].attrib["type"] == "TraceError"


def test_a_file_that_cannot_be_written_costs_none_of_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    options = ("--json", "/dev/full", "--junit", str(tmp_path / "j.xml"), "--html", str(tmp_path / "r.html"))
    ended = CliRunner().invoke(cli.app, ["diff", str(folder / "a"), str(folder / "a"), *options, "--annotate"])
    assert ended.exit_code == 2
    (error,) = ended.stderr.splitlines()
    assert error.startswith("error: /dev/full: cannot be written: No space left on device; ")
    assert "the summary of $GITHUB_STEP_SUMMARY cannot be written" in error
    assert "computes the same training as" in ended.stdout
    assert ET.parse(tmp_path / "j.xml").getroot().attrib["failures"] == "0"
    assert (tmp_path / "r.html").exists()


def test_only_json_goes_to_stdout(folder: Path) -> None:
    for option in ("--junit", "--html"):
        ended = CliRunner().invoke(cli.app, ["diff", str(folder / "a"), str(folder / "a"), option, "-"])
        assert (ended.exit_code, ended.stderr) == (
            2,
            f"error: {option} -: only --json can go to standard output; give a path\n",
        )


def test_a_link_beside_a_report_leads_nowhere(folder: Path, tmp_path: Path) -> None:
    """A report is written under a name that nobody knows before: a link that waits for it is never followed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / f".r.json.{os.getpid()}.part").symlink_to(victim)
    assert CliRunner().invoke(cli.app, ["diff", str(folder / "a"), str(folder / "a"), "--json", str(out / "r.json")])
    assert victim.read_text() == "precious"
    assert json.loads((out / "r.json").read_text())["ok"]
