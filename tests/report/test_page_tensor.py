"""One tensor of the page, in a browser: its numbers, who holds it, its values, where it differs, what was tried."""

from __future__ import annotations

import pytest
from browser import Page


@pytest.fixture
def tensor(page: Page) -> Page:
    page.click("[data-open]")
    return page


def test_its_verdict_and_cause_are_told_in_the_words_of_the_report(tensor: Page):
    said = tensor.text("#detail")
    for words in (
        "gradient, step 0",
        "different: 4e+14 floors",
        "0.0123, where rounding moves 3.1e-17",
        "tp: replicated, dp_shard: slices of dim 0",
        "grad-not-summed over tp, factor 0.5",
        "another rank's slice: no, 4.1e+14 floors left",
        "all-reduce the gradients of the norms over tp after backward",
    ):
        assert words in said


def test_a_rank_on_the_mesh_shows_its_part(tensor: Page):
    assert tensor.text(".mesh").split()[:4] == ["tp", "0", "tp", "1"]
    tensor.click(".mesh button[aria-label^='rank 1']")
    faded = tensor.js("return [...document.querySelectorAll('.held')].map((one) => one.classList.contains('faded'))")
    assert faded == [True, False]
    words = tensor.js("return document.querySelector('.holders svg').getAttribute('aria-label')")
    assert words.endswith("0,2,4,6; 1,3,5,7")


def test_values_stand_side_by_side_and_by_rank(tensor: Page):
    tables = tensor.js("return [...document.querySelectorAll('.side table')].map((one) => one.innerText.split(/\\s+/))")
    got, want, apart = tables
    assert got[:4] == ["got", "0", "0.005", "0.01"]
    assert want[:5] == ["want", "(single)", "0", "0.01", "0.02"]
    assert "-0.005" in apart
    tensor.click(".tabs[aria-label='Whose values'] button:nth-child(2)")
    tables = tensor.js("return [...document.querySelectorAll('.side table')].map((one) => one.innerText.split(/\\s+/))")
    assert tables[0][-1] == "0.07"
    assert set(tables[2][-4:]) == {"0"}


def test_the_heat_map_says_its_scale_and_where_numbers_are_none(tensor: Page):
    assert "0.012" in tensor.text(".heat .scale")
    assert "NaN or infinity" in tensor.text(".heat figcaption")
    classes = tensor.js("return [...document.querySelectorAll('.heat svg rect')].map((one) => one.classList[0])")
    assert {"q0", "q8"} < set(classes)


def test_what_was_not_kept_is_said_with_the_way_to_get_it(page: Page):
    page.type("update", into="#stage")
    page.click("#grid .row.tensor .name")
    assert "Not kept" in page.text("#detail")
    assert "--show RANK" in page.text("#detail")


def test_ranks_are_told_one_by_one(tensor: Page):
    cells = tensor.js("return [...document.querySelectorAll('.ranks .cell')].map((one) => one.title)")
    assert len(cells) == 8
    assert cells[0] == "rank 0: different, 4e+14 floors"
    # Of other ranks than the worst only the order of magnitude is kept.
    assert cells[1].startswith("rank 1: different, about 1e+14")
    assert cells[4] == "rank 4: holds nothing"
    assert cells[5] == "rank 5: equal"
    assert cells[6].startswith("rank 6: rounding")
