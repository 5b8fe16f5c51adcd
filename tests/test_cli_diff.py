"""`shardproof diff` as a command: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner, Result

import shardproof as sp
from shardproof import cli


def record(path: Path, *, wrong: bool = False, steps: int = 2) -> Path:
    """Two steps of somebody's loop; `wrong` forgets what the loss is divided by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.linspace(-1, 1, 32 * steps).reshape(-1, 4).sin()
    with sp.record(path, model, optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            for part in inputs[8 * step : 8 * step + 8].chunk(2):
                loss = F.cross_entropy(model(part), torch.arange(4) % 2)
                (loss if wrong else loss / 2).backward()
            optimizer.step()
    return path


def diff(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(cli.app, ["diff", *map(str, arguments)], env={"COLUMNS": str(columns)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a folder that is deep down") / "runs"
    record(folder / "old")
    record(folder / "again")
    record(folder / "wrong", wrong=True)
    return folder


def test_two_runs_that_agree_end_with_0(runs: Path) -> None:
    done = diff(runs / "old", runs / "again")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "parity: again computes the same training as old"


def test_two_runs_that_diverge_end_with_1_and_the_cause(runs: Path) -> None:
    done = diff(runs / "old", runs / "wrong")
    assert done.exit_code == 1, done.output
    assert "cause      grad-scale" in done.output
    assert done.output.splitlines()[-1] == "DIVERGES: wrong, first at step 0, gradient of 2.bias"


def test_quiet_prints_the_last_line_alone(runs: Path) -> None:
    assert diff("-q", runs / "old", runs / "again").output == "parity: again computes the same training as old\n"


def test_recordings_are_called_by_what_tells_them_apart(runs: Path) -> None:
    output = diff(runs / "old", runs / "wrong").output
    # The whole path once, in the header.
    assert output.count("runs/wrong") == output.count("runs/old") == 1
    assert "want (old)" in output


@pytest.mark.parametrize("columns", [80, 120])
def test_a_report_fits_the_terminal(runs: Path, columns: int) -> None:
    output = diff(runs / "old", runs / "wrong", columns=columns).output
    assert max(map(len, output.splitlines())) <= columns


def test_the_report_is_written_as_json_and_as_a_page(runs: Path, tmp_path: Path) -> None:
    done = diff(runs / "old", runs / "wrong", "--json", tmp_path / "d.json", "--html", tmp_path / "d.html")
    assert done.exit_code == 1
    report = json.loads((tmp_path / "d.json").read_text())
    assert (report["recorded"], report["estimated"], report["ok"]) == (True, True, False)
    assert (report["reference"], report["experiment"]) == (str(runs / "old"), str(runs / "wrong"))
    assert report["first"]["cause"] == "grad-scale"
    assert "grad-scale" in (tmp_path / "d.html").read_text()


def test_nothing_in_common_is_no_success(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed"
    path.mkdir()
    for file in (runs / "old").iterdir():
        content = file.read_bytes()
        (path / file.name).write_bytes(
            content if file.suffix == ".safetensors" else content.replace(b'"name":"', b'"name":"q')
        )
    done = diff(runs / "old", path)
    assert done.exit_code == 1
    assert "no partner in old" in done.output
    assert done.output.splitlines()[-1].startswith("UNPROVEN")


WRONG: dict[str, Callable[[Path], tuple[str | Path, ...]]] = {
    "does not exist": lambda runs: (runs / "old", runs / "none"),
    "holds no recording": lambda runs: (runs, runs / "old"),
    "exclude each other": lambda runs: (runs / "old", runs / "old", "-q", "-v"),
    "write NAME=NAME": lambda runs: (runs / "old", runs / "old", "--map", "x"),
    "--layout-b tp=2 is 2 ranks": lambda runs: (runs / "old", runs / "old", "--layout-b", "tp=2"),
    "--layout-a tp=2 is 2 ranks": lambda runs: (runs / "old", runs / "old", "--layout-a", "tp=2"),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_use_ends_with_2_and_says_the_way_out(runs: Path, said: str) -> None:
    done = diff(*WRONG[said](runs))
    assert done.exit_code == 2
    assert said in done.output
    assert done.output.startswith("error: ")


def test_an_error_does_not_steer_a_terminal(runs: Path) -> None:
    done = diff(runs / "old", runs / "\x1b[31mnone")
    assert done.exit_code == 2
    assert "\x1b" not in done.output
    assert "\\x1b[31mnone does not exist" in done.output


def test_the_function_can_be_called_after_the_command_has_run(runs: Path) -> None:
    # Both live in a module of the same name, which Python binds to the package when it is first imported.
    assert diff(runs / "old", runs / "again").exit_code == 0
    assert sp.diff(runs / "old", runs / "again").ok
