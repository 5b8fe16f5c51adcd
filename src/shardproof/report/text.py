"""The report for a person: plain text for logs and failed tests, the same lines in colour for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from shardproof.diagnose.finding import Finding
from shardproof.report import finding, spelling
from shardproof.report.data import Report
from shardproof.report.lines import heading, wrapped
from shardproof.report.notes import notes
from shardproof.report.proofs import proofs
from shardproof.report.table import table, word
from shardproof.report.tensors import tensors

WIDTH = 80
"""Of plain text: what logs and test reports show without wrapping."""

NARROWEST = 60
"""Below this the terminal may wrap: a table of verdicts needs it."""


def plain(report: Report, width: int = WIDTH, *, verbose: bool = False) -> str:
    """The report without colour, in lines of at most `width` characters."""
    return "\n".join(line.plain for line in view(report, width, verbose=verbose))


def render(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print the report on `console`, as wide as that is; `verbose` adds every tensor with its verdict."""
    for line in view(report, console.width, verbose=verbose):
        # No markup and no highlighting: names and evidence are shown as they are.
        console.print(line, soft_wrap=True, highlight=False)


def view(report: Report, width: int, *, verbose: bool = False) -> Iterator[Text]:
    """The lines of the report: what was checked, a row a strategy, notes, first divergences, and the conclusion."""
    yield from map(_printable, _lines(report, max(width, NARROWEST), verbose=verbose))


def _printable(line: Text) -> Text:
    """A name may hold anything, even what steers a terminal."""
    return line if line.plain.isprintable() else Text(spelling.printable(line.plain), line.style)


def _lines(report: Report, width: int, *, verbose: bool) -> Iterator[Text]:
    yield from _header(report, width)
    yield Text()
    if report.runs:
        yield from table(report, width)
    if verbose:
        for run in report.runs:
            yield from tensors(run, width)
    yield from notes(report, width)
    yield from proofs(report.proofs, width, verbose=verbose)
    yield from _divergences(report, width, verbose=verbose)
    yield Text()
    yield conclusion(report, width)


def conclusion(report: Report, width: int = WIDTH) -> Text:
    """The last line: parity, or the first divergence."""
    return _printable(_conclusion(report, width))


def _conclusion(report: Report, width: int) -> Text:
    diverging = [(run, found) for run in report.runs if (found := finding.first(run)) is not None]
    if diverging:
        return Text(_diverges([run.strategy for run, _ in diverging], diverging[0][1], width), "bold red")
    if report.invariants:
        return _consistent(report)
    unproven = [run.strategy for run in report.runs if word(run)[0] != "parity"]
    if unproven or not report.runs:
        who = ", ".join(unproven) or "any run"
        return Text(f"UNPROVEN: no gradient or updated weight of {who} could be compared", "bold yellow")
    if len(report.runs) == 1:
        who = f"{report.runs[0].strategy} computes"
    else:
        who = f"{spelling.count(len(report.runs), 'strategy')} compute"
    # Two recordings are all that is known of two runs, and one of them may end early.
    far = ", as far as the recordings can be read" if report.recorded and report.warnings else ""
    return Text(f"parity{far}: {who} the same training as {report.trusted}", "bold green")


def _consistent(report: Report) -> Text:
    without = [run.strategy for run in report.runs if word(run)[0] != "consistent"]
    if len(without) == len(report.runs):
        return Text(f"NO REPLICAS: every rank of {', '.join(without)} holds a part of its own", "bold yellow")
    agree = len(report.runs) - len(without)
    who = spelling.count(agree, "strategy")
    rest = f"; {', '.join(without)} {'has' if len(without) == 1 else 'have'} none" if without else ""
    return Text(f"consistent: the replicas of {who} hold the same bits{rest}", "bold green")


def _diverges(strategies: list[str], found: Finding, width: int) -> str:
    """One line, whatever has to be left out for it: the rest stands above."""
    first, others = strategies[0], len(strategies) - 1
    at = f"first {'at ' if found.step >= 0 else ''}{spelling.step(found.step)}, "
    names = [", ".join(strategies), f"{first} and {others} more" if others else first, first]
    for name in names:
        lead = f"DIVERGES: {name}, {at}"
        line = lead + spelling.tensor(found.stage, found.where, room=width - len(lead))
        if len(line) <= width:
            return line
    return f"DIVERGES: {first}, {at}{found.stage}"


def _header(report: Report, width: int) -> Iterator[Text]:
    yield from (Text(line, "bold") for line in wrapped(f"shardproof: {report.experiment}", width))
    yield from (Text(line) for line in wrapped(setting(report), width))


def setting(report: Report) -> str:
    """`against single, float64, 4 ranks, 3 steps, cpu, 3.1 s`."""
    steps = f"{spelling.count(report.steps, 'step')}{' in common' if report.recorded else ''}"
    sizes = f"{spelling.count(report.ranks, 'rank')}, {steps}, {report.device}"
    time = f", {spelling.duration(report.time_s)}" if report.time_s else ""
    against = "replicas against each other" if report.invariants else f"against {report.reference}"
    return f"{against}, {report.dtype}, {sizes}{time}"


def _divergences(report: Report, width: int, *, verbose: bool) -> Iterator[Text]:
    diverging = [(run, found) for run in report.runs if (found := finding.first(run)) is not None]
    in_full = diverging if verbose else diverging[:1]
    for run, found in in_full:
        yield from finding.full(run, found, report.trusted, width)
    others = diverging[len(in_full) :]
    if others:
        yield from heading("the other runs that diverge, where each does so first")
        for run, found in others:
            yield from finding.brief(run, found, width)
