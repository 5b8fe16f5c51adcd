"""The report as one self-contained HTML page: the view of the terminal, in its colours."""

from __future__ import annotations

import html
import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from shardproof.report import file, text
from shardproof.report.data import Report

WIDTH = 120
"""Characters of a line: what a browser window shows beside nothing else."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="UTF-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{{stylesheet}}
body {{{{ color: {{foreground}}; background-color: {{background}}; margin: 2em; }}}}
pre {{{{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; line-height: 1.4; }}}}
</style>
</head>
<body>
<pre><code>{{code}}</code></pre>
</body>
</html>
"""
"""Braces are doubled once for the title and once for rich, which fills in the rest."""


def write(report: Report, path: Path) -> None:
    """Write `report` to `path`, in one move. Raises `UsageError` where the folder is missing."""
    file.write(path, page(report))


def page(report: Report) -> str:
    """The whole page. Every text of the report is escaped: names and evidence come from user code."""
    console = Console(file=io.StringIO(), record=True, width=WIDTH, color_system="truecolor", force_terminal=True)
    text.render(report, console)
    verdict = "parity" if report.ok else "DIVERGES"
    title = html.escape(f"shardproof: {report.experiment}: {verdict}").replace("{", "{{").replace("}", "}}")
    return console.export_html(theme=DEFAULT_TERMINAL_THEME, code_format=PAGE.format(title=title))
