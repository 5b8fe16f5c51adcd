"""The map of tensors, in a browser: filters, search, keys, clicks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from browser import Page
from shown_names import LONG_NAME, NAMES

from shardproof.report.data import Report

WRONG = "layers.0.attention_norm.weight"

ESCAPE, ENTER, DOWN = "\ue00c", "\ue007", "\ue015"


def active(page: Page) -> str:
    return str(page.js("return document.querySelector('.row.active .name').title"))


def test_every_tensor_has_a_row_in_causal_order(page: Page):
    assert page.text("#count") == "14 tensors of 14"
    groups = page.js("return [...document.querySelectorAll('.row.group')].map((row) => row.textContent)")
    assert groups == [
        "before step 0, initial-state",
        "step 0, batch",
        "step 0, gradient",
        "step 0, optimizer-state",
        "step 0, update",
    ]
    # The reader is not left to colours: each cell has a sign, and words for who cannot see it.
    assert "≠ 4e14" in page.text("#grid")
    assert "not-checked" in page.js("return document.querySelector('#grid .cell.n').textContent")
    assert "zero in the reference" in page.js("return document.querySelector('#grid .cell.n').title")


def test_a_verdict_is_filtered_and_the_count_says_so(page: Page):
    page.click(".chip[data-mark=d]")
    assert page.text("#count") == "2 tensors of 14"
    assert page.rows() == [LONG_NAME, WRONG]
    page.click("#clear")
    assert page.text("#count") == "14 tensors of 14"


@pytest.mark.parametrize(
    ("wanted", "count"), [("norm", 3), ("*.w1.*", 3), ("LAYERS.?.attention*", 3), ("w1.*", 0), ("(root)", 1)]
)
def test_names_are_found_by_text_and_by_glob(page: Page, wanted: str, count: int):
    page.type(wanted, into="#search")
    assert page.text("#count") == f"{count} tensor{'' if count == 1 else 's'} of 14"
    assert len(page.rows()) == count


def test_stage_step_and_strategy_are_chosen(page: Page):
    page.type("gradient", into="#stage")
    assert page.rows() == list(NAMES)
    page.type("tp_fsdp", into="#strategy")
    heads = page.js("return [...document.querySelectorAll('[role=columnheader]')].map((one) => one.textContent)")
    assert heads == ["tensor", "▸ tp_fsdp"]
    page.type("before", into="#step")
    assert page.rows() == []
    assert "No tensor is like that" in page.text("#grid")


def test_a_strategy_opens_into_its_ranks(page: Page):
    page.click(".head [role=columnheader]:nth-child(4) button")
    page.type("gradient", into="#stage")
    cells = page.js("return [...document.querySelectorAll('.row.tensor')][1].querySelectorAll('.cell')[4].title")
    assert cells.startswith("tp_fsdp rank 1: different, about")
    assert page.js("return document.querySelector('.head button[aria-expanded=true]').textContent") == "▾ tp_fsdp"


def test_a_click_on_a_cell_opens_the_tensor_under_that_strategy(page: Page):
    page.type("gradient", into="#stage")
    page.click("#grid .row.tensor .cell:nth-child(3)")
    assert page.text("#detail-title") == NAMES[0]
    assert page.js("return document.querySelector('#detail .tabs [aria-pressed=true]').textContent") == "≈ fsdp"


def test_keys_move_open_search_and_close(page: Page):
    page.click("#grid .row.tensor .name")
    page.type(ESCAPE)
    assert not page.seen("#detail")
    page.type("n")
    assert active(page) == WRONG
    page.type("k")
    assert active(page) == NAMES[0]
    page.type("j")
    page.type(ENTER)
    assert page.text("#detail-title") == WRONG
    page.type(ESCAPE)
    assert page.js("return document.activeElement.id") == "grid"
    page.type("/")
    page.type("*.w1.*")
    page.type(ENTER)
    page.type(DOWN)
    assert page.js("return document.activeElement.id") == "grid"
    assert active(page) == NAMES[2]
    page.type("?")
    assert page.text("#help-title") == "Keys"


def test_letters_that_are_typed_into_the_search_do_nothing_else(page: Page):
    page.type("njk?t/", into="#search")
    assert not page.seen("#help")
    assert page.js("return document.getElementById('search').value") == "njk?t/"


def test_the_address_leads_back_to_the_tensor(page: Page, browser: Page, tmp_path: Path):
    page.click("[data-open]")
    address = page.js("return location.hash")
    browser.open(tmp_path / "report.html", address)
    assert page.text("#detail-title") == WRONG
    assert page.js("return document.querySelector('#detail .tabs [aria-pressed=true]').textContent") == "≠ tp_fsdp"


def test_a_report_without_runs_is_a_page_too(browser: Page, parity: Report, tmp_path: Path):
    replace(parity, runs=()).to_html(tmp_path / "none.html")
    page = browser.open(tmp_path / "none.html")
    assert page.text("#count") == "0 tensors of 0"
    assert page.complaints() == []
