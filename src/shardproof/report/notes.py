"""What a reader should know beside the verdicts: what was not looked at and why, and what the experiment hides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from shardproof.report import spelling
from shardproof.report.data import Report, Run
from shardproof.report.lines import heading, item


def notes(report: Report, width: int) -> Iterator[Text]:
    """Tensors that were not checked, by reason; notes on single runs; warnings about the experiment."""
    reasons = dict.fromkeys(reason for run in report.runs for reason in run.not_checked)
    if reasons:
        yield from heading("not checked")
        for reason in reasons:
            counts = {run.strategy: run.not_checked.get(reason, 0) for run in report.runs}
            yield from item(f"{_how_many(counts)}: {reason or 'no reason was given'}", width)
    remarks = dict.fromkeys(note for run in report.runs for note in run.notes)
    if remarks:
        yield from heading("notes")
        for remark in remarks:
            # Of two recordings each remark says itself whose it is.
            yield from item(remark if report.recorded else f"{_strategies(report.runs, remark)}: {remark}", width)
    if report.warnings:
        what = "these recordings do not show" if report.recorded else "this experiment cannot show"
        yield from heading(f"warnings: what {what}", style="bold yellow")
        for warning in report.warnings:
            yield from item(warning, width)


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
