"""The lists in README and docs are those of the code; tests/docs runs what the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import shardproof

ROOT = Path(__file__).resolve().parents[1]


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
