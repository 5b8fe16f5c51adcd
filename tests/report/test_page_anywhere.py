"""The page on any screen, for anybody, with any names, of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from browser import Page

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.report.data import Report

HOSTILE = '</script><img src=x onerror="document.title=\'owned\'">{{7*7}}<!--" onfocus=alert(1) \u2028'
MANY = 20_000
STRATEGIES = 5


def test_nothing_is_wider_than_a_small_telephone(browser: Page, page: Page, tmp_path: Path):
    page = browser.open(tmp_path / "report.html", width=400, height=800)
    for _ in range(2):
        assert page.js("return document.documentElement.scrollWidth") == 400
        page.js("document.querySelector('[data-open]').click()")
        page.settled()
    box = page.js("const at = document.getElementById('detail').getBoundingClientRect(); return [at.left, at.width]")
    assert box == [0, 400]
    assert page.js("return document.getElementById('detail').scrollWidth") <= 400


def test_light_and_dark_follow_the_system_until_the_reader_chooses(browser: Page, page: Page, tmp_path: Path):
    def paper() -> str:
        return str(page.js("return getComputedStyle(document.body).backgroundColor"))

    light = paper()
    browser.open(tmp_path / "report.html", dark=True)
    dark = paper()
    assert light != dark
    page.click("#theme")
    assert paper() == light
    page.click("#theme")
    assert paper() == dark


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_who_cannot_see_it_can_use_it(browser: Page, page: Page, tmp_path: Path, dark: bool):
    axe = pytest.importorskip("axe_core_python.selenium", reason="accessibility is checked by axe-core-python")
    browser.open(tmp_path / "report.html", dark=dark)
    page.click(".head [role=columnheader]:nth-child(4) button")
    page.click("[data-open]")
    found = axe.Axe().run(page.driver)["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found] == []


def test_nobody_complains_in_the_console(page: Page):
    page.click("[data-open]")
    page.type("norm", into="#search")
    assert page.complaints() == []


def test_hostile_names_do_nothing(browser: Page, pictured: Report, tmp_path: Path):
    bad = pictured.runs[2]
    named = tuple(replace(c, name=HOSTILE + c.name, part=HOSTILE, reason=HOSTILE) for c in bad.comparisons)
    found = replace(bad.findings[0], where=HOSTILE, evidence=HOSTILE, fix=HOSTILE, comparison=named[-1])
    kept = tuple(replace(one, key=named[-1].key) for one in bad.pictures)
    run = replace(bad, strategy=HOSTILE, comparisons=named, findings=(found,), pictures=kept, notes=(HOSTILE,))
    replace(pictured, experiment=HOSTILE, reference=HOSTILE, runs=(run,)).to_html(tmp_path / "hostile.html")
    page = browser.open(tmp_path / "hostile.html")
    page.click("[data-open]")
    assert page.js("return document.title") != "owned"
    assert page.js("return document.querySelectorAll('img, iframe, object').length") == 0
    assert page.js("return [...document.querySelectorAll('*')].every((one) => !one.hasAttribute('onerror'))")
    assert HOSTILE.split("\u2028")[0] in page.js("return document.querySelector('#detail-title').textContent")
    assert page.complaints() == []


def test_the_essential_part_needs_no_script(browser: Page, pictured: Report, tmp_path: Path):
    pictured.to_html(tmp_path / "report.html")
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get((tmp_path / "report.html").resolve().as_uri())
        said = browser.text("main")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "DIVERGES" in said
    assert "grad-not-summed" in said
    assert "needs JavaScript" in said


def many(parity: Report) -> Report:
    stages = ("forward", "gradient", "optimizer-state", "update")
    keys = [
        (step, stage, f"model.layers.{number // 10}.block.{number % 10}.projection.weight")
        for step in range(5)
        for stage in stages
        for number in range(MANY // 20)
    ]
    tensors = tuple(
        Comparison(
            step=step,
            stage=stage,
            name=name,
            verdict=Verdict.DIFFERENT if number % 997 == 996 else Verdict.ROUNDING,
            error=1e-16 * (number % 89 + 1) * (1e9 if number % 997 == 996 else 1),
            floor=1.1e-16,
            shape=(1024, 1024),
            layout="dp_shard: slices of dim 0, tp: slices of dim 1",
            ranks=(number % 8,) if number % 997 == 996 else (),
            errors=tuple(1e-16 * (number % 7 + rank) for rank in range(8)),
        )
        for number, (step, stage, name) in enumerate(keys)
    )
    run = replace(parity.runs[2], comparisons=tensors)
    return replace(parity, runs=tuple(replace(run, strategy=f"tp_fsdp{n}") for n in range(STRATEGIES)))


def test_twenty_thousand_tensors_are_as_quick_as_twenty(browser: Page, parity: Report, tmp_path: Path):
    path = tmp_path / "many.html"
    many(parity).to_html(path)
    # A hundred bytes for each tensor and strategy.
    assert path.stat().st_size < 100 * MANY * STRATEGIES
    page = browser.open(path)
    assert page.text("#count") == "20000 tensors of 20000"
    assert len(page.rows()) < 60
    page.js("document.getElementById('grid').scrollTop = 1e9")
    page.settled()
    assert page.rows()[-1] == "model.layers.99.block.9.projection.weight"
    page.type("*.layers.42.*.7.*", into="#search")
    assert page.text("#count") == "20 tensors of 20000"
    page.js("document.getElementById('clear').click()")
    page.settled()
    page.click(".chip[data-mark=d]")
    assert page.text("#count") == "20 tensors of 20000"
    assert page.complaints() == []
