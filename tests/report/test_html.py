from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardproof.errors import UsageError
from shardproof.report import html
from shardproof.report.data import Report


def test_the_page_stands_alone_and_holds_the_report(divergence: Report, tmp_path: Path):
    divergence.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "grad-not-summed" in page
    assert "http" not in page
    assert "<script" not in page


def test_names_from_user_code_are_escaped(divergence: Report):
    page = html.page(replace(divergence, experiment="<script>{alert}(1)</script>", warnings=("<b>&",)))
    assert "<script" not in page
    assert "&lt;script&gt;{alert}(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;&amp;" in page


def test_a_missing_folder_is_wrong_use(parity: Report, tmp_path: Path):
    with pytest.raises(UsageError, match="there is no folder"):
        parity.to_html(tmp_path / "missing" / "report.html")
