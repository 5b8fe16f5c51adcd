"""A page for every cause: its wrong code is found under the page's name, its right code has no finding."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields, replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
from blocks import DOCS, ROOT, Block, blocks
from test_shown_blocks import normal

import shardproof as sp
from shardproof.diagnose.finding import CAUSES
from shardproof.zoo.table import BUGS

PAGES = DOCS / "causes"

HEADINGS = [
    "What the numbers look like",
    "Wrong, and right",
    "What a report says",
    "What it is not",
    "What to do",
    "Where it was seen",
]

MADE_AGAIN = ("strategy-not-applied", "grad-not-reduced")
"""Pages whose report is compared with a new one here; `python benchmarks/cause_reports.py` makes all of them."""

PUT_IN = [block for cause in CAUSES for block in blocks(f"docs/causes/{cause}.md") if block.mark == "cause"]


@cache
def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_cause_has_a_page_and_every_page_a_cause() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(CAUSES)
    index = (DOCS / "causes.md").read_text()
    assert re.findall(r"^\| \[`([\w-]+)`\]\(causes/\1\.md\)", index, re.MULTILINE) == list(CAUSES)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_page_says_everything_in_the_same_order(cause: str) -> None:
    text = (PAGES / f"{cause}.md").read_text()
    assert text.startswith(f"# {cause}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    if cause == "unexplained":
        headings[1] = HEADINGS[1]  # nobody can write what is not known
    assert headings == HEADINGS


@pytest.mark.parametrize("cause", CAUSES)
def test_a_page_lists_the_zoos_entries_and_their_threads(cause: str) -> None:
    made = module("benchmarks/cause_reports")
    text = (PAGES / f"{cause}.md").read_text()
    rows = list(made.threads([bug for bug in BUGS if bug.cause == cause]))
    assert "\n".join(rows) in text, "python benchmarks/cause_reports.py writes this table"


@pytest.mark.parametrize("cause", CAUSES)
def test_the_report_that_a_page_shows_is_of_its_cause(cause: str) -> None:
    text = (PAGES / f"{cause}.md").read_text()
    entry = re.search(r"cause_reports\.py of (\w+) -->", text)
    assert entry is not None
    (bug,) = [bug for bug in BUGS if bug.name == entry[1]]
    (shown,) = [block for block in blocks(f"docs/causes/{cause}.md") if block.language == "text"]
    found = dict(re.findall(r"^  (cause|stage|where) +(.*)$", shown.text, re.MULTILINE))
    assert found["cause"] == cause
    assert found["stage"].split(",")[0] in bug.stages
    assert cause in (bug.cause, "unexplained")


@pytest.mark.parametrize("cause", MADE_AGAIN)
def test_the_report_that_a_page_shows_is_what_a_check_prints(cause: str) -> None:
    made = module("benchmarks/cause_reports")
    text = (PAGES / f"{cause}.md").read_text()
    (bug,) = [bug for bug in BUGS if bug.name == made.REPORT.search(text)[2]]
    (shown,) = [block for block in blocks(f"docs/causes/{cause}.md") if block.language == "text"]
    assert normal(shown.text) == normal("\n".join(made.report(bug)))


@pytest.mark.parametrize("block", PUT_IN, ids=lambda block: f"{block} {block.said}")
def test_code_that_is_put_into_an_experiment_is_found_or_passes(block: Block) -> None:
    want, layout = block.said.split()
    report = sp.check(replace(module("examples/small").experiment, **fields_of(block)), (layout,), 4)
    if want != "parity":
        assert block.page == f"docs/causes/{want}.md"
        assert report.first is not None
        assert report.first.cause == want, report
    else:
        assert report.ok, report
        assert report.first is None


def fields_of(block: Block) -> dict[str, Any]:
    """The fields of an experiment that the code of a block defines."""
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    return {field.name: names[field.name] for field in fields(sp.Experiment) if field.name in names}


def test_most_causes_have_code_that_is_put_in() -> None:
    wrong = [block.said.split()[0] for block in PUT_IN if not block.said.startswith("parity")]
    assert len(wrong) == len(set(wrong)) >= 15
    assert len(PUT_IN) == 2 * len(wrong)
