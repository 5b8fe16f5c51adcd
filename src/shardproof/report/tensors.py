"""Every tensor of every run with its verdict, in causal order: what `--verbose` prints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.report import spelling
from shardproof.report.data import Run
from shardproof.report.lines import INDENT, columns, heading, labelled, wrapped

STYLES = {Verdict.EQUAL: "green", Verdict.ROUNDING: "green", Verdict.DIFFERENT: "red", Verdict.NOT_CHECKED: "yellow"}


def tensors(run: Run, width: int) -> Iterator[Text]:
    """What `run` really did, and a line for each of its tensors under its step and stage."""
    yield from heading(f"every tensor of {run.strategy}")
    if run.sharded:
        split = ", ".join(f"{spelling.count(n, 'parameter')} over {axis}" for axis, n in run.sharded.items())
        yield from labelled("split", split, width)
    for axes, calls in run.collectives.items():
        yield from labelled("ran", f"over {axes}: " + ", ".join(f"{name} {n}" for name, n in calls.items()), width)
    for (step, stage), group in groupby(run.comparisons, key=lambda c: (c.step, c.stage)):
        yield Text(f"{INDENT}{spelling.step(step)}, {stage}", "bold")
        compared = list(group)
        rows = columns([(c.verdict, _distance(c)) for c in compared], right=frozenset({1}))
        verdict_width, lead_width = max(len(c.verdict) for c in compared), max(map(len, rows))
        for row, comparison in zip(rows, compared, strict=True):
            lead = f"{INDENT * 2}{row:<{lead_width}}  "
            for position, line in enumerate(wrapped(_what(comparison), width - len(lead))):
                text = Text(f"{lead}{line}" if position == 0 else " " * len(lead) + line)
                text.stylize(STYLES[comparison.verdict], len(INDENT) * 2, len(INDENT) * 2 + verdict_width)
                yield text


def _distance(comparison: Comparison) -> str:
    if comparison.verdict in (Verdict.EQUAL, Verdict.NOT_CHECKED):
        return ""
    return spelling.floors(comparison.floors)


def _what(comparison: Comparison) -> str:
    reason = f": {comparison.reason}" if comparison.reason else ""
    return f"{spelling.with_part(comparison.name, comparison.part)}{reason}"
