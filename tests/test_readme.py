"""What README and docs show is run: every `shardproof` command, and every Python block."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shardproof
from shardproof import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "make": "sets up an environment; .ci/run runs it",
    "pip": "changes the environment",
    "git": "needs a network",
    "torchrun": "tests/ranks/test_joined_ranks.py starts it; `recordings` starts ranks in its way",
    "python": "benchmarks take minutes; of docs/recording.md `recordings` runs the same",
    ".venv/frameworks/fabric/bin/python": "an environment of its own",
    "env": "the long draw takes minutes; tests/test_no_false_alarm.py takes a short one",
}
"""First word of a command that is not run here -> why."""

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
"""A fenced block, and the output that is shown right below it."""

EXIT_CODE = re.compile(r"#.*\bexit code (\d+)")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A block of a page."""

    page: str
    line: int
    language: str
    text: str
    output: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line of a shell block."""

    words: tuple[str, ...]
    exit_code: int
    output: str
    """What the page shows of it, if it is the last line of its block."""

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks() -> list[Shown]:
    found = []
    for page in PAGES:
        text = page.read_text()
        found += [
            Shown(
                page=str(page.relative_to(ROOT)),
                line=text.count("\n", 0, match.start()) + 1,
                language=match[1],
                text=match[2],
                output=match[3] or "",
            )
            for match in BLOCK.finditer(text)
        ]
    return found


def commands() -> list[Command]:
    found: dict[tuple[str, ...], Command] = {}
    for block in blocks():
        if block.language != "sh":
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        for line in lines:
            words = tuple(shlex.split(line, comments=True))
            code = EXIT_CODE.search(line)
            if words:
                output = block.output if line == lines[-1] else ""
                found[words] = Command(words=words, exit_code=int(code[1]) if code else 0, output=output)
    return list(found.values())


def environment() -> dict[str, str]:
    # Absolute, as the command runs elsewhere; and first, so that it is this shardproof.
    source = str(Path(shardproof.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first block of docs/recording.md records: on one device, on two ranks, and with its mistake."""
    folder = tmp_path_factory.mktemp("recorded")
    text = next(block.text for block in blocks() if block.page == "docs/recording.md" and block.language == "python")
    (folder / "train.py").write_text(text)
    started = [recording(folder, 0, 1, "runs/one")]
    for arguments in (("runs/two",), ("runs/wrong", "--unwrapped")):
        port = free_port()
        started += [recording(folder, rank, 2, *arguments, port=port) for rank in range(2)]
    for process in started:
        assert process.wait(timeout=120) == 0
    # docs/frameworks.md records these in an environment that is not here.
    (folder / "runs" / "four").symlink_to("two")
    return folder / "runs"


def recording(folder: Path, rank: int, ranks: int, *arguments: str, port: int = 0) -> subprocess.Popen[bytes]:
    """One rank of `torchrun train.py`, without its start."""
    told = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=folder,
        env=environment() | {name: str(value) for name, value in told.items()},
        stdin=subprocess.DEVNULL,
    )


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


OF_RECORDINGS = ("show", "diff")
"""Commands that are quick, and run in this process: each on its own would load torch anew."""


@pytest.mark.parametrize(
    "command", [c for c in commands() if c.words[0] == "shardproof" and c.words[1] in OF_RECORDINGS], ids=str
)
def test_a_command_on_recordings_ends_as_it_says(
    command: Command, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recordings.parent)
    done = CliRunner().invoke(cli.app, command.words[1:])
    assert done.exit_code == command.exit_code, done.output
    if command.output:
        assert done.output.splitlines()[-1] == command.output.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [c for c in commands() if c.words[0] == "shardproof" and c.words[1] not in OF_RECORDINGS], ids=str
)
def test_a_command_that_is_shown_ends_as_it_says(command: Command, tmp_path: Path) -> None:
    # Reports are written to where the command runs, which must not be the repository.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = run("-m", *command.words, folder=tmp_path)
    assert done.returncode == command.exit_code, done.stdout + done.stderr
    if command.output:
        assert done.stdout.splitlines()[-1] == command.output.splitlines()[-1]


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_a_python_block_that_is_shown_runs(block: Shown, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(block.text)
    done = run("shown.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_command_is_run_here_or_there_is_a_reason_why_not() -> None:
    assert {command.words[0] for command in commands()} <= {"shardproof", *NOT_RUN}


def test_links_between_pages_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_strategies_that_are_listed_are_those_that_exist() -> None:
    from shardproof.spec.strategies import STRATEGIES

    table = (ROOT / "README.md").read_text().partition("## Strategies")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(STRATEGIES)


def test_the_fields_that_are_listed_are_those_of_an_experiment() -> None:
    table = (ROOT / "docs" / "experiment.md").read_text().partition("## Fields")[2].partition("Patterns are")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(shardproof.Experiment.__dataclass_fields__)


def test_the_fields_that_are_listed_are_those_of_a_training() -> None:
    table = (ROOT / "docs" / "training.md").read_text().partition("| field | default |")[2].partition("## In Python")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(shardproof.Training.__dataclass_fields__)
