"""From what the ranks have reported of a test to the reports that pytest shows: one for each phase."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from shardproof.pytest_plugin.failures import Cause, explained, told
from shardproof.pytest_plugin.hung import stuck, waited
from shardproof.pytest_plugin.messages import Ran
from shardproof.ranks.output import grouped, label

Phase = Literal["setup", "call", "teardown"]
PHASES: tuple[Phase, ...] = ("setup", "call", "teardown")

_TORCHS_OWN = "c10d-NullHandler"
"""Torch's own log of its collectives, on a logger that is meant to show nothing."""


@dataclass(kw_only=True, slots=True)
class _Phase:
    when: Phase
    reports: dict[int, pytest.TestReport] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    echoes: list[Cause] = field(default_factory=list)


def merged(item: pytest.Item, ran: Ran, *, size: int, limit_s: float | None) -> list[pytest.TestReport]:
    """The reports of the phases, in order; never none."""
    phases = _phases(item, ran, size, limit_s)
    for phase in phases.values():
        _judge(phase, item, size)
    any_cause = any(phase.causes for phase in phases.values())
    reports: list[pytest.TestReport] = []
    for phase in phases.values():
        # Without a cause, the ranks that only lost a peer are all there is to show.
        causes = phase.causes or ([] if any_cause else phase.echoes)
        if not phase.reports and not causes:
            continue
        if phase.when == "call" and reports and reports[0].outcome != "passed":
            continue  # where one rank's setup failed, the test has not been run
        reports.append(_report(item, phase, causes, size))
    _add_output(reports, ran, size)
    return reports


def failed(item: pytest.Item, text: str) -> list[pytest.TestReport]:
    """The reports of a test that could not be run at all."""
    phase = _Phase(when="setup", causes=[told(item, text, ranks=())])
    return [_report(item, phase, phase.causes, 1), _report(item, _Phase(when="teardown"), [], 1)]


def _phases(item: pytest.Item, ran: Ran, size: int, limit_s: float | None) -> dict[Phase, _Phase]:
    phases: dict[Phase, _Phase] = {when: _Phase(when=when) for when in PHASES}
    from_data = item.config.hook.pytest_report_from_serializable
    for rank, of_rank in sorted(ran.reports.items()):
        for one in of_rank:
            report: pytest.TestReport = from_data(config=item.config, data=dict(one.report))
            phase = phases[report.when]
            phase.reports[rank] = report
            if report.failed:
                (phase.echoes if one.echo else phase.causes).append(Cause((rank,), report.longrepr))
    if ran.mismatch:
        # What else there is came of it: aborts, lost peers, ranks that wait for ever.
        phases[_reached(ran, ran.mismatched[0])].causes.insert(0, told(item, ran.mismatch, ranks=ran.mismatched))
    else:
        _add_losses(phases, item, ran, size, limit_s)
    return phases


def _add_losses(phases: Mapping[Phase, _Phase], item: pytest.Item, ran: Ran, size: int, limit_s: float | None) -> None:
    """Ranks that died, broke outside the test, or had not ended it when they were given up."""
    for rank, how in ran.deaths.items():
        phases[_reached(ran, rank)].causes.append(told(item, f"died: {how}", ranks=(rank,)))
    for rank, why in ran.broken.items():
        phases[_reached(ran, rank)].causes.append(told(item, f"failed outside the test\n{why}", ranks=(rank,)))
    for rank, why in ran.lost.items():
        phases[_reached(ran, rank)].echoes.append(told(item, f"lost a peer\n{why}", ranks=(rank,)))
    if ran.late:
        ranks = sorted(ran.stacks)
        done = sorted(set(range(size)) - set(ranks))
        phases[_reached(ran, ranks[0])].causes.append(stuck(item, ran.stacks, done, limit_s or 0))
    elif ran.stacks:
        first = next((phase for phase in phases.values() if phase.causes), None)
        if first is not None:
            first.causes.append(waited(item, ran.stacks))


def _reached(ran: Ran, rank: int) -> Phase:
    """The phase that a rank was in when it was last heard of."""
    over = {one.report["when"] for one in ran.reports.get(rank, ())}
    return next((when for when in PHASES if when not in over), "teardown")


def _judge(phase: _Phase, item: pytest.Item, size: int) -> None:
    """Adds a cause where ranks disagree; takes those away that are an expected failure on other ranks."""
    reports = phase.reports
    expected = [rank for rank, report in reports.items() if report.skipped and hasattr(report, "wasxfail")]
    if expected:
        # A test fails where any rank does: that the others pass is no surprise.
        unexpected = {rank for rank, report in reports.items() if "[XPASS(strict)]" in str(report.longrepr)}
        phase.causes = [cause for cause in phase.causes if not set(cause.ranks) <= unexpected]
        return
    skipped = [rank for rank, report in reports.items() if report.skipped]
    passed = [rank for rank, report in reports.items() if report.passed]
    if skipped and passed:
        text = f"the ranks disagree: skipped on {_ranks(skipped)}, not on {_ranks(passed)}\n"
        reasons = {_reason(reports[rank]) for rank in skipped}
        phase.causes.append(told(item, text + "\n".join(sorted(reasons)), ranks=tuple(skipped)))
    elif len({_reason(reports[rank]) for rank in skipped}) > 1:
        reasons = {f"{_ranks([rank])}: {_reason(reports[rank])}" for rank in skipped}
        phase.causes.append(
            told(item, "the ranks skip for different reasons\n" + "\n".join(sorted(reasons)), ranks=tuple(skipped))
        )


def _reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


def _report(item: pytest.Item, phase: _Phase, causes: list[Cause], size: int) -> pytest.TestReport:
    reports = phase.reports
    longrepr: Any = explained(causes, [rank for echo in phase.echoes for rank in echo.ranks], size) if causes else None
    base = _base(reports, failed=bool(causes))
    if base is None:
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed" if causes else "passed",
            longrepr=longrepr,
            when=phase.when,
        )
    report = copy.copy(base)
    if causes:
        report.outcome, report.longrepr = "failed", longrepr
    elif report.failed:
        report.outcome, report.longrepr = "passed", None  # it only lost a peer, which is told elsewhere
    report.duration = max(one.duration for one in reports.values())
    report.start = min(one.start for one in reports.values())
    report.stop = max(one.stop for one in reports.values())
    report.sections = _sections(reports, size)
    report.user_properties = list(dict.fromkeys(p for one in reports.values() for p in one.user_properties))
    return report


def _base(reports: Mapping[int, pytest.TestReport], *, failed: bool) -> pytest.TestReport | None:
    """The report whose outcome is that of all."""
    in_order = list(reports.values())
    if failed:
        return next((report for report in in_order if report.failed), in_order[0] if in_order else None)
    return next(
        (report for report in in_order if report.skipped and hasattr(report, "wasxfail")),
        in_order[0] if in_order else None,
    )


def _sections(reports: Mapping[int, pytest.TestReport], size: int) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for report in reports.values() for name, _ in report.sections)
    found = []
    for name in names:
        lines = {
            rank: [
                line
                for title, text in report.sections
                if title == name
                for line in text.splitlines()
                if _TORCHS_OWN not in line
            ]
            for rank, report in reports.items()
        }
        if text := "".join(f"{line}\n" for line in labelled(lines, size)):
            found.append((name, text))
    return found


def _add_output(reports: Iterable[pytest.TestReport], ran: Ran, size: int) -> None:
    """What ranks wrote past pytest's capturing belongs to the phase that failed, else to the last."""
    text = "\n".join(labelled(ran.output, size))
    if text:
        in_order = list(reports)
        chosen = next((report for report in in_order if report.failed), in_order[-1])
        chosen.sections = [*chosen.sections, (f"Captured stderr of ranks {chosen.when}", text)]


def labelled(lines: Mapping[int, list[str]], size: int) -> list[str]:
    """Equal lines of several ranks once, each with its ranks; plain where there is only one rank."""
    if size == 1:
        return list(lines.get(0, []))
    return [f"{label(ranks, '')} {line}".rstrip() for ranks, line in grouped(lines)]


def _ranks(ranks: Iterable[int]) -> str:
    return label(sorted(ranks), "").strip("[]")
