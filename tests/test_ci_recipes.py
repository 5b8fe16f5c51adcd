"""The recipes of docs/ci.md: YAML that loads, shell that parses, and commands that write what is then uploaded."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shardproof import cli

ROOT = Path(__file__).resolve().parents[1]
GITHUB, GITLAB = (
    yaml.safe_load(block)
    for block in re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/ci.md").read_text(), re.MULTILINE | re.DOTALL)
)


def scripts() -> Iterator[str]:
    """Everything that a recipe hands to a shell."""
    yield from (step["run"] for step in GITHUB["jobs"]["parity"]["steps"] if "run" in step)
    yield from (*GITLAB["parity"]["before_script"], *GITLAB["parity"]["script"])


def checks() -> list[list[str]]:
    joined = (script.replace("\\\n", " ") for script in scripts())
    return [shlex.split(line) for script in joined for line in script.splitlines() if line.startswith("shardproof")]


def test_every_shell_line_parses() -> None:
    for script in scripts():
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0, script


def test_recipes_install_what_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {name for script in scripts() for name in re.findall(r"-e '\.\[(\w+)\]'", script)}
    assert wanted <= extras.keys()
    assert wanted


def test_what_is_uploaded_is_what_the_check_writes() -> None:
    for words in checks():
        options = dict(pairwise(words))
        assert (options["--junit"], options["--json"], options["--html"]) == (
            "parity.xml",
            "parity.json",
            "parity.html",
        )
    steps: dict[str, Any] = {step.get("name", step.get("uses")): step for step in GITHUB["jobs"]["parity"]["steps"]}
    upload = steps["Keep the reports"]
    assert upload["if"] == "${{ !cancelled() }}"
    assert upload["with"]["path"] == "parity.*"
    kept = GITLAB["parity"]["artifacts"]
    assert kept["reports"]["junit"] in kept["paths"]
    assert kept["when"] == "always"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the check of the first recipe has run."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").symlink_to(ROOT / "examples")
    with contextlib.chdir(folder):
        ended = CliRunner().invoke(cli.app, checks()[0][1:], env={"GITHUB_STEP_SUMMARY": str(folder / "summary.md")})
    assert ended.exit_code == 0, ended.output
    return folder


def test_the_check_of_a_recipe_writes_its_reports(checkout: Path) -> None:
    assert {path.name for path in checkout.glob("parity.*")} == {"parity.xml", "parity.json", "parity.html"}
    assert (checkout / "summary.md").read_text().count("✅ parity") == 3


def test_the_step_behind_it_passes_for_a_proof_and_fails_without_one(checkout: Path) -> None:
    (step,) = (s["run"] for s in GITHUB["jobs"]["parity"]["steps"] if s.get("name") == "Nothing unproven")
    words = [sys.executable, *shlex.split(step)[1:]]
    assert subprocess.run(words, cwd=checkout, check=False, capture_output=True).returncode == 0
    written = json.loads((checkout / "parity.json").read_text())
    (checkout / "parity.json").write_text(json.dumps(written | {"proven": False}))
    assert subprocess.run(words, cwd=checkout, check=False, capture_output=True).returncode == 1
