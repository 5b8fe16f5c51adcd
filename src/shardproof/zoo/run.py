"""Check every entry of the zoo as a user would, and see what the report says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shardproof.diagnose.finding import Finding
from shardproof.errors import ShardproofError
from shardproof.parity import check
from shardproof.report.data import Report
from shardproof.spec.patterns import matches
from shardproof.zoo.entry import Bug, Control
from shardproof.zoo.setting import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class BugResult:
    """What a check said of a bug."""

    name: str
    cause: str
    """The true one."""
    stages: tuple[str, ...]
    where: tuple[str, ...]
    """Where a finding may rightly place it, as in `Bug`."""
    source: str
    detected: bool
    """Whether there was a finding."""
    located: bool
    """Whether its stage and place are among the right ones."""
    cause_first: bool
    """Whether the first finding names the true cause."""
    found_cause: str | None
    time_s: float
    finding: Finding | None = None
    error: str = ""
    """What the check raised instead of reporting."""

    @property
    def ok(self) -> bool:
        """Whether it was detected, located and named."""
        return self.detected and self.located and self.cause_first


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlResult:
    """What a check said of right code."""

    name: str
    ok: bool
    time_s: float
    report: Report | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooReport:
    """The whole zoo, or the part of it that was asked for."""

    setting: Setting
    bugs: tuple[BugResult, ...]
    controls: tuple[ControlResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every bug was detected, and no control raised a false alarm."""
        return all(bug.detected for bug in self.bugs) and not self.false_alarms

    @property
    def false_alarms(self) -> int:
        """Controls that did not pass."""
        return sum(not control.ok for control in self.controls)

    @property
    def time_s(self) -> float:
        """Wall clock of all checks."""
        return sum(bug.time_s for bug in self.bugs) + sum(control.time_s for control in self.controls)


def run_zoo(
    bugs: Iterable[Bug],
    controls: Iterable[Control],
    setting: Setting,
    *,
    told: Callable[[BugResult | ControlResult], None] = lambda _result: None,
) -> ZooReport:
    """Check the entries one after the other; `told` hears of each as it is done."""
    found = []
    for bug in bugs:
        found.append(run_bug(bug, setting))
        told(found[-1])
    passed = []
    for control in controls:
        passed.append(run_control(control, setting))
        told(passed[-1])
    return ZooReport(setting=setting, bugs=tuple(found), controls=tuple(passed))


def run_bug(bug: Bug, setting: Setting) -> BugResult:
    """Check one bug. An error of the check is no detection: it is told in `error`."""
    started = time.perf_counter()
    first, error = None, ""
    try:
        first = _checked(bug, setting).first
    except ShardproofError as raised:
        error = str(raised)
    return BugResult(
        name=bug.name,
        cause=bug.cause,
        stages=bug.stages,
        where=bug.where,
        source=bug.source,
        detected=first is not None,
        located=first is not None and first.stage in bug.stages and any(matches(first.where, w) for w in bug.where),
        cause_first=first is not None and first.cause == bug.cause,
        found_cause=None if first is None else first.cause,
        time_s=time.perf_counter() - started,
        finding=first,
        error=error,
    )


def run_control(control: Control, setting: Setting) -> ControlResult:
    """Check right code: it must be proven, without a finding."""
    started = time.perf_counter()
    report, error = None, ""
    try:
        report = _checked(control, setting)
    except ShardproofError as raised:
        error = str(raised)
    return ControlResult(
        name=control.name,
        ok=report is not None and report.ok and report.first is None,
        time_s=time.perf_counter() - started,
        report=report,
        error=error,
    )


def _checked(entry: Bug | Control, setting: Setting) -> Report:
    options = dict(entry.options)
    if entry.trusted is not None:
        options["reference"] = entry.trusted(setting)
    return check(entry.build(setting), (setting.layout(entry.layout),), **options)
