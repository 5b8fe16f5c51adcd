"""What the page says without any script: the conclusion, first divergences, strategies and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardproof.compare.verdict import Comparison
from shardproof.diagnose.finding import Finding
from shardproof.report import finding as findings
from shardproof.report import spelling
from shardproof.report.data import Report, Run
from shardproof.report.notes import listed
from shardproof.report.proofs import proofs
from shardproof.report.table import legend, word, worst
from shardproof.report.text import conclusion, setting

WIDTH = 100
"""Characters of a line of what is shown as plain text."""

LONG = 10_000
"""Characters that no conclusion has: nothing is left out of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first divergence of a run, in the words of the text report."""

    strategy: str
    run: int
    """Its number among the report's runs."""
    cause: str
    place: str
    facts: tuple[tuple[str, str], ...]
    """(label, text) pairs."""
    values: tuple[tuple[str, ...], ...]
    """Rows of values side by side, heads first; empty where there are none."""
    evidence: str
    tried: tuple[str, ...]
    fix: str
    later: tuple[str, ...]
    key: tuple[int, str, str, str] | None
    """Of the tensor, as the map knows it."""


def summary(report: Report) -> Mapping[str, object]:
    """Everything that the template asks for beside the map."""
    diverging = [_divergence(report, number, run) for number, run in enumerate(report.runs)]
    return {
        "experiment": spelling.printable(report.experiment),
        "conclusion": conclusion(report, LONG).plain,
        "mood": _mood(report),
        "setting": spelling.printable(setting(report)),
        "trusted": spelling.printable(report.trusted),
        "recorded": report.recorded,
        "divergences": [one for one in diverging if one is not None],
        "runs": [_row(run) for run in report.runs],
        "legend": legend(report),
        "notes": [(title, [spelling.printable(one) for one in said]) for title, said, _ in listed(report)],
        "proofs": "\n".join(spelling.printable(line.plain) for line in proofs(report.proofs, WIDTH, verbose=True)),
    }


def _mood(report: Report) -> str:
    """`bad`, `good`, or `unproven` where nothing was proven."""
    words = [word(run)[0] for run in report.runs]
    if "DIVERGES" in words:
        return "bad"
    return "good" if words and set(words) <= {"parity", "consistent"} else "unproven"


def _row(run: Run) -> Mapping[str, object]:
    return {
        "strategy": spelling.printable(run.strategy),
        "word": word(run)[0],
        "mesh": spelling.degrees(run.degrees),
        "verdicts": run.verdicts,
        "worst": spelling.printable(worst(run)),
        "time": spelling.duration(run.time_s),
        "split": ", ".join(f"{spelling.count(n, 'parameter')} over {axis}" for axis, n in run.sharded.items() if n),
        "ran": "; ".join(
            f"over {axes}: " + ", ".join(f"{name} {n}" for name, n in calls.items())
            for axes, calls in run.collectives.items()
        ),
    }


def _divergence(report: Report, number: int, run: Run) -> Divergence | None:
    found = findings.first(run)
    if found is None:
        return None
    compared = found.comparison
    against = findings.against(found.stage, report.trusted)
    rows = findings.side_by_side(findings.shown(compared), against) if compared and compared.samples else []
    return Divergence(
        strategy=spelling.printable(run.strategy),
        run=number,
        cause=found.cause,
        place=spelling.printable(findings.place(found)),
        facts=tuple((label, spelling.printable(said)) for label, said in _facts(run, found, compared)),
        values=tuple(tuple(spelling.printable(cell) for cell in row) for row in rows),
        evidence=spelling.printable(found.evidence),
        tried=tuple(spelling.printable(findings.tried(one)) for one in found.tried[: findings.TRIED]),
        fix=spelling.printable(found.fix),
        later=tuple(spelling.printable(f"{findings.place(one)}: {findings.why(one)}") for one in run.findings[1:]),
        key=None if compared is None else compared.key,
    )


def _facts(run: Run, found: Finding, compared: Comparison | None) -> Iterator[tuple[str, str]]:
    yield "where", findings.where(found, compared)
    yield "stage", f"{found.stage}, {spelling.step(found.step)}"
    yield "ranks", findings.who(found, run)
    if found.axis:
        yield "axis", found.axis
    if found.factor is not None:
        yield "factor", f"{spelling.factor(found.factor)} (got / want)"
    if compared is not None:
        if compared.layout:
            yield "layout", compared.layout
        yield "difference", findings.difference(compared)
        if compared.ratio is not None and found.factor is None:
            yield "", f"the same factor everywhere: {spelling.factor(compared.ratio)}"
        if compared.reason and compared.reason not in found.evidence:
            yield "", compared.reason
