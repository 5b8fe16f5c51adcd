"""What a reader should know beside the verdicts: what was not looked at and why, and what the experiment hides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from shardproof.report import spelling
from shardproof.report.data import Report, Run
from shardproof.report.lines import heading, item


def notes(report: Report, width: int) -> Iterator[Text]:
    """Tensors that were not checked, by reason; notes on single runs; warnings about the experiment."""
    for title, said, style in listed(report):
        yield from heading(title, style=style)
        for one in said:
            yield from item(one, width)


def listed(report: Report) -> Iterator[tuple[str, list[str], str]]:
    """(heading, its items, its style) of whatever there is to say."""
    reasons = dict.fromkeys(reason for run in report.runs for reason in run.not_checked)
    if reasons:
        yield "not checked", [_unchecked(report, reason) for reason in reasons], "bold"
    remarks = dict.fromkeys(note for run in report.runs for note in run.notes)
    if remarks:
        # Of two recordings each remark says itself whose it is.
        whose = "" if report.recorded else "{}: "
        yield "notes", [whose.format(_strategies(report.runs, one)) + one for one in remarks], "bold"
    if report.warnings:
        what = "these recordings do not show" if report.recorded else "this experiment cannot show"
        yield f"warnings: what {what}", list(report.warnings), "bold yellow"


def _unchecked(report: Report, reason: str) -> str:
    counts = {run.strategy: run.not_checked.get(reason, 0) for run in report.runs}
    return f"{_how_many(counts)}: {reason or 'no reason was given'}"


def _how_many(counts: dict[str, int]) -> str:
    """`3 tensors of every run`, or the runs with their numbers."""
    with_any = {strategy: n for strategy, n in counts.items() if n}
    if len(set(counts.values())) == 1:
        whose = "every run" if len(counts) > 1 else next(iter(counts))
        return f"{spelling.count(next(iter(counts.values())), 'tensor')} of {whose}"
    if len(set(with_any.values())) == 1:
        return f"{spelling.count(next(iter(with_any.values())), 'tensor')} of {', '.join(with_any)}"
    return "tensors of " + ", ".join(f"{strategy} ({n})" for strategy, n in with_any.items())


def _strategies(runs: Sequence[Run], remark: str) -> str:
    return ", ".join(run.strategy for run in runs if remark in run.notes)
