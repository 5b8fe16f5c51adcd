from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from shardproof.errors import UsageError
from shardproof.report import html
from shardproof.report.data import Report

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}<!-- & \" ' \u2028 \x1b[2J"


def of_the_script(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    read: dict[str, object] = json.loads(found[1])
    return read


def test_the_page_stands_alone_and_holds_the_report(divergence: Report, tmp_path: Path):
    divergence.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().startswith("<!DOCTYPE html>")
    # Before any script runs, the essential part is there.
    essential = page[: page.index('id="data"')]
    for said in ("grad-not-summed", "DIVERGES: tp_fsdp", "all-reduce the gradients", "0-3,7 of 8"):
        assert said in essential
    # The name of SVG's elements is no address that is asked for.
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<(script|link|img|iframe)[^>]* src=", page)


def test_only_the_pages_own_style_and_script_may_run(divergence: Report):
    page = html.page(divergence)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert policy[1].count("'sha256-") == 2
    assert "unsafe" not in policy[1]


def test_names_from_user_code_are_escaped(divergence: Report):
    tensor = replace(divergence.runs[0].comparisons[0], name=HOSTILE)
    run = replace(divergence.runs[0], strategy=HOSTILE, comparisons=(tensor,), notes=(HOSTILE,))
    page = html.page(replace(divergence, experiment=HOSTILE, warnings=(HOSTILE,), runs=(run, *divergence.runs[1:])))
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page
    names = of_the_script(page)["names"]
    assert isinstance(names, list)
    assert any("</script><img src=x" in name for name in names)


def test_numbers_that_json_does_not_know_are_texts(divergence: Report):
    runs = of_the_script(html.page(divergence))["runs"]
    assert isinstance(runs, list)
    poisoned = runs[3]
    assert poisoned["error"]["0"][0] == "nan"


def test_a_missing_folder_is_wrong_use(parity: Report, tmp_path: Path):
    with pytest.raises(UsageError, match="there is no folder"):
        parity.to_html(tmp_path / "missing" / "report.html")
