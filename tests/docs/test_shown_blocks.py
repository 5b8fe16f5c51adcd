"""What README and docs show is run, and what is not run says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from blocks import DOCS, OUTPUT, PAGES, ROOT, Block, blocks, commands
from running import Done, run

FULL = os.environ.get("SHARDPROOF_FULL") == "1"

RUN_ELSEWHERE = "cause"
"""Marked blocks of docs/causes: test_cause_pages.py checks them."""

RECORDINGS = "docs/recording.md"
"""Its first commands make the recordings that other pages look at."""


def read_json(text: str) -> object:
    """One document, or one a line, as recordings have them."""
    return json.loads(text) if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]


READ = {"json": read_json, "yaml": lambda text: list(yaml.safe_load_all(text)), "toml": tomllib.loads}
"""Languages of settings and data -> what reads them: a block must be well formed."""

PROGRAMS = ("shardproof", "pytest", "python", "torchrun", "make")


def runs(block: Block) -> bool:
    return block.mark in ("", "file") or (block.mark == "slow" and FULL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(page):
        if block.mark in ("not run", "slow"):
            assert len(block.said.split()) > 2, f"{block}: give a reason"
            continue
        if block.mark == RUN_ELSEWHERE:
            assert block.page.startswith("docs/causes/"), block
            continue
        assert block.language in ("sh", "python", *READ), f"{block}: {block.language or 'no language'}: is it run?"
        if block.language == "sh":
            for command, _ in commands(block):
                word = next(word for word in command.split() if "=" not in word)
                assert word in PROGRAMS, f"{block}: {word} is not run here; say why above the block"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the recordings of docs/recording.md are made."""
    folder = tmp_path_factory.mktemp("recorded")
    of_page = [block for block in blocks(RECORDINGS) if runs(block)]
    (program,) = [block for block in of_page if block.mark == "file"]
    (folder / program.said).write_text(program.text)
    for command, _ in commands(next(block for block in of_page if block.language == "sh")):
        done = run(command, folder)
        assert done.code == 0, done.errors
    return folder


_DONE: dict[str, Done] = {}
"""A command that uses no file of its page, but an example, say, is run once for all pages."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(runs(block) for block in blocks(page))])
def test_what_a_page_shows_runs_and_prints_what_it_shows(
    page: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    own_files = False
    if re.search(r"shardproof (show|diff) runs/", (ROOT / page).read_text()) and page != RECORDINGS:
        made = request.getfixturevalue("recordings")
        shutil.copytree(made / "runs", tmp_path / "runs")
    for number, block in enumerate(b for b in blocks(page) if runs(b)):
        if block.mark == "file":
            own_files = True
            (tmp_path / block.said).write_text(block.text)
        elif block.language == "python":
            # A program of its own, as a reader would copy it.
            folder = tmp_path / f"block-{number}"
            folder.mkdir()
            (folder / "shown.py").write_text(block.text)
            judge(block, run("python shown.py", folder), 0)
        elif block.language == "sh":
            for command, code in commands(block):
                last = command == commands(block)[-1][0]
                shared = not own_files or " examples/" in command
                judge(block, command_of(command, tmp_path, shared=shared), code, shows=last)
        else:
            READ[block.language](block.text)


def command_of(command: str, folder: Path, *, shared: bool) -> Done:
    if command.startswith("make "):
        # .ci/run makes what takes minutes; that the target exists and its steps can be listed is seen here.
        steps = [*command.split("#")[0].split(), "-n"]
        done = subprocess.run(steps, cwd=ROOT, capture_output=True, text=True, check=False)
        return Done(code=done.returncode, output="", errors=done.stderr)
    if not shared or "runs/" in command:
        return run(command, folder)
    if command not in _DONE:
        _DONE[command] = run(command, folder)
    return _DONE[command]


def judge(block: Block, done: Done, code: int, *, shows: bool = True) -> None:
    assert done.code == code, f"{block}: exit code {done.code}\n{done.output}{done.errors}"
    if block.output is None or not shows or block.text.startswith("make"):
        return
    printed = done.output or done.errors  # a command that cannot go on prints its error alone
    got = normal(printed)
    at = 0
    for part in re.split(r"^\.\.\.$|\.\.\.$", block.output, flags=re.MULTILINE):
        want = normal(part)
        found = got.find(want, at)
        assert found >= 0, f"{block} shows\n{part}\nand prints\n{printed}"
        at = found + len(want)


NUMBER = re.compile(r"(?<![\w.])[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|inf|nan)(?![\w])|(?<=\s)-(?=\s)")


def normal(text: str) -> str:
    """Without what differs from run to run: times, digits, which tensor is the worst of those that agree."""
    text = re.sub(r"worst: .*", "worst", text)
    text = re.sub(r"\b\d+(\.\d+)? (ms|s|min)\b", "TIME", text)
    return " ".join(NUMBER.sub("N", text).split())


def test_the_reasons_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`pytest -s -k reasons` prints what is not run, and why."""
    left_out = [block for page in PAGES for block in blocks(page) if block.mark in ("not run", "slow")]
    with capsys.disabled():
        if os.environ.get("SHARDPROOF_REASONS"):
            print("", *(f"{block}: {block.mark}: {block.said}" for block in left_out), sep="\n")
    assert len({(block.page, block.line) for block in left_out}) == len(left_out)


def test_an_output_is_found_wrong(tmp_path: Path) -> None:
    shown = Block(page="page", line=1, language="python", text="", output="step 1  loss 0.5\n...\ndone\n")
    judge(shown, Done(code=0, output="start\nstep 1  loss 0.25\nstep 2\ndone\n", errors=""), 0)
    for printed in ("step 1  lost 0.25\ndone\n", "done\nstep 1  loss 0.5\n"):
        with pytest.raises(AssertionError, match="shows"):
            judge(shown, Done(code=0, output=printed, errors=""), 0)
    with pytest.raises(AssertionError, match="exit code 1"):
        judge(shown, Done(code=1, output="", errors=""), 0)


def test_docs_are_found() -> None:
    assert "README.md" in PAGES
    assert len(PAGES) > len(list(DOCS.glob("*.md")))
    assert OUTPUT not in READ
