"""The report as Markdown, for the summary of a CI job: verdicts, first divergences, and what was not checked."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shardproof.compare.verdict import Verdict
from shardproof.report import finding, spelling, text
from shardproof.report.data import Report, Run
from shardproof.report.table import word

MOST = 10
"""Divergences, and lines of each list."""

LONGEST = 1000
"""Characters of one text. GitHub takes a mebibyte a step, and shows nothing of a longer summary."""

_STEERS = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~@:&^$=])")
"""What Markdown, its tables and GitHub's links, mentions and formulas may be made of."""

_MARKS = {"parity": "✅", "consistent": "✅", "DIVERGES": "❌"}


def summary(report: Report) -> str:
    """The whole summary, one section of a larger page."""
    return "\n".join([*_lines(report), "", ""])


def escaped(words: str) -> str:
    """A text that is shown as it is: no markup in it, no link, no line break."""
    line = spelling.printable(" ".join(words.split()))
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
    return _STEERS.sub(r"\\\1", line)


def _lines(report: Report) -> Iterator[str]:
    yield f"### shardproof: {escaped(report.experiment)}"
    yield ""
    if report.stopped is not None:
        first, *_ = report.stopped.message.strip().splitlines() or [""]
        yield f"❌ **{escaped(report.stopped.kind)}**: {escaped(first)}"
        yield ""
    if not report.runs:
        return
    yield escaped(text.conclusion(report, LONGEST).plain)
    yield ""
    yield "| strategy | verdict | " + " | ".join(map(str, Verdict)) + " | time |"
    yield "| --- | --- |" + " ---: |" * (len(Verdict) + 1)
    yield from map(_row, report.runs)
    for run in report.runs[:MOST]:
        yield from _divergence(run)
    said = [f"{n} of {run.strategy} not checked: {why}" for run in report.runs for why, n in run.not_checked.items()]
    said += [f"{run.strategy}: {note}" for run in report.runs for note in run.notes]
    said += [f"warning: {warning}" for warning in report.warnings]
    said += [
        f"{proof.strategy}: caught {proof.caught} of {spelling.count(len(proof.planted), 'planted fault')}"
        for proof in report.proofs
    ]
    if said:
        yield ""
        yield from (f"- {escaped(line)}" for line in dict.fromkeys(said[:MOST]))
        if len(said) > MOST:
            yield f"- and {len(said) - MOST} more"


def _row(run: Run) -> str:
    verdict, _ = word(run)
    cells = [escaped(run.strategy), f"{_MARKS.get(verdict, '⚠️')} {verdict}"]
    cells += [str(number or "\\-") for number in run.verdicts.values()]
    return f"| {' | '.join([*cells, escaped(spelling.duration(run.time_s))])} |"


def _divergence(run: Run) -> Iterator[str]:
    found = finding.first(run)
    if found is None:
        return
    yield ""
    yield f"**{escaped(run.strategy)}** first diverges at {escaped(finding.place(found))}"
    yield ""
    ranks = spelling.ranks(found.ranks) or "not known"
    for label, words in (
        ("cause", finding.why(found)),
        ("ranks", ranks),
        ("evidence", found.evidence),
        ("fix", found.fix),
    ):
        if words:
            yield f"- {label}: {escaped(words)}"
