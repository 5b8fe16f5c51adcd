"""The report as one self-contained page: no network, nothing executed but the page's own script."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from shardproof.report import file
from shardproof.report.data import Report
from shardproof.report.grid import grid
from shardproof.report.summary import summary

FOLDER = "page"
"""Beside this file: the template, the style sheet and the parts of the script."""

SCRIPTS = ("model", "filter", "map", "pictures", "detail", "start")
"""In the order in which they build on each other."""


def write(report: Report, path: Path) -> None:
    """Write `report` to `path`, in one move. Raises `UsageError` where the folder is missing."""
    file.write(path, page(report))


def page(report: Report) -> str:
    """The whole page. Every text of the report is escaped: names and evidence come from user code."""
    # Compiled anew each time: a report is written once in a process.
    environment = Environment(
        loader=PackageLoader("shardproof.report", FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # One line, without the blanks that nobody reads. `tojson` also escapes what would end the script element.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    style, script = _own("page.css"), _script()
    return environment.get_template("page.html").render(
        summary=summary(report),
        grid=grid(report),
        style=style,
        script=script,
        allowed={"style": _hash(style), "script": _hash(script)},
    )


def _own(name: str) -> str:
    return resources.files("shardproof.report").joinpath(FOLDER, name).read_text(encoding="utf-8")


def _script() -> str:
    """All parts in one scope of their own."""
    parts = "\n".join(_own(f"{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();'


def _hash(text: str) -> str:
    """What the page's security policy knows the only allowed style and script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
